"""The seam between two adaLN sub-layers in one pass: r' = r + gate_b · y and norm(r') · (1 + scale_b) + shift_b.

Peebles & Xie 2023, section 3.2 (adaLN-Zero). The gate closes one sub-layer, the norm opens the next, also across the
border of two blocks. The norm reads r' before it is rounded to the residual's dtype.

Shapes  residual, y (B, N, D); gate, scale, shift (B, D), each may be a chunk view of one (B, 6 D) tensor; weight (D,)
        -> new_residual (B, N, D) in residual's dtype, out (B, N, D) in out_dtype, else y's dtype.
Dtypes  any mixture: the residual stream is fp32 under autocast, the next GEMM wants bf16. Arithmetic fp32, one rounding
        at each store.
Saved   residual, y, gate, scale, weight, rstd (and mean).  HBM bytes a row of D, residual at s and y, out at o bytes:
        forward D (2 s + 2 o), backward D (3 s + 3 o).
"""

import torch
from torch import Tensor

from .._checks import arithmetic_dtype, check_shape, check_tensors
from .._registry import use_triton
from ._adaptive_norm import adaptive_norm, why_not_kernel
from .norm_modulate import check_adaln, modulated, normalized


def gate_add_norm_modulate_reference(
    residual: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """residual, y (B, N, D), gate, scale, shift (B, D), weight (D,) -> new_residual, out, both (B, N, D)."""
    dtype = arithmetic_dtype(residual, y, gate, scale, shift, weight)
    stream = residual.to(dtype) + gate.to(dtype).unsqueeze(1) * y.to(dtype)
    out = modulated(normalized(stream, weight, norm, eps), scale, shift)
    return stream.to(residual.dtype), out.to(out_dtype or y.dtype)


def gate_add_norm_modulate(
    residual: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """r' = residual + gate · y, and norm(r') · (1 + scale) + shift. residual, y (B, N, D), gate, scale, shift (B, D).

    Returns new_residual (B, N, D) in residual's dtype and out (B, N, D) in `out_dtype`, by default y's dtype.
    """
    op = "gate_add_norm_modulate"
    check_tensors(op, residual=residual, y=y, gate=gate, scale=scale, optional=dict(shift=shift, weight=weight))
    check_adaln(op, residual, {"gate": gate, "scale": scale, "shift": shift}, weight, norm, eps, out_dtype)
    check_shape(op, "y", y, tuple(residual.shape))
    out_dtype = out_dtype or y.dtype
    if use_triton(op, impl, residual, y, gate, scale, shift, weight, reason=why_not_kernel(residual, out_dtype)):
        return adaptive_norm(residual, y, gate, scale, shift, weight, norm == "layer", float(eps), out_dtype)
    return gate_add_norm_modulate_reference(residual, y, gate, scale, shift, weight, norm, eps, out_dtype)
