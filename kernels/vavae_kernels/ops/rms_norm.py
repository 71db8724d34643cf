"""RMS normalisation: y = x · rstd · w with rstd = 1 / sqrt(mean(x²) + eps) over the last axis.  Zhang & Sennrich 2019.

Shapes  x (..., D), weight (D,) -> y (..., D), in x's dtype. Arithmetic fp32, one rounding, at the store of y.
Saved   x, weight, rstd.  HBM bytes a row of D at s bytes an element: forward 2 D s, backward 3 D s.
"""

import torch
from torch import Tensor

from .._checks import arithmetic_dtype, check, check_eps, check_shape, check_tensors
from .._registry import use_triton
from ._adaptive_norm import adaptive_norm, why_not_kernel


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """x (..., D), weight (D,) or None -> (..., D) in x's dtype."""
    dtype = arithmetic_dtype(x, weight)
    x_wide = x.to(dtype)
    y = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """RMS normalisation over the last axis. x (..., D), weight (D,) or None -> (..., D) in x's dtype."""
    check_tensors("rms_norm", x=x, optional=dict(weight=weight))
    check_eps("rms_norm", eps)
    check(x.ndim >= 1 and x.shape[-1] > 0, "rms_norm", f"x needs a last axis that is not empty, got shape {tuple(x.shape)}")
    check_shape("rms_norm", "weight", weight, (x.shape[-1],))
    if not use_triton("rms_norm", impl, x, weight, reason=why_not_kernel(x, x.dtype)):
        return rms_norm_reference(x, weight, eps)
    rows = x.reshape(1, -1, x.shape[-1])
    return adaptive_norm(rows, None, None, None, None, weight, False, float(eps), x.dtype)[1].view(x.shape)
