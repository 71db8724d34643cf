"""Fused operators in REPA (github.com/sihyun-yu/REPA): the same results, and the time before and after.

    python examples/patch_repa.py --repository REPA
    python examples/patch_repa.py --repository REPA --model SiT-XL/2 --checkpoint last.pt --batch 64

Its projectors are linear layers and SiLU, of which nothing is to be fused; they run as they are.
"""

from pathlib import Path

import torch
from before_after import TINY, compare, from_checkout, known, options, run, twin, with_weights
from torch import Tensor, nn

from vavae_kernels import patch

BLOCKS = "blocks"
ENCODER_DEPTH = 8  # after so many blocks the projectors look in
PUBLISHED = dict(encoder_depth=ENCODER_DEPTH, z_dims=[768], use_cfg=True, fused_attn=True, qk_norm=False)
SMALL = dict(decoder_hidden_size=32, encoder_depth=1, z_dims=[8], projector_dim=16, use_cfg=True, fused_attn=True, qk_norm=False)


def build(repository: Path, name: str) -> nn.Module:
    """A model of the checkout by its name there, for 256 px and DINOv2-B, as published; or "tiny"."""
    public = from_checkout(repository, "models/sit.py")
    if name == "tiny":
        return public.SiT(**TINY, **SMALL)
    return public.SiT_models[known(public.SiT_models, name)](input_size=32, num_classes=1000, **PUBLISHED)


def present_name(key: str) -> str:
    """Of a weight in a checkpoint that its generate.py takes with --legacy: the later blocks are counted from zero."""
    first, _, rest = key.partition(".")
    if first != "decoder_blocks":
        return key
    number, _, rest = rest.partition(".")
    return f"blocks.{int(number) + ENCODER_DEPTH}.{rest}"


def inputs(model: nn.Module, batch: int) -> dict[str, Tensor]:
    """x (B, C, H, W), the times t (B,) and classes y (B,)."""
    x = torch.randn(batch, model.in_channels, *model.x_embedder.img_size)
    return dict(x=x, t=torch.rand(batch), y=torch.arange(batch) % 10)


def main() -> None:
    given = options(__doc__, model="SiT-B/2")
    model = with_weights(build(given.repository, given.model), given.checkpoint, rename=present_name)
    before = twin(model)  # to compare with

    handle = patch(model)
    print(handle)  # handle.report says it module by module; handle.undo() takes it back

    compare(before, model, BLOCKS, inputs(model, given.batch), given)


if __name__ == "__main__":
    run(main)
