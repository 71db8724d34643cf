"""One optimizer step of AdamW with an exponential moving average of the weights: `AdamWEMA`.

Loshchilov & Hutter 2019, algorithm 2, with g = gradient / grad_scale:

    m = β1 m + (1 - β1) g                       p = p (1 - lr λ) - lr / (1 - β1^k) · m / (sqrt(v / (1 - β2^k)) + ε)
    v = β2 v + (1 - β2) g²                      ema = d ema + (1 - d) p

A device scalar found_inf != 0 leaves p, m, v, ema and k exactly as they were, without asking the host.

Dtypes  parameters and gradients any, m, v and ema at least fp32; arithmetic in that, one rounding, at the store of p.
HBM bytes a parameter in fp32: reads p, g, m, v, ema and writes p, m, v, ema: 36; with a bf16 copy of p 38.

Three implementations: the reference below, on foreach operators; a kernel in CUDA C++ (`csrc/adamw_ema.h`), one pass over all
parameters; and, where that cannot be compiled, torch.optim's fused AdamW followed by the reference's average.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _compat
from .._checks import DTYPES, arithmetic_dtype, check, is_number
from .._extension import BuildError
from .._registry import IMPLEMENTATIONS
from ._adamw_ema_compiled import CompiledStep, Slot, in_one_order

_CHUNK = 1 << 26  # elements updated at a time: bounds the temporaries of the reference to about 1.5 GB
_STATE = ("step", "exp_avg", "exp_avg_sq", "ema")
_FUSED_DEVICES = ("cuda", "cpu")  # where torch.optim's fused AdamW stands in for the kernel


def adamw_ema_reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """AdamW in place on lists of plain tensors of one device; steps are () fp32 tensors. See `ema_reference`."""
    grads = [g.to(m.dtype) for g, m in zip(grads, exp_avgs)]
    if grad_scale is not None:
        grads = torch._foreach_div(grads, grad_scale.reshape(()))
    new_steps = torch._foreach_add(steps, 1.0)
    new_avgs = torch._foreach_lerp(exp_avgs, grads, 1 - betas[0])
    new_sqs = torch._foreach_mul(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(new_sqs, grads, grads, 1 - betas[1])

    denominators = torch._foreach_sqrt(new_sqs)
    torch._foreach_div_(denominators, _bias_corrections(new_steps, betas[1], root=True))
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(new_avgs, denominators)
    torch._foreach_div_(updates, _bias_corrections(new_steps, betas[0], root=False))
    torch._foreach_mul_(updates, lr)
    new_params = torch._foreach_mul([p.to(m.dtype) for p, m in zip(params, exp_avgs)], 1 - lr * weight_decay)
    torch._foreach_sub_(new_params, updates)

    _store(params, new_params, found_inf)
    _store(exp_avgs, new_avgs, found_inf)
    _store(exp_avg_sqs, new_sqs, found_inf)
    _store(steps, new_steps, found_inf)


def ema_reference(emas: list[Tensor], params: list[Tensor], ema_decay: float | Tensor, found_inf: Tensor | None = None) -> None:
    """ema = d ema + (1 - d) p in place. An EMA that equals its parameter stays bit-equal to it."""
    params = [p.to(e.dtype) for p, e in zip(params, emas)]
    if isinstance(ema_decay, Tensor):  # foreach would bring the number to the host
        moved = [torch.lerp(e, p, (1 - ema_decay).to(e.dtype)) for e, p in zip(emas, params)]
    else:
        moved = torch._foreach_lerp(emas, params, 1 - ema_decay)
    _store(emas, moved, found_inf)


def _fused_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """`adamw_ema_reference` by the kernel of torch.optim.AdamW(fused=True), which wants one dtype and one order of elements."""
    if grad_scale is not None:  # the kernel's own grad_scale would write to the gradients
        grads = torch._foreach_div(grads, grad_scale.reshape(()))
    skip = None if found_inf is None else (found_inf.reshape(()) != 0).to(torch.float32)  # the kernel knows 1 alone
    torch._foreach_add_(steps, 1.0)
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=skip,
    )
    if skip is not None:
        torch._foreach_sub_(steps, [skip] * len(steps))
    torch.autograd.graph.increment_version(params)  # which that kernel forgets


def _bias_corrections(steps: list[Tensor], beta: float, root: bool) -> list[Tensor]:
    """1 - beta^k, or its square root, for each k; expm1 keeps the digits that 1 - beta ** k loses in fp32."""
    if beta == 0:
        return [torch.ones_like(k) for k in steps]
    corrections = torch._foreach_neg(torch._foreach_expm1(torch._foreach_mul(steps, math.log(beta))))
    return torch._foreach_sqrt(corrections) if root else corrections


def _store(old: list[Tensor], new: list[Tensor], found_inf: Tensor | None) -> None:
    """old = new, rounded to old's dtype; where found_inf is set old stays, NaN in `new` or not (lerp by 0 would spread it)."""
    if found_inf is None:
        torch._foreach_copy_(old, new)
        return
    skip = found_inf.reshape(()) != 0
    for before, after in zip(old, new):
        torch.where(skip, before, after.to(before.dtype), out=before)


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (torch.optim.AdamW's mathematics) and an EMA of every parameter, in one step.

    params: tensors, (name, tensor) pairs as `model.named_parameters()` gives them, or groups of either. Names are the keys
    of `ema_state_dict`; without names the keys are "0", "1", ... DTensors are updated on their local shards.
    ema_decay None keeps no EMA. A parameter without gradient is left alone, its EMA still moves. bf16_copy keeps a bf16 copy of
    every parameter for `bf16_state_dict`, written in the same pass.

    `found_inf` and `grad_scale` are device scalars, given to `step` or set as attributes as torch.amp.GradScaler does:
    found_inf != 0 changes nothing at all, EMA, copy and step count included, and gradients are divided by grad_scale.
    lr and ema_decay of a group may be () fp32 tensors on the device: a CUDA graph then follows what is written into them. Take one
    step before capturing: it makes the state.

    impl "torch": PyTorch's operators, its fused AdamW where that takes the tensors, else the reference. "auto": on a GPU the
    kernel of `csrc`, compiled when the optimizer is made; PyTorch's operators where it cannot be (said once), on other devices, for fp64
    and for tensors with gaps. "triton", the name that asks every operator for its own kernel: an error instead of PyTorch's operators;
    on CPU tensors, under TRITON_INTERPRET=1, the host build of the same source.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets found_inf and grad_scale

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        ema_decay: float | Tensor | None = 0.9999,
        impl: str = "auto",
        bf16_copy: bool = False,
    ):
        check(impl in IMPLEMENTATIONS, "AdamWEMA", f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
        self._impl = impl
        self._bf16: dict[Tensor, Tensor] | None = {} if bf16_copy else None
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, ema_decay=ema_decay, capturable=True)
        _check_settings(defaults)
        super().__init__(params, {**defaults, "betas": tuple(betas)})
        _compiled(impl, self.param_groups[0]["params"][0].device)  # compiles now, not in the first step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer does, the constructor through it: with the same checks of settings, names and tensors."""
        super().add_param_group(param_group)
        try:
            _check_settings(self.param_groups[-1])
            self._check_parameters()
        except ValueError:
            del self.param_groups[-1]
            raise

    def _check_parameters(self) -> None:
        again = [name for name, count in Counter(name for name, _, _ in self._named()).items() if count > 1]
        check(not again, "AdamWEMA", f"names of parameters must differ, they are the keys of the EMA; more than once: {again[:5]}")
        for name, p, _ in self._named():
            check(p.dtype in DTYPES, "AdamWEMA", f"parameters must be floating point, {name} is {p.dtype}; 16 bits at least")
            check(p.layout == torch.strided, "AdamWEMA", f"parameters must be dense, {name} has layout {p.layout}")
        devices = {p.device for _, p, _ in self._named()}
        check(len(devices) == 1, "AdamWEMA", f"parameters must share one device, got {sorted(map(str, devices))}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_impl": self._impl, "_bf16": self._bf16}

    def _named(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """(name, parameter, group) of every parameter, in order."""
        count = 0
        for group in self.param_groups:
            names = group.get("param_names") or [str(count + i) for i in range(len(group["params"]))]
            count += len(names)
            for name, p in zip(names, group["params"]):
                yield name, p, group

    def _init_state(self, p: Tensor, ema_decay: float | Tensor | None) -> None:
        """Zero moments, and an EMA that starts as the parameter; called before the parameter first moves."""
        dtype = arithmetic_dtype(p)
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        if ema_decay is not None:
            state["ema"] = p.detach().to(dtype, copy=True)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, found_inf: Tensor | None = None, grad_scale: Tensor | None = None
    ) -> Any:
        """One update of every parameter. Returns the closure's value. Never waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None) if found_inf is None else found_inf
        grad_scale = getattr(self, "grad_scale", None) if grad_scale is None else grad_scale
        for group in self.param_groups:
            slots = [self._slot(p, group) for p in group["params"]]
            if slots:
                self._step_group(slots, group, found_inf, grad_scale)
        return loss

    def _slot(self, p: Tensor, group: dict[str, Any]) -> Slot:
        state = self.state[p]
        if not state:
            self._init_state(p, group["ema_decay"])
        check(p.grad is None or not p.grad.is_sparse, "AdamWEMA", "gradients must be dense, got a sparse one; set sparse=False")
        ema = state["ema"] if group["ema_decay"] is not None else None
        slot = Slot(p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], ema, self._bf16_of(p))
        slot = Slot(*map(_local, slot)) if _is_sharded(p) else slot
        if slot.grad is None or in_one_order(slot.param, (slot.grad,)):
            return slot
        return slot._replace(grad=torch.empty_like(slot.param, dtype=slot.grad.dtype).copy_(slot.grad))  # kernels walk memory in one order

    def _step_group(self, slots: list[Slot], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        device = slots[0].param.device
        found_inf = _scalar_on(device, "found_inf", found_inf)
        grad_scale = _scalar_on(device, "grad_scale", grad_scale)
        settings = {**group, **{name: _rate_on(device, name, group[name]) for name in ("lr", "ema_decay")}}
        compiled = _compiled(self._impl, device)
        if compiled is not None:
            taken, slots = _split(slots, compiled.takes)
            check(self._impl == "auto" or not slots, "AdamWEMA", f"impl='triton' cannot take {_describe(slots)}; use impl='auto'")
            compiled(taken, settings, found_inf, grad_scale)
        for chunk in _chunks(slots):
            _step_torch(chunk, settings, found_inf, grad_scale)

    def ema_state_dict(self) -> dict[str, Tensor]:
        """name -> EMA tensor, the live one (fp32, or fp64). Before the first step that is the parameter itself."""
        return {
            name: self.state[p]["ema"] if "ema" in self.state[p] else p.detach().to(arithmetic_dtype(p), copy=True)
            for name, p, group in self._named()
            if group["ema_decay"] is not None
        }

    @torch.no_grad()
    def bf16_state_dict(self) -> dict[str, Tensor]:
        """name -> the parameter in bf16, the live copy that every step writes; a bf16 parameter is its own.

        The copies are no part of `state_dict`. This call brings them up to date with parameters that others have written to.
        """
        check(self._bf16 is not None, "AdamWEMA", "there are no bf16 copies; make the optimizer with bf16_copy=True")
        copies = {name: self._bf16_of(p) for name, p, _ in self._named()}
        for name, p, _ in self._named():
            if copies[name] is not None:
                copies[name].copy_(p)
        return {name: p.detach() if copies[name] is None else copies[name] for name, p, _ in self._named()}

    def _bf16_of(self, p: Tensor) -> Tensor | None:
        if self._bf16 is None or p.dtype == torch.bfloat16:
            return None
        if p not in self._bf16:
            self._bf16[p] = p.detach().to(torch.bfloat16)
        return self._bf16[p]

    @torch.no_grad()
    def load_ema_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over an EMA by name, from `ema_state_dict` or a checkpoint that holds only the EMA. Names must match exactly."""
        own = {name: (p, group) for name, p, group in self._named() if group["ema_decay"] is not None}
        missing, unexpected = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
        check(not missing and not unexpected, "AdamWEMA", f"EMA keys differ: missing {missing[:5]}, unexpected {unexpected[:5]}")
        for name, (p, group) in own.items():
            check(state_dict[name].shape == p.shape, "AdamWEMA", f"EMA {name}: {tuple(state_dict[name].shape)}, not {tuple(p.shape)}")
            if not self.state[p]:
                self._init_state(p, group["ema_decay"])
            self.state[p]["ema"].copy_(state_dict[name])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, moments, steps and EMA in the precision they were saved in."""
        wanted = {key for group in self.param_groups for key in group if key not in ("params", "param_names")}
        for number, group in enumerate(state_dict["param_groups"]):
            missing = sorted(wanted - group.keys())
            check(not missing, "AdamWEMA", f"param group {number} of the state lacks {missing}: it was saved by another optimizer")
            for i in set(group["params"]) & state_dict["state"].keys():
                lacking = [k for k in _STATE if k not in state_dict["state"][i] and (k != "ema" or group["ema_decay"] is not None)]
                check(not lacking, "AdamWEMA", f"the state of parameter {i} lacks {lacking}: it was saved by another optimizer")
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, (_, p, _) in zip(ids, self._named()):
            for key, value in state_dict["state"].get(i, {}).items():
                self.state[p][key] = value.to(p.device, copy=True)  # torch would cast it to the parameter's dtype


def _check_settings(group: Mapping[str, Any]) -> None:
    """Numbers of the defaults or of a group. lr and ema_decay as tensors are left to `_rate_on`: to show one is to wait for it."""
    lr, betas, decay = group["lr"], group["betas"], group["ema_decay"]
    for name in ("eps", "weight_decay") if isinstance(lr, Tensor) else ("lr", "eps", "weight_decay"):
        check(is_number(group[name]) and group[name] >= 0, "AdamWEMA", f"{name} must be a number, 0 or more, got {group[name]!r}")
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in betas)
    check(pair, "AdamWEMA", f"betas must be a pair of numbers in [0, 1), got {betas!r}")
    if not isinstance(decay, Tensor):
        known = decay is None or (is_number(decay) and 0 <= decay <= 1)
        check(known, "AdamWEMA", f"ema_decay must be a number in [0, 1], a tensor or None, got {decay!r}")


def _step_torch(slots: list[Slot], group: Mapping[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
    """One step of `slots` on PyTorch's operators: its fused AdamW where that takes them, else the reference."""
    moving = [slot for slot in slots if slot.grad is not None]
    fused, plain = _split(moving, _fused_takes)
    for adamw, part in ((_fused_adamw, fused), (adamw_ema_reference, plain)):
        if part:
            params, grads, exp_avgs, exp_avg_sqs, steps = (list(tensors) for tensors in list(zip(*part))[:5])
            settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            adamw(params, grads, exp_avgs, exp_avg_sqs, steps, **settings, found_inf=found_inf, grad_scale=grad_scale)
    averaged = [slot for slot in slots if slot.ema is not None]
    if averaged:
        ema_reference([slot.ema for slot in averaged], [slot.param for slot in averaged], group["ema_decay"], found_inf)
    copied = [slot for slot in slots if slot.bf16 is not None]
    if copied:
        _store([slot.bf16 for slot in copied], [slot.param for slot in copied], found_inf)


def _split(slots: list[Slot], chosen: Callable[[Slot], bool]) -> tuple[list[Slot], list[Slot]]:
    """Those that `chosen` is true of, and the others."""
    verdicts = [chosen(slot) for slot in slots]
    return [s for s, yes in zip(slots, verdicts) if yes], [s for s, yes in zip(slots, verdicts) if not yes]


def _fused_takes(slot: Slot) -> bool:
    streams = (slot.grad, slot.exp_avg, slot.exp_avg_sq)
    alike = all(t.dtype == slot.param.dtype for t in streams) and in_one_order(slot.param, streams)
    # On a CPU that kernel rounds a tensor's last elements, which fill no vector, otherwise: what they are depends on how weights are sharded.
    elementwise = slot.param.device.type != "cpu" or not torch.are_deterministic_algorithms_enabled()
    return alike and elementwise and slot.param.device.type in _FUSED_DEVICES


def _compiled(impl: str, device: torch.device) -> CompiledStep | None:
    """The kernel that `impl` means on `device`; None: PyTorch's operators."""
    if impl == "triton":
        there = device.type == "cuda" or (device.type == "cpu" and _compat.INTERPRETED)
        check(there, "AdamWEMA", f"impl='triton' needs CUDA parameters, or TRITON_INTERPRET=1 for CPU ones, got {device}; use impl='auto'")
        try:
            return _kernel(device)
        except BuildError as error:
            raise BuildError(f"AdamWEMA: impl='triton' needs its compiled kernel; {error}") from error
    return _kernel_if_any(device) if impl == "auto" and device.type == "cuda" else None


@cache
def _kernel(device: torch.device) -> CompiledStep:
    return CompiledStep(device)


@cache  # which says it once
def _kernel_if_any(device: torch.device) -> CompiledStep | None:
    try:
        return _kernel(device)
    except BuildError as error:
        warnings.warn(f"vavae_kernels: AdamWEMA runs torch's fused AdamW and a foreach EMA instead of its kernel: {error}", stacklevel=4)
        return None


def _chunks(slots: list[Slot]) -> Iterator[list[Slot]]:
    """Runs of slots with at most _CHUNK elements, or a single larger one."""
    chunk, size = [], 0
    for slot in slots:
        if chunk and size + slot.param.numel() > _CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(slot)
        size += slot.param.numel()
    if chunk:
        yield chunk


def _scalar_on(device: torch.device, name: str, value: Tensor | None) -> Tensor | None:
    """`value` as an fp32 tensor of one element; on the device already, since bringing it there could wait for it."""
    if value is None:
        return None
    given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)  # repr of a tensor waits for its value
    check(isinstance(value, Tensor) and value.numel() == 1, "AdamWEMA", f"{name} must be a tensor of one element, got {given}")
    value = _local(value)
    check(value.device == device, "AdamWEMA", f"{name} is on {value.device}, the parameters on {device}")
    return value.detach().to(torch.float32)


def _rate_on(device: torch.device, name: str, value: float | Tensor | None) -> float | Tensor | None:
    """A number or None as it is; a tensor must be what the kernel reads: () fp32 on the device."""
    if isinstance(value, Tensor):
        fits = value.shape == () and value.dtype == torch.float32 and value.device == device
        found = f"{tuple(value.shape)} {value.dtype} on {value.device}"
        check(fits, "AdamWEMA", f"{name} as a tensor must be () torch.float32 on {device}, got {found}")
    return value


def _describe(slots: list[Slot]) -> str:
    """For an error message: the first parameter's dtype, shape and strides."""
    return ", ".join(f"a parameter of {s.param.dtype}, shape {tuple(s.param.shape)}, strides {s.param.stride()}" for s in slots[:1])


def _is_sharded(tensor: Tensor | None) -> bool:
    return type(tensor).__name__ == "DTensor"


def _local(tensor: Tensor | None) -> Tensor | None:
    """The shard of a DTensor that lies here (sharing its memory); a plain tensor as it is."""
    return tensor.to_local() if _is_sharded(tensor) else tensor
