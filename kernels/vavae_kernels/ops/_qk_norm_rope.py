"""The kernels behind `qk_norm_rope`: one forward, one backward.

    h = (x - mean) · rstd,   y = h · w + bias,   q = turn(y)               (RMS: mean = 0; without a norm y = x)

Backward, with the cotangent dq, and the same for k:

    dy = turn*(dq),   g = dy · w,   dx = rstd · (g - h mean(g h) - [LayerNorm] mean(g))
    dw = Σ dy · h,   dbias = Σ dy                                          (over samples, tokens and heads)

A program owns one token and some of its B · H rows (sample, head): the angles are then one vector for all of them, and q and
k share it. Backward computes the statistics again, the rows being there whole; sums over rows are written as partials and
added by `torch.sum`: no atomics, bitwise repeatable.
"""

import torch
from torch import Tensor

from .._compat import tl, triton
from .._launch import Config, cdiv, choose, inner_contiguous, launch, power_of_two, processors, row_parts
from .._registry import register
from .._tiles import load_rows, load_vector, row_dot, row_sum, store_rows, store_vector
from ._heads import added, added_products, alignment, normalized_head, scaled, standardized, turned, zero_rows


@triton.jit
def qk_norm_rope_fwd(
    qk, cos, sin, q_weight, k_weight, q_bias, k_bias, q, k,
    N, H, BH, qk_b, qk_n, qk_s, qk_h, cos_n, sin_n,
    D: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ALIGN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One program: R rows of q or of k at one token."""
    if tl.program_id(1) == 0:
        _forward_rows(qk, cos, sin, q_weight, q_bias, q, N, H, BH, qk_b, qk_n, qk_h, cos_n, sin_n, D, PARTS, NORM, EPS, ALIGN, R)
    else:
        _forward_rows(qk + qk_s, cos, sin, k_weight, k_bias, k, N, H, BH, qk_b, qk_n, qk_h, cos_n, sin_n, D, PARTS, NORM, EPS, ALIGN, R)


@triton.jit
def _forward_rows(
    x, cos, sin, weight, bias, out,
    N, H, BH, x_b, x_n, x_h, cos_n, sin_n,
    D: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ALIGN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    n, b_R, h_R, in_R = _rows(tl.program_id(0) // N, N, H, BH, R)
    row = load_rows(x, tl.multiple_of(b_R * x_b + n * x_n + h_R * x_h, ALIGN), in_R, D, PARTS)
    row = normalized_head(row, in_R, weight, bias, NORM, EPS, D, PARTS)
    if cos is not None:
        cosines = _even_columns(cos + n * cos_n, 1.0, D, PARTS)
        sines = _even_columns(sin + n * sin_n, 1.0, D, PARTS)
        row = turned(row, cosines, sines, R, PARTS)
    store_rows(out, ((b_R * N + n) * H + h_R) * D, in_R, row, D, PARTS)


@triton.jit
def qk_norm_rope_bwd(
    dq, dk, dv, qk, cos, sin, q_weight, k_weight, dqkv, sums_h, sums_dy,
    N, H, BH, STEPS, dq_b, dq_n, dq_h, dk_b, dk_n, dk_h, dv_b, dv_n, dv_h, qk_b, qk_n, qk_s, qk_h, cos_n, sin_n,
    D: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ALIGN: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: STEPS times R rows of q, k or v at one token. Their register need is then one's, not the sum of three."""
    if tl.program_id(1) == 0:
        _backward_rows(dq, qk, cos, sin, q_weight, dqkv, sums_h, sums_dy, 0, N, H, BH, STEPS, dq_b, dq_n, dq_h, qk_b, qk_n, qk_h,
                       cos_n, sin_n, D, PARTS, NORM, EPS, ALIGN, R, STAGES)  # fmt: skip
    elif tl.program_id(1) == 1:
        k = qk
        if qk is not None:
            k = qk + qk_s
        _backward_rows(dk, k, cos, sin, k_weight, dqkv, sums_h, sums_dy, 1, N, H, BH, STEPS, dk_b, dk_n, dk_h, qk_b, qk_n, qk_h,
                       cos_n, sin_n, D, PARTS, NORM, EPS, ALIGN, R, STAGES)  # fmt: skip
    else:
        _backward_rows(dv, None, None, None, None, dqkv, None, None, 2, N, H, BH, STEPS, dv_b, dv_n, dv_h, 0, 0, 0,
                       0, 0, D, PARTS, None, EPS, ALIGN, R, STAGES)  # fmt: skip


@triton.jit
def _backward_rows(
    dout, x, cos, sin, weight, dqkv, sums_h, sums_dy,
    part: tl.constexpr, N, H, BH, STEPS, dout_b, dout_n, dout_h, x_b, x_n, x_h, cos_n, sin_n,
    D: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ALIGN: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dqkv of this program's rows of one part of qkv, and their sums of dy · h and dy."""
    first = (tl.program_id(0) // N) * STEPS
    n, b_R, h_R, in_R = _rows(first, N, H, BH, R)
    if cos is not None:
        cosines = _even_columns(cos + n * cos_n, 1.0, D, PARTS)
        sines = _even_columns(sin + n * sin_n, -1.0, D, PARTS)  # the conjugate turns back
    if weight is not None:
        weight_D = load_vector(weight, D, PARTS)
    sum_h = zero_rows(R, PARTS)
    sum_dy = zero_rows(R, PARTS)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        n, b_R, h_R, in_R = _rows(first + step, N, H, BH, R)
        dy = zero_rows(R, PARTS)  # what an output that was not used sends back
        if dout is not None:
            dy = load_rows(dout, tl.multiple_of(b_R * dout_b + n * dout_n + h_R * dout_h, ALIGN), in_R, D, PARTS)
        if cos is not None:
            dy = turned(dy, cosines, sines, R, PARTS)
        dx = dy
        if NORM is not None:
            x_rows = load_rows(x, tl.multiple_of(b_R * x_b + n * x_n + h_R * x_h, ALIGN), in_R, D, PARTS)
            h, rstd_R = standardized(x_rows, in_R, NORM == "layer", EPS, D, PARTS)
            if sums_h is not None:
                sum_h = added_products(sum_h, dy, h, PARTS)
            if sums_dy is not None:
                sum_dy = added(sum_dy, dy, PARTS)
            g = dy
            if weight is not None:
                g = scaled(dy, weight_D, PARTS)
            mean_gh_R = row_dot(g, h, PARTS) / D  # columns past D have g = 0
            mean_g_R = tl.zeros((R,), tl.float32)
            if NORM == "layer":
                mean_g_R = row_sum(g, PARTS) / D
            dx = ()
            for i in tl.static_range(len(PARTS)):
                dx = dx + ((g[i] - h[i] * mean_gh_R[:, None] - mean_g_R[:, None]) * rstd_R[:, None],)
        store_rows(dqkv, (((b_R * N + n) * 3 + part) * H + h_R) * D, in_R, dx, D, PARTS)
    partial = (tl.program_id(0).to(tl.int64) * 2 + part) * D
    if sums_h is not None:
        _store_column_sums(sums_h + partial, sum_h, D, PARTS)
    if sums_dy is not None:
        _store_column_sums(sums_dy + partial, sum_dy, D, PARTS)


@triton.jit
def _rows(tile, N, H, BH, R: tl.constexpr):
    """This program's token, and of R rows the sample, the head (all int64) and whether it exists.

    Tokens turn fastest: neighbouring programs read one stretch of memory.
    """
    row_R = tile * R + tl.arange(0, R)
    return (tl.program_id(0) % N).to(tl.int64), (row_R // H).to(tl.int64), (row_R % H).to(tl.int64), row_R < BH


@triton.jit
def _even_columns(table, sign: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
    """sign · a table's row at even columns, as tiles [1, P / 2] of fp32."""
    row = ()
    start = 0
    for i in tl.static_range(len(PARTS)):
        column_P = start + 2 * tl.arange(0, PARTS[i] // 2)
        row = row + (sign * tl.load(table + column_P, mask=column_P < D, other=0.0).to(tl.float32)[None, :],)
        start = start + PARTS[i]
    return row


@triton.jit
def _store_column_sums(pointer, rows, D: tl.constexpr, PARTS: tl.constexpr):
    """The sum of R rows. Until here each thread added up its own elements: one exchange between threads, not one a step."""
    total = ()
    for i in tl.static_range(len(PARTS)):
        total = total + (tl.sum(rows[i], 0),)
    store_vector(pointer, total, D, PARTS)


def _forward(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None, norm: str | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> q, k (B, H, N, Dh)."""
    q, k = outputs = _forward_outputs(qkv, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, eps)
    B, N, _, H, D = qkv.shape
    qk = inner_contiguous(qkv[:, :, :2])
    cos, sin = (None if t is None else inner_contiguous(t) for t in (cos, sin))
    affine = [None if t is None else t.contiguous() for t in (q_weight, k_weight, q_bias, k_bias)]
    config = choose("qk_norm_rope_fwd", (D, qkv.dtype, norm is not None), Config((power_of_two(1152 / D),), warps=1), qkv.device)
    (R,) = config.tile
    strides = qk.stride()[:4]
    launch(
        qk_norm_rope_fwd, (N * cdiv(B * H, R), 2), qk, cos, sin, *affine, q, k,
        N, H, B * H, *strides, _row_stride(cos), _row_stride(sin),
        D=D, PARTS=row_parts(D), NORM=norm, EPS=eps, ALIGN=alignment(*strides), R=R, config=config,
    )  # fmt: skip
    return outputs


def _forward_outputs(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None, norm: str | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, N, _, H, D = qkv.shape
    return qkv.new_empty((B, N, H, D)).transpose(1, 2), qkv.new_empty((B, N, H, D)).transpose(1, 2)


def _backward(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, qkv: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, norm: str | None, eps: float, weights: bool, biases: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dqkv (B, N, 3, H, Dh), dweight and dbias (2, Dh) of q and k in fp32, empty unless asked for."""
    outputs = _backward_outputs(dq, dk, dv, qkv, cos, sin, q_weight, k_weight, norm, eps, weights, biases)
    dqkv, dweight, dbias = outputs
    B, N, _, H, D = dqkv.shape
    dq, dk, dv = (None if t is None else inner_contiguous(t) for t in (dq, dk, dv))
    cos, sin = (None if t is None else inner_contiguous(t) for t in (cos, sin))
    q_weight, k_weight = (None if t is None else t.contiguous() for t in (q_weight, k_weight))
    qk = None if norm is None else inner_contiguous(qkv[:, :, :2])

    default = Config((power_of_two(1152 / D), 32), warps=1) if norm is None else Config((power_of_two(2304 / D), 32), warps=4, stages=1)
    config = choose("qk_norm_rope_bwd", (D, dqkv.dtype, norm is not None), default, dqkv.device)
    R, programs_per_processor = config.tile
    tiles = cdiv(B * H, R)
    splits = tiles  # of the rows of one token; fewer where each writes partial sums
    if weights or biases:
        splits = min(tiles, power_of_two(programs_per_processor * processors(dqkv.device) / max(N, 1)))
    steps = cdiv(tiles, max(splits, 1))
    sums_h, sums_dy = (dqkv.new_empty((N * splits, 2, D), dtype=torch.float32) if needed else None for needed in (weights, biases))
    strides = [stride for t in (dq, dk, dv) for stride in _strides(t)] + list((0,) * 4 if qk is None else qk.stride()[:4])
    launch(
        qk_norm_rope_bwd, (N * splits, 3), dq, dk, dv, qk, cos, sin, q_weight, k_weight, dqkv, sums_h, sums_dy,
        N, H, B * H, steps, *strides, _row_stride(cos), _row_stride(sin),
        D=D, PARTS=row_parts(D), NORM=norm, EPS=eps, ALIGN=alignment(*strides), R=R, STAGES=config.stages, config=config,
    )  # fmt: skip
    for total, partial in ((dweight, sums_h), (dbias, sums_dy)):
        if partial is not None:
            torch.sum(partial, 0, out=total)
    return outputs


def _backward_outputs(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, qkv: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, norm: str | None, eps: float, weights: bool, biases: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given = next(t for t in (dq, dk, dv) if t is not None)
    B, H, N, D = given.shape
    dweight, dbias = (given.new_empty((2, D) if needed else 0, dtype=torch.float32) for needed in (weights, biases))
    return given.new_empty((B, N, 3, H, D)), dweight, dbias


def _strides(heads: Tensor | None) -> tuple[int, int, int]:
    """Of a sample, a token and a head of (B, H, N, Dh)."""
    return (0, 0, 0) if heads is None else (heads.stride(0), heads.stride(2), heads.stride(1))


def _row_stride(table: Tensor | None) -> int:
    return 0 if table is None else table.stride(0)


_forward_op = register(
    "qk_norm_rope_fwd",
    "(Tensor qkv, Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, str? norm, float eps)"
    " -> (Tensor, Tensor)",
    _forward,
    _forward_outputs,
)
_backward_op = register(
    "qk_norm_rope_bwd",
    "(Tensor? dq, Tensor? dk, Tensor? dv, Tensor? qkv, Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight, str? norm, float eps,"
    " bool weights, bool biases) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_outputs,
)


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, eps):
        q, k = _forward_op(qkv, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, eps)
        ctx.save_for_backward(None if norm is None else qkv, cos, sin, q_weight, k_weight)
        ctx.norm, ctx.eps = norm, eps
        ctx.dtypes = [None if t is None else t.dtype for t in (q_weight, k_weight, q_bias, k_bias)]
        ctx.set_materialize_grads(False)
        return q, k, qkv[:, :, 2].transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv):
        if dq is None and dk is None and dv is None:
            return (None,) * 9
        qkv, cos, sin, q_weight, k_weight = ctx.saved_tensors
        weights, biases = (any(dtype is not None for dtype in dtypes) for dtypes in (ctx.dtypes[:2], ctx.dtypes[2:]))
        dqkv, dweight, dbias = _backward_op(dq, dk, dv, qkv, cos, sin, q_weight, k_weight, ctx.norm, ctx.eps, weights, biases)
        affine = [*(dweight if weights else (None, None)), *(dbias if biases else (None, None))]
        affine = [None if dtype is None else d.to(dtype) for d, dtype in zip(affine, ctx.dtypes)]
        return dqkv, None, None, *affine, None, None


def qk_norm_rope_triton(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None, norm: str | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """qkv (B, N, 3, H, Dh), cos, sin (N, Dh), weights and biases (Dh,) -> q, k, v (B, H, N, Dh); v is a view of qkv."""
    return _QkNormRope.apply(qkv, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, eps)
