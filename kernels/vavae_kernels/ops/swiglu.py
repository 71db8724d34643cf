"""SwiGLU gate: y = silu(a) · b with x12 = [a | b].  Shazeer 2020.

Shapes  x12 (..., 2F) -> y (..., F) in x12's dtype. Arithmetic fp32, one rounding, at the store of y.
Saved   x12.  HBM bytes a row at s bytes an element: forward 3 F s, backward 5 F s.
"""

import torch
from torch import Tensor

from .._checks import arithmetic_dtype, check, check_tensors
from .._registry import use_triton


def swiglu_reference(x12: Tensor) -> Tensor:
    """x12 (..., 2F) -> (..., F) in x12's dtype."""
    a, b = x12.to(arithmetic_dtype(x12)).chunk(2, dim=-1)
    return (a * torch.sigmoid(a) * b).to(x12.dtype)


def swiglu(x12: Tensor, impl: str = "auto") -> Tensor:
    """silu(first half) · second half over the last axis. x12 (..., 2F) -> (..., F) in x12's dtype."""
    check_tensors("swiglu", x12=x12)
    check(x12.ndim >= 1 and x12.shape[-1] % 2 == 0, "swiglu", f"x12 must be (..., 2F), got shape {tuple(x12.shape)}")
    use_triton("swiglu", impl)
    return swiglu_reference(x12)
