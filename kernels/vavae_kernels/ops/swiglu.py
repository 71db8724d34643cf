"""SwiGLU gate: y = silu(a) · b with x12 = [a | b].  Shazeer 2020.

    s = sigmoid(a),   y = a s b
    db = dy · a s,    da = dy · b s (1 + a (1 - s))

Shapes  x12 (..., 2F) -> y (..., F) in x12's dtype. Arithmetic fp32, one rounding at each store.
Saved   x12: backward computes s again.  HBM bytes a row at s bytes an element: forward 3 F s, backward 5 F s.
"""

import math

import torch
from torch import Tensor

from .._checks import arithmetic_dtype, check, check_tensors
from .._compat import tl, triton
from .._launch import Config, cdiv, choose, inner_contiguous, launch
from .._registry import register, use_triton


def swiglu_reference(x12: Tensor) -> Tensor:
    """x12 (..., 2F) -> (..., F) in x12's dtype."""
    a, b = x12.to(arithmetic_dtype(x12)).chunk(2, dim=-1)
    return (a * torch.sigmoid(a) * b).to(x12.dtype)


@triton.jit
def swiglu_fwd(x12, y, N, x12_n, F, R: tl.constexpr, P: tl.constexpr):
    """One program: R rows of P columns of y."""
    row_R, f_P, in_RP = _tile(N, F, R, P)
    a_RP = x12 + row_R[:, None] * x12_n + f_P[None, :]
    a = tl.load(a_RP, mask=in_RP, other=0.0).to(tl.float32)
    b = tl.load(a_RP + F, mask=in_RP, other=0.0).to(tl.float32)
    tl.store(y + row_R[:, None] * F + f_P[None, :], (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), mask=in_RP)


@triton.jit
def swiglu_bwd(dy, x12, dx12, N, dy_n, x12_n, F, R: tl.constexpr, P: tl.constexpr):
    """One program: R rows of P columns of dy, and of both halves of dx12."""
    row_R, f_P, in_RP = _tile(N, F, R, P)
    a_RP = x12 + row_R[:, None] * x12_n + f_P[None, :]
    a = tl.load(a_RP, mask=in_RP, other=0.0).to(tl.float32)
    b = tl.load(a_RP + F, mask=in_RP, other=0.0).to(tl.float32)
    g = tl.load(dy + row_R[:, None] * dy_n + f_P[None, :], mask=in_RP, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    da_RP = dx12 + row_R[:, None] * (2 * F) + f_P[None, :]
    tl.store(da_RP, (g * b * s * (1.0 + a * (1.0 - s))).to(dx12.dtype.element_ty), mask=in_RP)
    tl.store(da_RP + F, (g * a * s).to(dx12.dtype.element_ty), mask=in_RP)


@triton.jit
def _tile(N, F, R: tl.constexpr, P: tl.constexpr):
    """This program's rows (int64), columns, and which of the tile exist. Columns turn fastest: neighbours read one row."""
    tiles = tl.cdiv(F, P)
    row_R = (tl.program_id(0) // tiles).to(tl.int64) * R + tl.arange(0, R)
    f_P = (tl.program_id(0) % tiles) * P + tl.arange(0, P)
    return row_R, f_P, (row_R < N)[:, None] & (f_P < F)[None, :]


def _forward(x12: Tensor) -> Tensor:
    y = _forward_outputs(x12)
    rows = _rows(x12)
    N, F = rows.shape[0], y.shape[-1]
    config = choose("swiglu_fwd", (F, x12.dtype), _default(F), x12.device)
    R, P = config.tile
    launch(swiglu_fwd, (cdiv(N, R) * cdiv(F, P),), rows, y, N, rows.stride(0), F, R=R, P=P, config=config)
    return y


def _forward_outputs(x12: Tensor) -> Tensor:
    return x12.new_empty((*x12.shape[:-1], x12.shape[-1] // 2))


def _backward(dy: Tensor, x12: Tensor) -> Tensor:
    dx12 = _backward_outputs(dy, x12)
    dy, rows = _rows(dy), _rows(x12)
    N, F = dy.shape
    config = choose("swiglu_bwd", (F, x12.dtype), _default(F), x12.device)
    R, P = config.tile
    launch(swiglu_bwd, (cdiv(N, R) * cdiv(F, P),), dy, rows, dx12, N, dy.stride(0), rows.stride(0), F, R=R, P=P, config=config)
    return dx12


def _backward_outputs(dy: Tensor, x12: Tensor) -> Tensor:
    return x12.new_empty(x12.shape)


def _rows(x: Tensor) -> Tensor:
    """(..., D) as (N, D) with a dense last axis: a view wherever one stride leads from row to row."""
    return inner_contiguous(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _default(F: int) -> Config:
    """Tiles of 2048: 16 elements a thread of each tensor, in loads of 16 bytes."""
    P = min(512, triton.next_power_of_2(max(F, 1)))
    return Config((2048 // P, P))


_forward_op = register("swiglu_fwd", "(Tensor x12) -> Tensor", _forward, _forward_outputs)
_backward_op = register("swiglu_bwd", "(Tensor dy, Tensor x12) -> Tensor", _backward, _backward_outputs)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x12):
        ctx.save_for_backward(x12)
        return _forward_op(x12)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return _backward_op(dy, *ctx.saved_tensors)


def swiglu(x12: Tensor, impl: str = "auto") -> Tensor:
    """silu(first half) · second half over the last axis. x12 (..., 2F) -> (..., F) in x12's dtype."""
    check_tensors("swiglu", x12=x12)
    check(x12.ndim >= 1 and x12.shape[-1] % 2 == 0, "swiglu", f"x12 must be (..., 2F), got shape {tuple(x12.shape)}")
    return _SwiGLU.apply(x12) if use_triton("swiglu", impl, x12) else swiglu_reference(x12)
