"""Correctness of an operator on a device, without timing: the fp64 rule at small and real shapes, and capture in a CUDA graph."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import optimizers
from benchmarks.operators import smallest, worst_error
from benchmarks.timing import captured, synchronize
from vavae_kernels import _extension
from vavae_kernels.testing import numerics
from vavae_kernels.testing.spec import DTYPES, Inputs, Spec, specs

OPTIMIZER = "adamw_ema"
SAMPLES = 2  # of a real shape: its width and length matter here, its batch when it is timed

Finding = dict[str, Any]  # case, and error (over what is allowed) or fault


def names() -> list[str]:
    return [*specs(), OPTIMIZER]


def findings(name: str, device: torch.device, tiny: bool) -> Iterator[Finding]:
    """One for each case of an operator, most telling first: as the model runs it at real widths, then corners, then other dtypes."""
    if name == OPTIMIZER:
        yield from _optimizer(device)
        return
    spec = specs()[name]
    for case, draw in _cases(spec, device, tiny):
        yield _finding(case, lambda draw=draw: worst_error(spec, draw))
    yield _finding("CUDA graph", lambda: _replays(spec, device))


def _finding(case: str, check: Callable[[], float]) -> Finding:
    """A check that fails is a finding, whatever it failed of: the next one runs."""
    try:
        return dict(case=case, error=round(check(), 4))
    except Exception as fault:
        return dict(case=case, fault=f"{type(fault).__name__}: {str(fault)[:300]}")


def _cases(spec: Spec, device: torch.device, tiny: bool) -> Iterator[tuple[str, Callable[[], Inputs]]]:
    real = {name: {**shape, "B": min(shape["B"], SAMPLES)} if "B" in shape else shape for name, shape in spec.real.items()}
    small = {smallest(spec): spec.small[smallest(spec)]} if tiny else dict(spec.small)
    for dtypes in spec.dtypes[:1] if tiny else spec.dtypes:
        for shapes in (small,) if tiny else (real, small):
            for shape, sizes in shapes.items():
                for variant in spec.variants[:1] if tiny else spec.variants:
                    yield f"{shape} {dtypes} {variant}".strip(), lambda s=sizes, d=dtypes, v=variant: spec.inputs(s, DTYPES[d], v, device)


def _replays(spec: Spec, device: torch.device) -> float:
    """A replay of forward and backward gives the eager call's bits."""
    inputs = spec.inputs(spec.small[smallest(spec)], DTYPES[spec.dtypes[0]], spec.variants[0], device)
    cotangents = numerics.draw_cotangents(spec, inputs)
    run = lambda: numerics.run(lambda **k: spec.function(**k, impl="triton"), inputs, cotangents, spec.gradients)
    expected = run()
    found: dict[str, torch.Tensor] = {}
    replay = captured([lambda: found.update(run())], device)
    for tensor in found.values():
        tensor.fill_(float("nan"))
    replay()
    synchronize(device)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    if different:
        raise AssertionError(f"a replay differs in {', '.join(different)}")
    return 0.0


def _optimizer(device: torch.device) -> Iterator[Finding]:
    """csrc compiled for the device, and five steps of it against fp64."""
    target = _extension.target_of(device)

    def built() -> float:
        _extension.build(OPTIMIZER, target)
        return 0.0

    yield _finding(f"csrc for {target}", built)

    def step() -> float:
        error = optimizers.error(device)
        if not error <= 1:
            raise AssertionError(f"error {error:.3g} times what the rule allows")
        return error

    yield _finding("five steps", step)
