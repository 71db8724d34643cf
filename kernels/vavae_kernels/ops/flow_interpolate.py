"""The straight path of flow matching: x_t = (1 - t) x0 + t x1, x0 noise, x1 data.  Lipman et al. 2023; Liu et al. 2023.

    dx0 = (1 - t) dx_t,   dx1 = t dx_t,   dt_b = Σ dx_t (x1 - x0)

Shapes  x0, x1 (B, ...), t (B,) -> (B, ...) in x1's dtype. Arithmetic fp32, one rounding, at each store.
Saved   t, and x0, x1 where t requires grad.
HBM bytes an element at s bytes: forward 3 s, backward 3 s; with the gradient of t 5 s. One not asked for is not written.
"""

import torch
from torch import Tensor

from .._checks import arithmetic_dtype, check, check_shape, check_tensors
from .._compat import tl, triton
from .._launch import Config, cdiv, choose, launch
from .._registry import register, use_triton
from ._layout import memory_format


def flow_interpolate_reference(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """x0, x1 (B, ...), t (B,) -> (B, ...) in x1's dtype."""
    dtype = arithmetic_dtype(x0, x1, t)
    t = t.to(dtype).view(-1, *[1] * (x1.ndim - 1))
    return ((1 - t) * x0.to(dtype) + t * x1.to(dtype)).to(x1.dtype)


@triton.jit
def flow_interpolate_fwd(x0, x1, t, x_t, N, t_b, P: tl.constexpr):
    """One program: P of the N elements of one sample."""
    b, offset_P, in_P = _part(N, P)
    time = tl.load(t + b * t_b).to(tl.float32)
    x0_P = tl.load(x0 + offset_P, mask=in_P, other=0.0).to(tl.float32)
    x1_P = tl.load(x1 + offset_P, mask=in_P, other=0.0).to(tl.float32)
    tl.store(x_t + offset_P, ((1.0 - time) * x0_P + time * x1_P).to(x_t.dtype.element_ty), mask=in_P)


@triton.jit
def flow_interpolate_bwd(dx_t, t, x0, x1, dx0, dx1, dt_parts, N, t_b, P: tl.constexpr):
    """One program: P of the N elements of one sample; dt_parts (B, programs a sample)."""
    b, offset_P, in_P = _part(N, P)
    time = tl.load(t + b * t_b).to(tl.float32)
    g_P = tl.load(dx_t + offset_P, mask=in_P, other=0.0).to(tl.float32)
    if dt_parts is not None:
        x0_P = tl.load(x0 + offset_P, mask=in_P, other=0.0).to(tl.float32)
        x1_P = tl.load(x1 + offset_P, mask=in_P, other=0.0).to(tl.float32)
        tl.store(dt_parts + tl.program_id(0), tl.sum(g_P * (x1_P - x0_P), 0))
    if dx0 is not None:
        tl.store(dx0 + offset_P, ((1.0 - time) * g_P).to(dx0.dtype.element_ty), mask=in_P)
    if dx1 is not None:
        tl.store(dx1 + offset_P, (time * g_P).to(dx1.dtype.element_ty), mask=in_P)


@triton.jit
def _part(N, P: tl.constexpr):
    """This program's sample, the offsets of its elements (int64), and which of them exist."""
    parts = tl.cdiv(N, P)
    b = (tl.program_id(0) // parts).to(tl.int64)
    n_P = (tl.program_id(0) % parts).to(tl.int64) * P + tl.arange(0, P)
    return b, b * N + n_P, n_P < N


def _forward(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    x_t = _forward_outputs(x0, x1, t)
    layout = memory_format(x1)
    x0, x1 = x0.contiguous(memory_format=layout), x1.contiguous(memory_format=layout)
    N = x1[:1].numel()
    config = choose("flow_interpolate_fwd", (N, x0.dtype, x1.dtype), Config((2048,)), x1.device)
    (P,) = config.tile
    launch(flow_interpolate_fwd, (x1.shape[0] * cdiv(N, P),), x0, x1, t, x_t, N, t.stride(0), P=P, config=config)
    return x_t


def _forward_outputs(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    return torch.empty_like(x1, memory_format=memory_format(x1))


def _backward(
    dx_t: Tensor, t: Tensor, x0: Tensor | None, x1: Tensor | None, x0_dtype: torch.dtype | None, x1_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx0, dx1, dt (fp32); empty are those of a dtype that is None, and dt without x0 and x1."""
    outputs = _backward_outputs(dx_t, t, x0, x1, x0_dtype, x1_dtype)
    dx0, dx1, dt = outputs
    layout = memory_format(dx_t)
    dx_t, x0, x1 = (None if x is None else x.contiguous(memory_format=layout) for x in (dx_t, x0, x1))
    B, N = dx_t.shape[0], dx_t[:1].numel()
    config = choose("flow_interpolate_bwd", (N, dx_t.dtype), Config((2048,)), dx_t.device)
    (P,) = config.tile
    parts = None if x0 is None else dt.new_empty((B, cdiv(N, P)))
    launch(
        flow_interpolate_bwd, (B * cdiv(N, P),),
        dx_t, t, x0, x1, None if x0_dtype is None else dx0, None if x1_dtype is None else dx1, parts, N, t.stride(0), P=P, config=config,
    )  # fmt: skip
    if parts is not None:
        torch.sum(parts, 1, out=dt)
    return outputs


def _backward_outputs(
    dx_t: Tensor, t: Tensor, x0: Tensor | None, x1: Tensor | None, x0_dtype: torch.dtype | None, x1_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    def gradient(dtype: torch.dtype | None) -> Tensor:
        return dx_t.new_empty(0) if dtype is None else torch.empty_like(dx_t, dtype=dtype, memory_format=memory_format(dx_t))

    return gradient(x0_dtype), gradient(x1_dtype), t.new_empty(0 if x0 is None else t.shape, dtype=torch.float32)


_forward_op = register("flow_interpolate_fwd", "(Tensor x0, Tensor x1, Tensor t) -> Tensor", _forward, _forward_outputs)
_backward_op = register(
    "flow_interpolate_bwd",
    "(Tensor dx_t, Tensor t, Tensor? x0, Tensor? x1, ScalarType? x0_dtype, ScalarType? x1_dtype) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_outputs,
)


class _FlowInterpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0, x1, t):
        of_x0, of_x1, of_t = ctx.needs_input_grad
        ctx.save_for_backward(t, *((x0, x1) if of_t else (None, None)))
        ctx.dtypes = x0.dtype if of_x0 else None, x1.dtype if of_x1 else None
        return _forward_op(x0, x1, t)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dx_t):
        t, x0, x1 = ctx.saved_tensors
        dx0, dx1, dt = _backward_op(dx_t, t, x0, x1, *ctx.dtypes)
        of_x0, of_x1, of_t = ctx.needs_input_grad
        return dx0 if of_x0 else None, dx1 if of_x1 else None, dt.to(t.dtype) if of_t else None


def flow_interpolate(x0: Tensor, x1: Tensor, t: Tensor, impl: str = "auto") -> Tensor:
    """(1 - t) x0 + t x1. x0 noise, x1 data (B, ...), t (B,) -> (B, ...) in x1's dtype."""
    op = "flow_interpolate"
    check_tensors(op, x0=x0, x1=x1, t=t)
    check(x1.ndim >= 1, op, "x1 must be (B, ...)")
    check_shape(op, "x0", x0, tuple(x1.shape))
    check_shape(op, "t", t, (x1.shape[0],))
    return _FlowInterpolate.apply(x0, x1, t) if use_triton(op, impl, x0, x1, t) else flow_interpolate_reference(x0, x1, t)
