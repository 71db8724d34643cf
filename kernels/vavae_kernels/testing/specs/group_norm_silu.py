"""`group_norm_silu`: what stands between the convolutions of the tokenizer."""

import torch

from ..._launch import Config
from ...ops.group_norm_silu import group_norm_silu, group_norm_silu_reference
from ..spec import Dtypes, Inputs, Shape, Spec


def _inputs(shape: Shape, dtypes: Dtypes, variant: str, device: torch.device) -> Inputs:
    """Images in the dtype of the convolutions, weight and bias in that of the parameters."""
    B, C, H, W = (shape[axis] for axis in "BCHW")
    x = (0.5 + 2 * torch.randn(B, C, H, W, device=device)).to(dtypes.other)
    if variant != "nchw":
        x = x.contiguous(memory_format=torch.channels_last)
    return dict(
        x=x.requires_grad_(),
        num_groups=shape["G"],
        weight=(1 + 0.1 * torch.randn(C, device=device)).to(dtypes.stream).requires_grad_(),
        bias=(0.1 * torch.randn(C, device=device)).to(dtypes.stream).requires_grad_(),
        silu=variant != "no silu",
    )


def _bytes(shape: Shape, dtypes: Dtypes, variant: str) -> tuple[int, int]:
    """Forward reads x for the statistics, x again and writes y; backward reads x, dy for the sums, both again and writes dx."""
    elements = shape["B"] * shape["C"] * shape["H"] * shape["W"]
    return 3 * elements * dtypes.other.itemsize, 5 * elements * dtypes.other.itemsize


APPLIED = ((32, 128), 8), ((16, 128), 4), ((32, 128), 4), ((64, 128), 8), ((64, 64), 8)

SPEC = Spec(
    name="group_norm_silu",
    function=group_norm_silu,
    reference=group_norm_silu_reference,
    inputs=_inputs,
    gradients=("x", "weight", "bias"),
    variants=("channels-last", "no silu", "nchw"),
    small={
        "groups of 4": dict(B=2, C=8, H=5, W=7, G=2),
        "3 groups of 5": dict(B=2, C=15, H=3, W=4, G=3),
        "groups of 16": dict(B=1, C=64, H=8, W=8, G=4),
        "several parts": dict(B=1, C=132, H=11, W=12, G=2),
        "one pixel": dict(B=1, C=12, H=1, W=1, G=3),
        "one group": dict(B=2, C=6, H=3, W=3, G=1),
        "a group a channel": dict(B=1, C=3, H=4, W=5, G=3),
        "no samples": dict(B=0, C=8, H=5, W=7, G=2),
    },
    real={
        "128x256x256 b32": dict(B=32, C=128, H=256, W=256, G=32),
        "256x128x128 b32": dict(B=32, C=256, H=128, W=128, G=32),
        "512x16x16 b32": dict(B=32, C=512, H=16, W=16, G=32),
    },
    bytes=_bytes,
    registers=168,
    configs={
        "group_norm_moments": (
            Config((16, 128, 4), 4, 4),
            Config((16, 128, 7), 4, 3),
            Config((16, 128, 4), 4, 3),
            Config((32, 64, 4), 4, 4),
            Config((32, 128, 4), 8, 3),
        ),
        "group_norm_apply": tuple(Config(tile, warps) for tile, warps in APPLIED),
        "group_norm_sums": (
            Config((16, 128, 4), 4, 3),
            Config((16, 128, 8), 4, 3),
            Config((16, 128, 4), 4, 2),
            Config((32, 64, 4), 4, 3),
            Config((32, 128, 4), 8, 3),
        ),
        "group_norm_dx": tuple(Config(tile, warps) for tile, warps in APPLIED),
    },
)
