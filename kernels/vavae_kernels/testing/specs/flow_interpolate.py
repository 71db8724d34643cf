"""`flow_interpolate`: the state at time t between noise and data."""

import math

import torch

from ..._launch import Config
from ...ops.flow_interpolate import flow_interpolate, flow_interpolate_reference
from ..spec import Dtypes, Inputs, Shape, Spec


def _inputs(shape: Shape, dtypes: Dtypes, variant: str, device: torch.device) -> Inputs:
    """Data in the stream's dtype, noise in the other's, and all gradients; training asks for none."""
    size = tuple(shape.values())
    return dict(
        x0=torch.randn(size, device=device).to(dtypes.other).requires_grad_(),
        x1=torch.randn(size, device=device).to(dtypes.stream).requires_grad_(),
        t=torch.rand(size[:1], device=device).to(dtypes.stream).requires_grad_(),
    )


def _bytes(shape: Shape, dtypes: Dtypes, variant: str) -> tuple[int, int]:
    """Forward reads both and writes x_t; backward reads the cotangent, and both again for t, and writes dx0 and dx1."""
    elements = math.prod(shape.values())
    s, o = dtypes.stream.itemsize, dtypes.other.itemsize
    return elements * (2 * s + o), elements * (3 * s + 2 * o)


TILES = tuple(Config((P,), warps) for P, warps in ((2048, 4), (1024, 4), (4096, 8), (512, 4)))

SPEC = Spec(
    name="flow_interpolate",
    function=flow_interpolate,
    reference=flow_interpolate_reference,
    inputs=_inputs,
    gradients=("x0", "x1", "t"),
    dtypes=("fp32", "mixed", "bf16", "fp16"),
    small={
        "latents": dict(B=3, C=4, H=5, W=7),
        "several programs": dict(B=2, C=32, H=16, W=9),
        "one sample": dict(B=1, C=1, H=1, W=1),
        "numbers": dict(B=5),
        "tokens": dict(B=2, N=256, D=3),
        "no samples": dict(B=0, C=4, H=5, W=7),
        "no pixels": dict(B=2, C=4, H=0, W=7),
    },
    real={"f16d32 b256": dict(B=256, C=32, H=16, W=16), "f16d32 b32": dict(B=32, C=32, H=16, W=16)},
    bytes=_bytes,
    registers=64,
    configs={"flow_interpolate_fwd": TILES, "flow_interpolate_bwd": TILES},
)
