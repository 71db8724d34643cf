"""`gate_add_norm_modulate`: the seam between two adaLN sub-layers."""

import torch

from ..._launch import Config
from ...ops.gate_add_norm_modulate import gate_add_norm_modulate, gate_add_norm_modulate_reference
from ..spec import Dtypes, Inputs, Shape, Spec


def _inputs(shape: Shape, dtypes: Dtypes, variant: str, device: torch.device) -> Inputs:
    B, N, D = shape["B"], shape["N"], shape["D"]
    modulation = torch.randn(B, 3 * D, device=device).to(dtypes.other)  # chunk views of one tensor, as the adaLN linear gives them
    gate, scale, shift = modulation.chunk(3, dim=1)
    layer = variant == "layer"
    return dict(
        residual=torch.randn(B, N, D, device=device).to(dtypes.stream).requires_grad_(),
        y=torch.randn(B, N, D, device=device).to(dtypes.other).requires_grad_(),
        gate=gate.detach().requires_grad_(),
        scale=scale.detach().requires_grad_(),
        shift=None if variant == "rms no shift" else shift.detach().requires_grad_(),
        weight=None if layer else (1 + 0.1 * torch.randn(D, device=device)).requires_grad_(),
        norm="layer" if layer else "rms",
    )


def _bytes(shape: Shape, dtypes: Dtypes, variant: str) -> tuple[int, int]:
    """A row costs D (2 s + 2 o) forward and D (3 s + 3 o) backward; the rest belongs to samples and statistics."""
    elements = shape["B"] * shape["N"] * shape["D"]
    s, o = dtypes.stream.itemsize, dtypes.other.itemsize
    return elements * (2 * s + 2 * o), elements * (3 * s + 3 * o)


SPEC = Spec(
    name="gate_add_norm_modulate",
    function=gate_add_norm_modulate,
    reference=gate_add_norm_modulate_reference,
    inputs=_inputs,
    gradients=("residual", "y", "gate", "scale", "shift", "weight"),
    variants=("rms", "rms no shift", "layer"),
    small={
        "two samples": dict(B=2, N=7, D=72),
        "one token": dict(B=3, N=1, D=40),
        "odd width": dict(B=1, N=5, D=37),
        "256 tokens": dict(B=1, N=256, D=24),
        "parts": dict(B=2, N=5, D=1152),
        "no samples": dict(B=0, N=7, D=72),
        "no tokens": dict(B=2, N=0, D=72),
    },
    real={"XL/1": dict(B=256, N=256, D=1152), "B/1": dict(B=256, N=256, D=768), "XL/1 b32": dict(B=32, N=256, D=1152)},
    bytes=_bytes,
    registers=168,
    configs={
        "adaptive_norm_fwd": tuple(Config((rows,), warps) for rows, warps in ((4, 4), (2, 4), (8, 4), (8, 8), (1, 4), (2, 2))),
        "adaptive_norm_bwd": (
            Config((1, 8), 4, 3),
            Config((1, 8), 4, 2),
            Config((1, 4), 4, 3),
            Config((1, 16), 4, 3),
            Config((2, 8), 8, 2),
            Config((1, 8), 2, 2),
        ),
    },
)
