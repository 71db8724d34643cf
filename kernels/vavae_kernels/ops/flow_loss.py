"""Velocity loss of flow matching, per sample: mse = mean((v - u)²) and cosine = mean(1 - cos(v, u)) with u = x1 - x0.

Yao et al. 2025 (LightningDiT), section 4: the direction loss beside the squared error. cos is over the channels of a
pixel, cos(v, u) = v·u / (max(‖v‖, 1e-8) max(‖u‖, 1e-8)). With v̂, û the vectors over those clamped norms:

    dv = dmse_b 2 (v - u) / (C H W) - dcosine_b (û - [‖v‖ >= 1e-8] cos(v, u) v̂) / (H W max(‖v‖, 1e-8))

Shapes  v, x0, x1 (B, C, H, W) -> mse (B,), cosine (B,) in fp32 (fp64 in, fp64 out). Any strides: v is tokens under an NCHW
        latent. Only v has a gradient: x0 and x1 are noise and data.
Saved   v, x0, x1.  HBM bytes an element at s bytes: forward 3 s, backward 4 s; u is never stored.
"""

import torch
from torch import Tensor

from .._checks import arithmetic_dtype, check, check_no_grad, check_shape, check_tensors
from .._compat import tl, triton
from .._launch import Config, cdiv, choose, launch
from .._registry import register, use_triton
from ._layout import memory_format

COSINE_EPS = 1e-8  # of torch.nn.functional.cosine_similarity


def unit(x: Tensor, eps: float, dim: int) -> Tensor:
    """x / max(‖x‖, eps) along `dim`; a zero vector gives zeros, and a finite gradient."""
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True).clamp_min(eps * eps))


def flow_loss_reference(v: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """v, x0, x1 (B, C, H, W) -> mse (B,), cosine (B,)."""
    dtype = arithmetic_dtype(v, x0, x1)
    v, u = v.to(dtype), (x1.to(dtype) - x0.to(dtype)).detach()
    mse = (v - u).square().flatten(1).mean(1)
    cosine = (unit(v, COSINE_EPS, dim=1) * unit(u, COSINE_EPS, dim=1)).sum(1)
    return mse, (1 - cosine).flatten(1).mean(1)


@triton.jit
def flow_loss_fwd(
    v, x0, x1, squares, cosines,
    N, v_b, v_c, v_n, x0_b, x0_c, x0_n, x1_b, x1_c, x1_n,
    C: tl.constexpr, EPS: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One program: P of the N pixels of one sample, K of its C channels at a time. squares, cosines (B, programs a sample)."""
    b, n_P, in_P = _pixels(N, P)
    v += b * v_b
    x0 += b * x0_b
    x1 += b * x1_b
    square_P = tl.zeros((P,), tl.float32)
    vu_P = tl.zeros((P,), tl.float32)
    vv_P = tl.zeros((P,), tl.float32)
    uu_P = tl.zeros((P,), tl.float32)
    for c in tl.range(0, C, K):
        v_PK = _channels(v, n_P, in_P, c, v_n, v_c, C, K)
        u_PK = _channels(x1, n_P, in_P, c, x1_n, x1_c, C, K) - _channels(x0, n_P, in_P, c, x0_n, x0_c, C, K)
        square_P += tl.sum((v_PK - u_PK) * (v_PK - u_PK), 1)
        vu_P += tl.sum(v_PK * u_PK, 1)
        vv_P += tl.sum(v_PK * v_PK, 1)
        uu_P += tl.sum(u_PK * u_PK, 1)
    cosine_P = vu_P * _inverse_norm(vv_P, EPS) * _inverse_norm(uu_P, EPS)
    tl.store(squares + tl.program_id(0), tl.sum(square_P, 0))
    tl.store(cosines + tl.program_id(0), tl.sum(tl.where(in_P, 1.0 - cosine_P, 0.0), 0))


@triton.jit
def flow_loss_means(squares, cosines, mse, cosine, PARTS, N, ELEMENTS, S: tl.constexpr):
    """One program: the partial sums of one sample, S of PARTS at a time, to means over N pixels and over ELEMENTS = C N."""
    b = tl.program_id(0).to(tl.int64)
    square_S = tl.zeros((S,), tl.float32)
    cosine_S = tl.zeros((S,), tl.float32)
    for first in range(0, PARTS, S):
        part_S = first + tl.arange(0, S)
        square_S += tl.load(squares + b * PARTS + part_S, mask=part_S < PARTS, other=0.0)
        cosine_S += tl.load(cosines + b * PARTS + part_S, mask=part_S < PARTS, other=0.0)
    tl.store(mse + b, tl.sum(square_S, 0) / ELEMENTS)
    tl.store(cosine + b, tl.sum(cosine_S, 0) / N)


@triton.jit
def flow_loss_bwd(
    dmse, dcosine, v, x0, x1, dv,
    N, dmse_b, dcosine_b, v_b, v_c, v_n, x0_b, x0_c, x0_n, x1_b, x1_c, x1_n, dv_b, dv_c, dv_n,
    C: tl.constexpr, EPS: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One program: P of the N pixels of one sample. The first K channels stay in registers; with C <= K that is all of them."""
    b, n_P, in_P = _pixels(N, P)
    v += b * v_b
    x0 += b * x0_b
    x1 += b * x1_b
    dv += b * dv_b
    first_v_PK = _channels(v, n_P, in_P, 0, v_n, v_c, C, K)
    first_u_PK = _channels(x1, n_P, in_P, 0, x1_n, x1_c, C, K) - _channels(x0, n_P, in_P, 0, x0_n, x0_c, C, K)
    vu_P = tl.sum(first_v_PK * first_u_PK, 1)
    vv_P = tl.sum(first_v_PK * first_v_PK, 1)
    uu_P = tl.sum(first_u_PK * first_u_PK, 1)
    for c in tl.range(K, C, K):
        v_PK = _channels(v, n_P, in_P, c, v_n, v_c, C, K)
        u_PK = _channels(x1, n_P, in_P, c, x1_n, x1_c, C, K) - _channels(x0, n_P, in_P, c, x0_n, x0_c, C, K)
        vu_P += tl.sum(v_PK * u_PK, 1)
        vv_P += tl.sum(v_PK * v_PK, 1)
        uu_P += tl.sum(u_PK * u_PK, 1)

    # dv = of_e (v - u) - of_u u + of_v v
    of_e = 0.0
    of_cosine = 0.0
    if dmse is not None:
        of_e = tl.load(dmse + b * dmse_b).to(tl.float32) * 2.0 / C / N
    if dcosine is not None:
        of_cosine = tl.load(dcosine + b * dcosine_b).to(tl.float32) / N
    inverse_v_P = _inverse_norm(vv_P, EPS)
    of_u_P = of_cosine * inverse_v_P * _inverse_norm(uu_P, EPS)
    of_v_P = tl.where(vv_P >= EPS * EPS, of_u_P * vu_P * inverse_v_P * inverse_v_P, 0.0)
    dv_PK = of_e * (first_v_PK - first_u_PK) - of_u_P[:, None] * first_u_PK + of_v_P[:, None] * first_v_PK
    _store_channels(dv, dv_PK, n_P, in_P, 0, dv_n, dv_c, C, K)
    for c in tl.range(K, C, K):
        v_PK = _channels(v, n_P, in_P, c, v_n, v_c, C, K)
        u_PK = _channels(x1, n_P, in_P, c, x1_n, x1_c, C, K) - _channels(x0, n_P, in_P, c, x0_n, x0_c, C, K)
        dv_PK = of_e * (v_PK - u_PK) - of_u_P[:, None] * u_PK + of_v_P[:, None] * v_PK
        _store_channels(dv, dv_PK, n_P, in_P, c, dv_n, dv_c, C, K)


@triton.jit
def _pixels(N, P: tl.constexpr):
    """This program's sample and pixels (int64), and which of the pixels exist."""
    tiles = tl.cdiv(N, P)
    n_P = (tl.program_id(0) % tiles) * P + tl.arange(0, P)
    return (tl.program_id(0) // tiles).to(tl.int64), n_P.to(tl.int64), n_P < N


@triton.jit
def _channels(sample, n_P, in_P, c, x_n, x_c, C: tl.constexpr, K: tl.constexpr):
    """Channels c to c + K of pixels n_P of one sample, in fp32; zero where there is none."""
    c_K = c + tl.arange(0, K)
    offset_PK = n_P[:, None] * x_n + c_K.to(tl.int64)[None, :] * x_c
    return tl.load(sample + offset_PK, mask=in_P[:, None] & (c_K < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_channels(sample, x_PK, n_P, in_P, c, x_n, x_c, C: tl.constexpr, K: tl.constexpr):
    """The inverse of `_channels`, rounded to the pointer's dtype."""
    c_K = c + tl.arange(0, K)
    offset_PK = n_P[:, None] * x_n + c_K.to(tl.int64)[None, :] * x_c
    tl.store(sample + offset_PK, x_PK.to(sample.dtype.element_ty), mask=in_P[:, None] & (c_K < C)[None, :])


@triton.jit
def _inverse_norm(square_P, EPS: tl.constexpr):
    return tl.rsqrt(tl.maximum(square_P, EPS * EPS))


def _forward(v: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    mse, cosine = _forward_outputs(v, x0, x1)
    v, x0, x1 = v.flatten(2), x0.flatten(2), x1.flatten(2)
    B, C, N = v.shape
    config = choose("flow_loss_fwd", (C, N, v.dtype, x0.dtype), _default(C), v.device)
    P, K = config.tile
    parts = cdiv(N, P)
    squares, cosines = mse.new_empty((B, parts)), mse.new_empty((B, parts))
    launch(
        flow_loss_fwd, (B * parts,),
        v, x0, x1, squares, cosines, N, *v.stride(), *x0.stride(), *x1.stride(), C=C, EPS=COSINE_EPS, P=P, K=K, config=config,
    )  # fmt: skip
    launch(flow_loss_means, (B,), squares, cosines, mse, cosine, parts, N, C * N, S=32, config=Config((32,), warps=1))
    return mse, cosine


def _forward_outputs(v: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape[0], dtype=torch.float32), v.new_empty(v.shape[0], dtype=torch.float32)


def _backward(dmse: Tensor | None, dcosine: Tensor | None, v: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    dv = _backward_outputs(dmse, dcosine, v, x0, x1)
    of_pixels, v, x0, x1 = dv.flatten(2), v.flatten(2), x0.flatten(2), x1.flatten(2)
    B, C, N = v.shape
    config = choose("flow_loss_bwd", (C, N, v.dtype, x0.dtype), _default(C), v.device)
    P, K = config.tile
    by_sample = [0 if d is None else d.stride(0) for d in (dmse, dcosine)]
    launch(
        flow_loss_bwd, (B * cdiv(N, P),),
        dmse, dcosine, v, x0, x1, of_pixels, N, *by_sample, *v.stride(), *x0.stride(), *x1.stride(), *of_pixels.stride(),
        C=C, EPS=COSINE_EPS, P=P, K=K, config=config,
    )  # fmt: skip
    return dv


def _backward_outputs(dmse: Tensor | None, dcosine: Tensor | None, v: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    return torch.empty_like(v, memory_format=memory_format(v))


def _default(C: int) -> Config:
    """Tiles of 2048: 16 elements a thread of each tensor."""
    K = min(64, triton.next_power_of_2(max(C, 1)))
    return Config((2048 // K, K))


_forward_op = register("flow_loss_fwd", "(Tensor v, Tensor x0, Tensor x1) -> (Tensor, Tensor)", _forward, _forward_outputs)
_backward_op = register(
    "flow_loss_bwd", "(Tensor? dmse, Tensor? dcosine, Tensor v, Tensor x0, Tensor x1) -> Tensor", _backward, _backward_outputs
)


class _FlowLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, x0, x1):
        ctx.save_for_backward(v, x0, x1)
        ctx.set_materialize_grads(False)
        return _forward_op(v, x0, x1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dmse, dcosine):
        return _backward_op(dmse, dcosine, *ctx.saved_tensors), None, None


def flow_loss(v: Tensor, x0: Tensor, x1: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Squared error and direction error of the velocity v against x1 - x0. All (B, C, H, W) -> mse (B,), cosine (B,).

    fp32, or fp64 where an input is. Differentiates v only; x0 or x1 requiring grad is a ValueError.
    """
    op = "flow_loss"
    check_tensors(op, v=v, x0=x0, x1=x1)
    check(v.ndim == 4, op, f"v must be (B, C, H, W), got shape {tuple(v.shape)}")
    check_shape(op, "x0", x0, tuple(v.shape))
    check_shape(op, "x1", x1, tuple(v.shape))
    check_no_grad(op, x0=x0, x1=x1)
    return _FlowLoss.apply(v, x0, x1) if use_triton(op, impl, v, x0, x1) else flow_loss_reference(v, x0, x1)
