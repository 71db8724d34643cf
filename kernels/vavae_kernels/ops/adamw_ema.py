"""One optimizer step of AdamW with an exponential moving average of the weights: `AdamWEMA`.

Loshchilov & Hutter 2019, algorithm 2, with g = gradient / grad_scale:

    m = β1 m + (1 - β1) g                       p = p (1 - lr λ) - lr / (1 - β1^k) · m / (sqrt(v / (1 - β2^k)) + ε)
    v = β2 v + (1 - β2) g²                      ema = d ema + (1 - d) p

A device scalar found_inf != 0 leaves p, m, v, ema and k exactly as they were, without asking the host.

Dtypes  parameters and gradients any, m, v and ema at least fp32; arithmetic in that, one rounding, at the store of p.
HBM bytes a parameter in fp32: reads p, g, m, v, ema and writes p, m, v, ema: 36.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import arithmetic_dtype, check, is_number
from .._registry import use_triton

_CHUNK = 1 << 26  # elements updated at a time: bounds the temporaries of the reference to about 1.5 GB
_STATE = ("step", "exp_avg", "exp_avg_sq", "ema")


def adamw_ema_reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float,
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
    new_params = torch._foreach_mul([p.to(m.dtype) for p, m in zip(params, exp_avgs)], 1 - lr * weight_decay)
    torch._foreach_add_(new_params, updates, alpha=-lr)

    _store(params, new_params, found_inf)
    _store(exp_avgs, new_avgs, found_inf)
    _store(exp_avg_sqs, new_sqs, found_inf)
    _store(steps, new_steps, found_inf)


def ema_reference(emas: list[Tensor], params: list[Tensor], ema_decay: float, found_inf: Tensor | None = None) -> None:
    """ema = d ema + (1 - d) p in place. An EMA that equals its parameter stays bit-equal to it."""
    _store(emas, torch._foreach_lerp(emas, [p.to(e.dtype) for p, e in zip(params, emas)], 1 - ema_decay), found_inf)


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
    ema_decay None keeps no EMA. A parameter without gradient is left alone, its EMA still moves.

    `found_inf` and `grad_scale` are device scalars, given to `step` or set as attributes as torch.amp.GradScaler does:
    found_inf != 0 changes nothing at all, EMA and step count included, and gradients are divided by grad_scale.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets found_inf and grad_scale

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        ema_decay: float | None = 0.9999,
        impl: str = "auto",
    ):
        for name, value in dict(lr=lr, eps=eps, weight_decay=weight_decay).items():
            check(is_number(value) and value >= 0, "AdamWEMA", f"{name} must be a number, 0 or more, got {value!r}")
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in betas)
        check(pair, "AdamWEMA", f"betas must be a pair of numbers in [0, 1), got {betas!r}")
        decay = ema_decay is None or (is_number(ema_decay) and 0 <= ema_decay <= 1)
        check(decay, "AdamWEMA", f"ema_decay must be a number in [0, 1] or None, got {ema_decay!r}")
        use_triton("AdamWEMA", impl)
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, ema_decay=ema_decay, capturable=True)
        super().__init__(params, defaults)
        devices = {p.device for _, p, _ in self._named()}
        check(len(devices) == 1, "AdamWEMA", f"parameters must share one device, got {sorted(map(str, devices))}")

    def _named(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """(name, parameter, group) of every parameter, in order."""
        count = 0
        for group in self.param_groups:
            names = group.get("param_names") or [str(count + i) for i in range(len(group["params"]))]
            count += len(names)
            for name, p in zip(names, group["params"]):
                yield name, p, group

    def _init_state(self, p: Tensor, ema_decay: float | None) -> None:
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
            for params in _chunks(group["params"]):
                self._step_chunk(params, group, found_inf, grad_scale)
        return loss

    def _step_chunk(self, params: list[Tensor], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        for p in params:
            if not self.state[p]:
                self._init_state(p, group["ema_decay"])
        moving = [p for p in params if p.grad is not None]
        if moving:
            adamw_ema_reference(
                [_local(p) for p in moving],
                [_local(p.grad) for p in moving],
                [_local(self.state[p]["exp_avg"]) for p in moving],
                [_local(self.state[p]["exp_avg_sq"]) for p in moving],
                [self.state[p]["step"] for p in moving],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                found_inf=_local(found_inf),
                grad_scale=_local(grad_scale),
            )
        if group["ema_decay"] is not None:
            ema_reference([_local(self.state[p]["ema"]) for p in params], [_local(p) for p in params], group["ema_decay"], _local(found_inf))

    def ema_state_dict(self) -> dict[str, Tensor]:
        """name -> EMA tensor, the live one (fp32, or fp64). Before the first step that is the parameter itself."""
        return {
            name: self.state[p]["ema"] if "ema" in self.state[p] else p.detach().to(arithmetic_dtype(p), copy=True)
            for name, p, group in self._named()
            if group["ema_decay"] is not None
        }

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


def _chunks(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of parameters with at most _CHUNK elements, or a single larger one."""
    chunk, size = [], 0
    for p in params:
        if chunk and size + p.numel() > _CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(p)
        size += p.numel()
    if chunk:
        yield chunk


def _local(tensor: Tensor | None) -> Tensor | None:
    """The shard of a DTensor that lies here (sharing its memory); a plain tensor as it is."""
    return tensor.to_local() if type(tensor).__name__ == "DTensor" else tensor
