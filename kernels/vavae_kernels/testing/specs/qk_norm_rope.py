"""`qk_norm_rope`: attention's prologue on packed qkv."""

import torch

from ..._launch import Config
from ...ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from ..spec import Dtypes, Inputs, Shape, Spec

AFFINE = ("q_weight", "k_weight", "q_bias", "k_bias")


def packed_inputs(shape: Shape, dtypes: Dtypes, variant: str, device: torch.device) -> Inputs:
    """qkv is what a matrix product gives; weights and tables are parameters and buffers, in the stream's dtype.

    The variant's words: "rope", "rms" or "layer", and "no affine" for a norm without weight and bias.
    """
    B, N, H, D = (shape[axis] for axis in ("B", "N", "H", "D"))
    words = variant.split()
    norm = next((kind for kind in ("rms", "layer") if kind in words), None)
    angle = torch.outer(torch.arange(N, device=device), torch.rand(D // 2, device=device)).repeat_interleave(2, dim=1)
    inputs = dict(
        qkv=torch.randn(B, N, 3, H, D, device=device).to(dtypes.other).requires_grad_(),
        cos=angle.cos().to(dtypes.stream) if "rope" in words else None,
        sin=angle.sin().to(dtypes.stream) if "rope" in words else None,
        norm=norm,
    )
    for name in AFFINE[: {None: 0, "rms": 2, "layer": 4}[norm]]:
        mean = 0.0 if name.endswith("bias") else 1.0
        inputs[name] = (mean + 0.1 * torch.randn(D, device=device)).to(dtypes.stream).requires_grad_()
    if "no" in words:  # a norm without affine parameters
        inputs |= dict.fromkeys(AFFINE)
    return inputs


def _bytes(shape: Shape, dtypes: Dtypes, variant: str) -> tuple[int, int]:
    """U = q once. Forward reads and writes q and k; backward reads dq, dk, dv, with a norm q and k too, and writes dqkv."""
    unit = shape["B"] * shape["N"] * shape["H"] * shape["D"] * dtypes.other.itemsize
    return 4 * unit, (6 if variant == "rope" else 8) * unit


SPEC = Spec(
    name="qk_norm_rope",
    function=qk_norm_rope,
    reference=qk_norm_rope_reference,
    inputs=packed_inputs,
    gradients=("qkv", *AFFINE),
    variants=("rope", "rms rope", "layer rope", "layer no affine"),
    small={
        "two samples": dict(B=2, N=3, H=3, D=72),
        "one token": dict(B=3, N=1, H=2, D=8),
        "two pairs": dict(B=1, N=2, H=1, D=4),
        "odd parts": dict(B=2, N=2, H=20, D=36),
        "no samples": dict(B=0, N=7, H=3, D=72),
        "no tokens": dict(B=2, N=0, H=3, D=72),
    },
    real={
        "XL/1": dict(B=256, N=256, H=16, D=72),
        "B/1": dict(B=256, N=256, H=12, D=64),
        "XL/1 b32": dict(B=32, N=256, H=16, D=72),
    },
    bytes=_bytes,
    registers=224,
    configs={
        "qk_norm_rope_fwd": tuple(Config((rows,), warps) for rows, warps in ((16, 1), (8, 1), (32, 1), (32, 2), (64, 4))),
        "qk_norm_rope_bwd": tuple(
            Config((rows, programs), warps, stages)
            for rows, programs, warps, stages in ((32, 32, 4, 1), (16, 32, 4, 1), (16, 32, 2, 1), (16, 32, 2, 2), (16, 32, 1, 1), (32, 16, 4, 1))
        ),
    },
)
