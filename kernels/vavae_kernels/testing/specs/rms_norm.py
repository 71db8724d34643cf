"""`rms_norm`: the norm of other people's models, over rows as wide as a model or as narrow as a head."""

import torch

from ...ops.rms_norm import rms_norm, rms_norm_reference
from ..spec import Dtypes, Inputs, Shape, Spec


def _inputs(shape: Shape, dtypes: Dtypes, variant: str, device: torch.device) -> Inputs:
    x = torch.randn(shape["B"], shape["N"], shape["D"], device=device).to(dtypes.stream).requires_grad_()
    weight = (1 + 0.1 * torch.randn(shape["D"], device=device)).to(dtypes.other).requires_grad_()
    return dict(x=x, weight=None if variant == "no weight" else weight)


def _bytes(shape: Shape, dtypes: Dtypes, variant: str) -> tuple[int, int]:
    """A row costs 2 D s forward and 3 D s backward, and 4 bytes of statistics each way: a tenth of a narrow head."""
    rows, s = shape["B"] * shape["N"], dtypes.stream.itemsize
    return rows * (2 * shape["D"] * s + 4), rows * (3 * shape["D"] * s + 4)


SPEC = Spec(
    name="rms_norm",
    function=rms_norm,
    reference=rms_norm_reference,
    inputs=_inputs,
    gradients=("x", "weight"),
    variants=("weight", "no weight"),
    dtypes=("bf16", "fp32", "fp16", "mixed"),
    small={
        "one sample": dict(B=1, N=7, D=72),
        "three samples": dict(B=3, N=1, D=40),
        "odd width": dict(B=1, N=5, D=37),
        "256 tokens": dict(B=1, N=256, D=24),
        "parts": dict(B=2, N=3, D=1152),
        "no samples": dict(B=0, N=7, D=72),
    },
    real={"XL/1": dict(B=256, N=256, D=1152), "B/1": dict(B=256, N=256, D=768), "XL/1 heads": dict(B=256, N=8192, D=72)},
    bytes=_bytes,
    registers=168,
)
