"""torch.compile for LightningDiT, by region or as a whole, and for LPIPS in a tokenizer's training.

By region: one graph for a block, compiled once and shared by all blocks of a model, in seconds instead of minutes. Only `forward`
is compiled, so that hooks on a module, FSDP's among them, stay outside; keys of the state dict do not change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from vavae_fast.models.lightningdit import LightningDiT

Regions = Literal["none", "blocks", "model"]


def compile_forward(model: LightningDiT, regions: Regions, backend: str = "inductor") -> None:
    """Compile `model` in place, for fixed shapes. An error, not a slow run, where the compiler cannot take all or gives up."""
    compiled = {"none": (), "blocks": model.blocks, "model": (model,)}
    for module in compiled[regions]:
        module.forward = torch.compile(module.forward, dynamic=False, fullgraph=True, backend=backend)


def compile_in_training(network: nn.Module, backend: str = "inductor") -> None:
    """Compile a frozen network's forward in place, as one graph for fixed shapes, for the calls that are differentiated; others run as before.

    LPIPS is what this pays for: its biases, ReLUs and distances are a quarter of all bytes that a tokenizer's step moves beside its
    convolutions, and become a pass over each map. It is of no use to a network whose weights are trained: a compiled backward pass makes
    every gradient, where the one-pass step asks for the images' and the weights' apart.
    """
    as_written = network.forward
    compiled = torch.compile(as_written, dynamic=False, fullgraph=True, backend=backend)
    network.forward = lambda *images: (compiled if torch.is_grad_enabled() else as_written)(*images)


@contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is compiled: batches of many sizes, without gradients, would each want a graph and soon exceed the compiler's limit."""
    compiled = [(module, module.__dict__.pop("forward")) for module in model.modules() if "forward" in module.__dict__]
    try:
        yield
    finally:
        for module, forward in compiled:
            module.forward = forward
