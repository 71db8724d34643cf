"""A model as it will be used: in evaluation mode, with the averaged weights (EMA) in place of its own, for as long as one looks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vavae_fast.models.compilation import as_it_is


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode, no gradients, nothing compiled; afterwards training mode again."""
    model.eval()
    try:
        with torch.no_grad(), as_it_is(model):
            yield
    finally:
        model.train()
        _forget_gathered(model)


@contextmanager
def averaged_weights(model: nn.Module, average: dict[str, Tensor]) -> Iterator[None]:
    """Inside, `model` computes with `average` (parameter name -> tensor, as AdamWEMA's `ema_state_dict`); afterwards its parameters
    hold the bits that they held. Meanwhile these lie beside it: as much memory as the weights once more."""
    _forget_gathered(model)  # while gathered, a sharded model's parameters are others
    parameters = {name: p for name, p in model.named_parameters() if name in average}
    with torch.no_grad():
        own = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        _overwrite(model, parameters, average)
        yield
    finally:
        _overwrite(model, parameters, own)


@torch.no_grad()
def _overwrite(model: nn.Module, parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, p in parameters.items():
        p.copy_(values[name])
    _forget_gathered(model)


def _forget_gathered(model: nn.Module) -> None:
    """What FSDP has gathered of weights that changed, or without a backward pass to come, is let go: the next use gathers anew."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
