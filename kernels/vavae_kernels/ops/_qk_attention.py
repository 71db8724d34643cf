"""The kernel behind `qk_norm_rope_attention` where no gradient is needed: prologue and softmax attention in one.

    out = softmax(q kᵀ · scale) v per head,   q, k = turn(norm(·) · w + bias) of packed qkv

Online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): keys come J at a time, m is the largest score so far, l the sum
of exponentials. Scores stay in registers, so device memory sees qkv once and out once.

A program owns I queries of one head. Every program prepares the keys of its head again, N / I times in all, since programs
share no memory: a large I does that work, and reads keys, values and angles, less often; what limits I is the registers of the
accumulator and the scores, and that two programs a processor overlap one's products with the other's exponentials.
A head of 72 is 64 + 8 columns, the 8 padded to the 16 that a product takes: 80 of arithmetic where padding to 128 wastes half.
"""

import math

import torch
from torch import Tensor

from .. import _compat
from .._compat import tl, triton
from .._launch import Config, choose, inner_contiguous, launch, row_parts
from .._registry import register
from .._tiles import load_rows, store_rows
from ._heads import alignment, normalized_head, turned


@triton.jit
def qk_norm_rope_attention_fwd(
    qkv, turns, q_weight, k_weight, q_bias, k_bias, out,
    H, qkv_b, qkv_n, qkv_s, qkv_h,
    N: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, SCALE_LOG2E: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, I: tl.constexpr, J: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: I queries of one head over all N keys. Blocks of one head follow each other: its keys are in L2 by then."""
    operand: tl.constexpr = tl.float32 if WIDE else qkv.dtype.element_ty
    head = tl.program_id(0) // (N // I)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    first = tl.multiple_of(b * qkv_b + h * qkv_h, ALIGN)
    q_I = ((tl.program_id(0) % (N // I)) * I + tl.arange(0, I)).to(tl.int64)
    q = _prepared(qkv, first, q_I, qkv_n, turns, q_weight, q_bias, operand, D, PARTS, NORM, EPS, ALIGN, I)

    m_I = tl.full((I,), float("-inf"), tl.float32)
    l_I = tl.zeros((I,), tl.float32)
    acc = ()
    for i in tl.static_range(len(PARTS)):
        acc = acc + (tl.zeros((I, PARTS[i]), tl.float32),)
    for j in tl.range(0, N, J, num_stages=STAGES):
        k_J = (j + tl.arange(0, J)).to(tl.int64)
        k = _prepared(qkv, first + qkv_s, k_J, qkv_n, turns, k_weight, k_bias, operand, D, PARTS, NORM, EPS, ALIGN, J)
        s_IJ = tl.dot(q[0], tl.trans(k[0]), input_precision=PRECISION)
        for i in tl.static_range(1, len(PARTS)):
            s_IJ = tl.dot(q[i], tl.trans(k[i]), s_IJ, input_precision=PRECISION)
        new_m_I = tl.maximum(m_I, tl.max(s_IJ, 1))
        fade_I = tl.exp2((m_I - new_m_I) * SCALE_LOG2E)
        p_IJ = tl.exp2(s_IJ * SCALE_LOG2E - (new_m_I * SCALE_LOG2E)[:, None])
        m_I = new_m_I
        l_I = l_I * fade_I + tl.sum(p_IJ, 1)
        p = p_IJ.to(operand)
        v_J = tl.multiple_of(first + 2 * qkv_s + k_J * qkv_n, ALIGN)
        summed = ()
        start = 0
        for i in tl.static_range(len(PARTS)):
            column_P = start + tl.arange(0, PARTS[i])
            v_JP = tl.load(qkv + v_J[:, None] + column_P[None, :], mask=(column_P < D)[None, :], other=0.0).to(operand)
            summed = summed + (tl.dot(p, v_JP, acc[i] * fade_I[:, None], input_precision=PRECISION),)
            start = start + PARTS[i]
        acc = summed

    out_rows = ()
    for i in tl.static_range(len(PARTS)):
        out_rows = out_rows + (acc[i] / l_I[:, None],)
    store_rows(out, ((b * N + q_I) * H + h) * D, tl.full((I,), True, tl.int1), out_rows, D, PARTS)


@triton.jit
def _prepared(
    qkv, first, n_R, qkv_n, turns, weight, bias,
    OPERAND: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ALIGN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Tokens n_R of q or k, normalised, turned and rounded once, as operands of a product."""
    all_R = tl.full((R,), True, tl.int1)
    row = load_rows(qkv, tl.multiple_of(first + n_R * qkv_n, ALIGN), all_R, D, PARTS)
    row = normalized_head(row, all_R, weight, bias, NORM, EPS, D, PARTS)
    if turns is not None:
        cosines = ()
        sines = ()
        angles = load_rows(turns, n_R * D, all_R, D, PARTS)
        for i in tl.static_range(len(PARTS)):
            cosine, sine = tl.split(tl.reshape(angles[i], (R, PARTS[i] // 2, 2)))
            cosines = cosines + (cosine,)
            sines = sines + (sine,)
        row = turned(row, cosines, sines, R, PARTS)
    rounded = ()
    for i in tl.static_range(len(PARTS)):
        rounded = rounded + (row[i].to(OPERAND),)
    return rounded


def _forward(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None, norm: str | None, eps: float, scale: float,
) -> Tensor:  # fmt: skip
    """-> (B, N, H · Dh)."""
    B, N, _, H, D = qkv.shape
    out = _forward_outputs(qkv, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, eps, scale)
    qkv = inner_contiguous(qkv)
    affine = [None if t is None else t.contiguous() for t in (q_weight, k_weight, q_bias, k_bias)]
    turns = None  # (cos, sin) of each pair side by side: half of both tables, and small enough for L1, where every head finds it
    if cos is not None:
        turns = torch.stack((cos[:, ::2], sin[:, ::2]), dim=-1).float()
    config = choose("qk_norm_rope_attention_fwd", (D, qkv.dtype, norm is not None), _default(D, qkv.dtype), qkv.device)
    queries, keys = config.tile
    strides = qkv.stride()[:4]
    launch(
        qk_norm_rope_attention_fwd, (B * H * (N // queries),), qkv, turns, *affine, out,
        H, *strides,
        N=N, D=D, PARTS=tuple(max(part, 16) for part in row_parts(D)), NORM=norm, EPS=eps, SCALE_LOG2E=scale * math.log2(math.e),
        ALIGN=alignment(*strides), PRECISION="tf32x3" if qkv.dtype == torch.float32 else "ieee", WIDE=_compat.INTERPRETED,
        I=queries, J=keys, STAGES=config.stages, config=config,
    )  # fmt: skip
    return out


def _forward_outputs(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None, norm: str | None, eps: float, scale: float,
) -> Tensor:  # fmt: skip
    B, N, _, H, D = qkv.shape
    return qkv.new_empty((B, N, H * D))


def _default(D: int, dtype: torch.dtype) -> Config:
    return Config((64, 64), warps=4, stages=1)


fused_attention = register(
    "qk_norm_rope_attention_fwd",
    "(Tensor qkv, Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, str? norm, float eps,"
    " float scale) -> Tensor",
    _forward,
    _forward_outputs,
)
