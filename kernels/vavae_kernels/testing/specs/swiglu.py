"""`swiglu`: the gate between the two matrix products of the MLP."""

import torch

from ..._launch import Config
from ...ops.swiglu import swiglu, swiglu_reference
from ..spec import Dtypes, Inputs, Shape, Spec


def _inputs(shape: Shape, dtypes: Dtypes, variant: str, device: torch.device) -> Inputs:
    B, N, F = shape["B"], shape["N"], shape["F"]
    return dict(x12=torch.randn(B, N, 2 * F, device=device).to(dtypes.other).requires_grad_())


def _bytes(shape: Shape, dtypes: Dtypes, variant: str) -> tuple[int, int]:
    """Forward reads a, b and writes y; backward reads dy, a, b and writes da, db."""
    elements = shape["B"] * shape["N"] * shape["F"]
    return 3 * elements * dtypes.other.itemsize, 5 * elements * dtypes.other.itemsize


TILES = tuple(Config(tile, warps) for tile, warps in (((4, 512), 4), ((8, 512), 4), ((8, 512), 8), ((2, 1024), 4), ((4, 1024), 8), ((2, 512), 4)))

SPEC = Spec(
    name="swiglu",
    function=swiglu,
    reference=swiglu_reference,
    inputs=_inputs,
    gradients=("x12",),
    dtypes=("bf16", "fp32", "fp16"),  # one tensor in, one out: nothing to mix
    small={
        "two samples": dict(B=2, N=7, F=48),
        "one token": dict(B=3, N=1, F=64),
        "odd width": dict(B=1, N=5, F=37),
        "256 tokens": dict(B=1, N=256, F=16),
        "several tiles": dict(B=1, N=9, F=1100),
        "one column": dict(B=2, N=3, F=1),
        "no samples": dict(B=0, N=7, F=48),
        "no columns": dict(B=2, N=3, F=0),
    },
    real={"XL/1": dict(B=256, N=256, F=3072), "B/1": dict(B=256, N=256, F=2048), "XL/1 b32": dict(B=32, N=256, F=3072)},
    bytes=_bytes,
    registers=128,
    configs={"swiglu_fwd": TILES, "swiglu_bwd": TILES},
)
