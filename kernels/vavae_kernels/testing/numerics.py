"""The numerics rule: an operator's error against fp64, beside the error of the same formula in eager PyTorch.

For each output and gradient, |ours - fp64| <= 2 (|eager - fp64| + band), the band being one unit in the last place of the
result's dtype at the largest magnitude of the result. No hand-picked tolerance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .spec import Inputs, Spec


@dataclass(frozen=True)
class Error:
    """One output or gradient: largest absolute error of ours and of eager against fp64, and the band of its dtype."""

    name: str
    ours: float
    eager: float
    band: float

    @property
    def allowed(self) -> float:
        return 2 * (self.eager + self.band)

    @property
    def within(self) -> bool:
        """False for NaN too."""
        return self.ours <= self.allowed

    def __str__(self) -> str:
        return f"{self.name}: error {self.ours:.3g}, eager {self.eager:.3g}, allowed {self.allowed:.3g}"


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def copied(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Fresh leaves with the same values, and the same strides unless `dtype` asks for another precision.

    Chunk views of one tensor stay views: strides matter to a kernel. Tables and other fp64 constants follow `dtype` too.
    """

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value if dtype is None or not isinstance(value, torch.dtype) else dtype
        if dtype is not None:
            return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)
        twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        if 0 not in value.stride():
            twin.copy_(value.detach())
        else:  # a broadcast view: its one element along each such axis
            index = tuple(slice(0, 1) if s == 0 else slice(None) for s in value.stride())
            twin[index].copy_(value.detach()[index])
        return twin.requires_grad_(value.requires_grad)

    return {name: copy(value) for name, value in inputs.items()}


def run(function: Callable[..., Any], inputs: Inputs, cotangents: tuple[Tensor, ...], gradients: tuple[str, ...]) -> dict[str, Tensor]:
    """Outputs "out0", … and the gradients "d<name>" of those in `gradients` that are tensors requiring grad."""
    results = outputs(function(**inputs))
    wanted = {name: inputs[name] for name in gradients if isinstance(inputs.get(name), Tensor) and inputs[name].requires_grad}
    named = {f"out{i}": result.detach() for i, result in enumerate(results)}
    if not wanted:
        return named
    grads = torch.autograd.grad(results, list(wanted.values()), [c.to(r.dtype) for c, r in zip(cotangents, results)])
    return {**named, **{f"d{name}": grad for name, grad in zip(wanted, grads)}}


def draw_cotangents(spec: Spec, inputs: Inputs) -> tuple[Tensor, ...]:
    """Random cotangents already rounded to the outputs' dtypes, so that all three computations get the same numbers."""
    with torch.no_grad():
        results = outputs(spec.reference(**copied(inputs)))
    return tuple(torch.randn_like(result) for result in results)


def faults(spec: Spec, draw: Callable[[], Inputs], draws: int = 8) -> list[str]:
    """What is outside the rule, in words; nothing if all is well. `draw` gives fresh inputs at each call.

    An error is an extreme of rounding noise, and of few numbers an unlucky one. So an error outside is decided by `draws` more
    calls: the worst of ours beside the worst of eager's.
    """
    found = errors(spec, draw())
    if not all(error.within for error in found):
        found = [_worst(found) for found in zip(*(errors(spec, draw()) for _ in range(draws)))]
    return [str(error) for error in found if not error.within]


def _worst(found: tuple[Error, ...]) -> Error:
    ours = [error.ours for error in found]
    return Error(found[0].name, max(ours, key=lambda x: (x != x, x)), max(e.eager for e in found), max(e.band for e in found))  # NaN is worst


def errors(spec: Spec, inputs: Inputs, impl: str = "triton") -> list[Error]:
    """Every output and gradient of `spec` on `inputs`: ours (`impl`) and eager's against fp64.

    Under the interpreter a bf16 store truncates where a GPU rounds to nearest, which the factor 2 of the rule covers.
    """
    cotangents = draw_cotangents(spec, inputs)
    ours = run(lambda **k: spec.function(**k, impl=impl), copied(inputs), cotangents, spec.gradients)
    eager = run(spec.reference, copied(inputs), cotangents, spec.gradients)
    wide = [c.double() for c in cotangents]
    exact = run(spec.reference, copied(inputs, torch.float64), tuple(wide), spec.gradients)
    found = []
    for name, reference in exact.items():
        if ours[name].dtype != eager[name].dtype or ours[name].shape != eager[name].shape:
            message = f"{name} is {ours[name].dtype} {tuple(ours[name].shape)}, expected {eager[name].dtype} {tuple(eager[name].shape)}"
            raise AssertionError(f"{spec.name}: {message}")
        if reference.numel() == 0:
            continue
        band = torch.finfo(eager[name].dtype).eps * reference.abs().max().item()
        mine, theirs = ((x[name].double() - reference).abs().max().item() for x in (ours, eager))
        found.append(Error(name, mine, theirs, band))
    return found
