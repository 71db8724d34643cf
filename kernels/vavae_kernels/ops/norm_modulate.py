"""Adaptive normalisation of DiT: y = norm(x) · (1 + scale_b) + shift_b.  Peebles & Xie 2023, section 3.2 (adaLN).

norm "rms"    norm(x) = x / sqrt(mean(x²) + eps) · w            LightningDiT
norm "layer"  norm(x) = (x - mean) / sqrt(var + eps) · w        DiT, SiT (there without w)

Shapes  x (B, N, D); scale, shift (B, D), each may be a chunk view of one (B, 6 D) tensor; weight (D,) -> y (B, N, D).
Dtypes  any mixture: an fp32 residual stream with bf16 modulation gives bf16. Arithmetic fp32, one rounding, at the store.
Saved   x, scale, weight, rstd and mean (B, N).
HBM bytes a row of D, x at s and y at o bytes: forward D (s + o), backward D (2 s + o); statistics and modulation come on top.

The kernels are those of `_adaptive_norm.py`, which `rms_norm` and `gate_add_norm_modulate` share.
"""

import torch
from torch import Tensor

from .._checks import arithmetic_dtype, check, check_eps, check_out_dtype, check_shape, check_tensors
from .._registry import use_triton
from ._adaptive_norm import adaptive_norm, why_not_kernel

NORMS = ("rms", "layer")


def normalized(x: Tensor, weight: Tensor | None, norm: str, eps: float) -> Tensor:
    """x (..., D) over its last axis, in x's dtype: the caller has promoted it."""
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight.to(x.dtype)


def modulated(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """x (B, N, D) · (1 + scale (B, D)) + shift (B, D), in x's dtype."""
    x = x * (1 + scale.to(x.dtype).unsqueeze(1))
    return x if shift is None else x + shift.to(x.dtype).unsqueeze(1)


def norm_modulate_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x (B, N, D), scale, shift (B, D), weight (D,) -> (B, N, D) in out_dtype, else scale's dtype."""
    x_wide = x.to(arithmetic_dtype(x, scale, shift, weight))
    return modulated(normalized(x_wide, weight, norm, eps), scale, shift).to(out_dtype or scale.dtype)


def norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """norm(x) · (1 + scale) + shift, per sample. x (B, N, D), scale, shift (B, D), weight (D,) -> (B, N, D).

    norm is "rms" or "layer"; the result is in `out_dtype`, by default scale's dtype.
    """
    op = "norm_modulate"
    check_tensors(op, x=x, scale=scale, optional=dict(shift=shift, weight=weight))
    check_adaln(op, x, {"scale": scale, "shift": shift}, weight, norm, eps, out_dtype)
    out_dtype = out_dtype or scale.dtype
    if not use_triton(op, impl, x, scale, shift, weight, reason=why_not_kernel(x, out_dtype)):
        return norm_modulate_reference(x, scale, shift, weight, norm, eps, out_dtype)
    return adaptive_norm(x, None, None, scale, shift, weight, norm == "layer", float(eps), out_dtype)[1]


def check_adaln(
    op: str,
    x: Tensor,
    modulation: dict[str, Tensor | None],
    weight: Tensor | None,
    norm: str,
    eps: float,
    out_dtype: torch.dtype | None,
) -> None:
    """x (B, N, D), every modulation (B, D), weight (D,), a known norm, eps a number, out_dtype floating."""
    check(norm in NORMS, op, f"norm must be 'rms' or 'layer', got {norm!r}")
    check(x.ndim == 3 and x.shape[-1] > 0, op, f"x must be (B, N, D) with D > 0, got shape {tuple(x.shape)}")
    check_eps(op, eps)
    check_out_dtype(op, out_dtype)
    for name, tensor in modulation.items():
        check_shape(op, name, tensor, (x.shape[0], x.shape[2]))
    check_shape(op, "weight", weight, (x.shape[2],))
