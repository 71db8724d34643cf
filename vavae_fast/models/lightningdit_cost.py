"""What a LightningDiT costs before it is built: parameters, FLOPs and activations, counted by PyTorch itself.

A config is a dict of LightningDiT's arguments; nothing is allocated for a config or for a model.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vavae_fast.errors import require
from vavae_fast.models.activation_checkpointing import Checkpointing, is_kept
from vavae_fast.models.lightningdit import LightningDiT
from vavae_kernels.testing.traffic import kernels_recorded


def parameter_count(model_or_config: LightningDiT | dict) -> int:
    """Number of parameters, the fixed position table included: 675.26 M for XL/1 on 32 channels of 16 x 16."""
    with torch.device("meta"):
        return sum(p.numel() for p in _build(model_or_config).parameters())


def flops_per_image(model_or_config: LightningDiT | dict) -> int:
    """Floating-point operations (2 for a multiply-add) of one forward pass of one image; training is three times that.

    Counted by PyTorch: matrix products, convolution and attention. XL/1 on 32 channels of 16 x 16: 237.3e9.
    """
    with torch.device("meta"):
        model = _build(model_or_config)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*_inputs(model, 1))
    return counter.get_total_flops()


def training_bytes(
    model_or_config: LightningDiT | dict,
    micro_batch: int,
    accumulating: bool = False,
    precision: str = "bf16",
    checkpointing: Checkpointing = False,
    shards: int = 1,
) -> int:
    """Bytes on a GPU at the fullest moment of a training step: what --dry-run prints, and PyTorch's peak without its unused reserve.

    States are fp32: weights, two moments, average, each divided by `shards`. Gradients meet the activations at their fullest only
    where micro-batches accumulate; otherwise they replace them block by block, down to the first. Autocast keeps a bf16 copy of every weight for
    backward, with checkpointing of one block's. Gradients of activations take the place of what they were computed from.
    """
    parameters = parameter_count(model_or_config)
    with torch.device("meta"):
        depth = _build(model_or_config).depth
    activations = micro_batch * activation_bytes_per_image(model_or_config, precision, checkpointing)
    copies = 2 * parameters // (depth if checkpointing else 1) if precision == "bf16" else 0
    states, gradients = 16 * parameters // shards, 4 * parameters // shards
    last_block = micro_batch * _saved_per_image(model_or_config, precision, False)[1]
    fullest = gradients + activations if accumulating else max(activations, gradients + last_block)
    return states + copies + fullest


def activation_bytes_per_image(model_or_config: LightningDiT | dict, precision: str = "bf16", checkpointing: Checkpointing = False) -> int:
    """Bytes that a training step keeps for backward, per image: what --dry-run multiplies by the micro-batch.

    Counted, not modelled: the tensors that autograd and selective checkpointing keep in a forward pass on fake tensors, for
    one and two images and one and two blocks; the differences leave out what does not grow with the batch. precision "bf16"
    (autocast) or "fp32". With checkpointing, one block at a time has all of its activations. Attention is counted as on a CPU,
    which saves what a flash kernel saves.
    """
    require(precision in ("bf16", "fp32"), "precision", precision, "bf16 or fp32")
    with torch.device("meta"):
        depth = _build(model_or_config).depth
    outside, block = _saved_per_image(model_or_config, precision, checkpointing)
    recomputed = _saved_per_image(model_or_config, precision, False)[1] - block if checkpointing else 0
    return outside + depth * block + recomputed


def _saved_per_image(model_or_config: LightningDiT | dict, precision: str, checkpointing: Checkpointing) -> tuple[int, int]:
    """Bytes kept outside of the blocks, and in one block."""
    one, two = (
        _saved_bytes(model_or_config, depth, 2, precision, checkpointing) - _saved_bytes(model_or_config, depth, 1, precision, checkpointing)
        for depth in (1, 2)
    )
    return 2 * one - two, two - one


def _build(model_or_config: LightningDiT | dict, **changes) -> LightningDiT:
    """The same model anew, on the default device of the moment."""
    config = model_or_config.config if isinstance(model_or_config, LightningDiT) else model_or_config
    return LightningDiT(**{**config, **changes})


def _inputs(model: LightningDiT, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    side = model.input_size
    return torch.empty(batch, model.in_channels, side, side), torch.empty(batch), torch.zeros(batch, dtype=torch.long)


class _Kept(TorchDispatchMode):
    """The distinct storages that autograd saves, and those that selective checkpointing keeps."""

    def __init__(self, selective: bool):
        super().__init__()
        self.selective, self.storages = selective, {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.selective and is_kept(func):
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, Tensor):
                    self.add(tensor)
        return out


def _saved_bytes(model_or_config: LightningDiT | dict, depth: int, batch: int, precision: str, checkpointing: Checkpointing) -> int:
    """Bytes kept after a forward pass, weights included."""
    with FakeTensorMode():
        model = _build(model_or_config, depth=depth, use_checkpoint=checkpointing)
        kept = _Kept(checkpointing == "selective")
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with saved_tensors_hooks(kept.add, lambda tensor: tensor), kernels_recorded(), autocast, kept:
            out = model(*_inputs(model, batch))
        total = sum(storage.nbytes() for storage in kept.storages.values())
        del out
    return total
