"""What a LightningDiT costs before it is built: parameters, FLOPs and activations, counted by PyTorch itself.

A config is a dict of LightningDiT's arguments; nothing is allocated for a config or for a model.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from vavae_fast.errors import require
from vavae_fast.models.lightningdit import LightningDiT


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


def activation_bytes_per_image(model_or_config: LightningDiT | dict, precision: str = "bf16", checkpointing: bool = False) -> int:
    """Bytes that a training step keeps for backward, per image: what --dry-run multiplies by the micro-batch.

    Counted, not modelled: the tensors that autograd saves in a forward pass on fake tensors, for one and two images and
    one and two blocks; the differences leave out what does not grow with the batch. precision "bf16" (autocast) or "fp32".
    With checkpointing, each block keeps its input and one block at a time its activations. Attention is counted as on a
    CPU, which saves what a flash kernel saves.
    """
    require(precision in ("bf16", "fp32"), "precision", precision, "bf16 or fp32")
    one, two = (_saved_bytes(model_or_config, depth, 2, precision) - _saved_bytes(model_or_config, depth, 1, precision) for depth in (1, 2))
    block = two - one
    outside = one - block
    with torch.device("meta"):
        model = _build(model_or_config)
    if not checkpointing:
        return outside + model.depth * block
    fp32, narrow = 4, 2 if precision == "bf16" else 4
    block_input = model.pos_embed.numel() * (fp32 + narrow if model.fused else fp32)  # the residual; the fused chain carries y beside it
    return outside + model.depth * block_input + block


def _build(model_or_config: LightningDiT | dict, **changes) -> LightningDiT:
    """The same model anew, on the default device of the moment."""
    config = model_or_config.config if isinstance(model_or_config, LightningDiT) else model_or_config
    return LightningDiT(**{**config, **changes})


def _inputs(model: LightningDiT, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    side = model.input_size
    return torch.empty(batch, model.in_channels, side, side), torch.empty(batch), torch.zeros(batch, dtype=torch.long)


def _saved_bytes(model_or_config: LightningDiT | dict, depth: int, batch: int, precision: str) -> int:
    """Bytes of the distinct storages that autograd keeps after a forward pass, weights included."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        model = _build(model_or_config, depth=depth, use_checkpoint=False)
        with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model(*_inputs(model, batch))
        total = sum(storage.nbytes() for storage in kept.values())
        del out
    return total
