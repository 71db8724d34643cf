"""Fused operators in SiT (github.com/willisma/SiT): the same results, and the time before and after.

    python examples/patch_sit.py --repository SiT
    python examples/patch_sit.py --repository SiT --model SiT-XL/2 --checkpoint SiT-XL-2-256x256.pt --batch 64
"""

from pathlib import Path

import torch
from before_after import TINY, compare, from_checkout, known, options, run, twin, with_weights
from torch import Tensor, nn

from vavae_kernels import patch

BLOCKS = "blocks"


def build(repository: Path, name: str) -> nn.Module:
    """A model of the checkout by its name there, for 256 px; or "tiny"."""
    public = from_checkout(repository, "models.py")
    if name == "tiny":
        return public.SiT(**TINY)
    return public.SiT_models[known(public.SiT_models, name)](input_size=32)


def inputs(model: nn.Module, batch: int) -> dict[str, Tensor]:
    """x (B, C, H, W), the times t (B,) and classes y (B,)."""
    x = torch.randn(batch, model.in_channels, *model.x_embedder.img_size)
    return dict(x=x, t=torch.rand(batch), y=torch.arange(batch) % 10)


def main() -> None:
    given = options(__doc__, model="SiT-S/2")
    model = with_weights(build(given.repository, given.model), given.checkpoint)
    before = twin(model)  # to compare with

    handle = patch(model)
    print(handle)  # handle.report says it module by module; handle.undo() takes it back

    compare(before, model, BLOCKS, inputs(model, given.batch), given)


if __name__ == "__main__":
    run(main)
