"""The straight path of flow matching: x_t = (1 - t) x0 + t x1, x0 noise, x1 data.  Lipman et al. 2023; Liu et al. 2023.

Shapes  x0, x1 (B, ...), t (B,) -> (B, ...) in x1's dtype. Arithmetic fp32, one rounding, at the store.
Saved   x0, x1, t.  HBM bytes an element at s bytes: forward 3 s, backward 3 s.
"""

from torch import Tensor

from .._checks import arithmetic_dtype, check, check_shape, check_tensors
from .._registry import use_triton


def flow_interpolate_reference(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """x0, x1 (B, ...), t (B,) -> (B, ...) in x1's dtype."""
    dtype = arithmetic_dtype(x0, x1, t)
    t = t.to(dtype).view(-1, *[1] * (x1.ndim - 1))
    return ((1 - t) * x0.to(dtype) + t * x1.to(dtype)).to(x1.dtype)


def flow_interpolate(x0: Tensor, x1: Tensor, t: Tensor, impl: str = "auto") -> Tensor:
    """(1 - t) x0 + t x1. x0 noise, x1 data (B, ...), t (B,) -> (B, ...) in x1's dtype."""
    op = "flow_interpolate"
    check_tensors(op, x0=x0, x1=x1, t=t)
    check(x1.ndim >= 1, op, "x1 must be (B, ...)")
    check_shape(op, "x0", x0, tuple(x1.shape))
    check_shape(op, "t", t, (x1.shape[0],))
    use_triton(op, impl)
    return flow_interpolate_reference(x0, x1, t)
