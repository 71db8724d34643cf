"""Schedules of learning rate and EMA, the gradient norm, and an optimizer's state as plain named tensors."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from vavae_fast.errors import BadInput
from vavae_fast.training.parallel import copy_whole, is_sharded, local_rows

NamedParameters = dict[str, nn.Parameter]


def trainable(*modules: nn.Module | tuple[str, nn.Module]) -> NamedParameters:
    """The parameters that ask for gradients, by name; a (prefix, module) pair names them `prefix.name`."""
    named: NamedParameters = {}
    for entry in modules:
        prefix, module = entry if isinstance(entry, tuple) else ("", entry)
        named.update({f"{prefix}.{n}" if prefix else n: p for n, p in module.named_parameters() if p.requires_grad})
    return named


def learning_rate(base: float, step: int, max_steps: int, warmup_steps: int = 0, decay_fraction: float = 0.0) -> float:
    """The rate of step `step`, counted from 0: linear warm-up, constant, linear to 0 over the last `decay_fraction`."""
    rate = base * min(1.0, (step + 1) / (warmup_steps + 1))
    decay_steps = decay_fraction * max_steps
    return rate * min(1.0, (max_steps - step) / decay_steps) if decay_steps else rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def set_ema_decay(optimizer: torch.optim.Optimizer, decay: float, step: int, warmup: bool = False) -> None:
    """The average's decay after step `step`. With `warmup` min(decay, (1 + step) / (10 + step)): a short run forgets its first steps."""
    for group in optimizer.param_groups:
        group["ema_decay"] = min(decay, (1 + step) / (10 + step)) if warmup else decay


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The L2 norm of all averaged gradients, of sharded parameters too: a () tensor on the device, the same on every process."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [g for g in gradients if is_sharded(g)]
    whole = get_total_norm([g for g in gradients if not is_sharded(g)])
    if not sharded:
        return whole
    squares = get_total_norm([local_rows(g) for g in sharded]).double().square()  # fp64: an fp32 norm's square may overflow
    dist.all_reduce(squares, group=sharded[0].device_mesh.get_group("shard"))
    return (squares + whole.double().square()).sqrt().float()


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: NamedParameters) -> dict[str, Tensor]:
    """The optimizer's state as `<slot>.<parameter name>` -> tensor, without the average, which is a model of its own."""
    return {f"{slot}.{name}": value for name, p in named.items() for slot, value in optimizer.state.get(p, {}).items() if slot != "ema"}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, named: NamedParameters, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put back what `optimizer_tensors` gave; a name or shape that does not fit is `BadInput` naming it."""
    for key, value in tensors.items():
        slot, _, name = key.partition(".")
        if name not in named:
            raise BadInput(f"{source}: optimizer state of {name!r}, which the model does not have; resume with the run's own config")
        parameter = named[name]
        if slot != "step" and value.shape != parameter.shape:
            raise BadInput(f"{source}: {key} has shape {tuple(value.shape)}, the parameter has {tuple(parameter.shape)}")
        if value.ndim:
            optimizer.state[parameter][slot] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            copy_whole(optimizer.state[parameter][slot], value)
        else:
            optimizer.state[parameter][slot] = value.to(parameter.device, copy=True)
