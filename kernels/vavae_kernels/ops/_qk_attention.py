"""The kernel behind `qk_norm_rope_attention` where no gradient is needed: prologue and softmax attention in one.

    out = softmax(q kᵀ · scale) v per head,   q, k = turn(norm(·) · w + bias) of packed qkv

Online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): keys come J at a time, m is the largest score so far, l the sum
of exponentials. Scores stay in registers, so device memory sees qkv once and out once. scale · log₂ e goes into q before its
rounding: an exponential is then one subtraction and one instruction.

A program owns I queries of one head. Every program prepares the keys of its head again, N / I times in all, since programs
share no memory: a large I does that work, and reads keys, values and angles, less often; what limits I is the registers of the
accumulator and the scores, and that two programs a processor hide each other's loads.
A head of 72 is 64 + 8 columns, the 8 padded to the 16 that a product takes: 80 of arithmetic where padding to 128 wastes half.
"""

import math

import torch
from torch import Tensor

from .. import _compat
from .._compat import tl, triton
from .._launch import Config, architecture, cdiv, choose, inner_contiguous, launch, row_parts
from .._registry import register
from .._tiles import load_rows, store_rows
from ._heads import alignment, normalized_head, turned, zero_rows


@triton.jit
def qk_norm_rope_attention_fwd(
    qkv, turns, q_weight, k_weight, q_bias, k_bias, out,
    H, qkv_b, qkv_s, qkv_h,
    qkv_n: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    SCALE_LOG2E: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, I: tl.constexpr, J: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: I queries of one head over all N keys. Blocks of one head follow each other: its keys are in L2 by then.

    The stride of a token is a constant, as it is of a model: a thread then holds one address for all of its rows.
    """
    operand: tl.constexpr = tl.float32 if WIDE else qkv.dtype.element_ty
    index: tl.constexpr = tl.int32 if N * qkv_n < 2**31 else tl.int64
    blocks: tl.constexpr = (N + I - 1) // I
    head = tl.program_id(0) // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    q_head = qkv + tl.multiple_of(b * qkv_b + h * qkv_h, ALIGN)
    k_head = q_head + qkv_s
    v_head = k_head + qkv_s
    q_I = ((tl.program_id(0) % blocks) * I + tl.arange(0, I)).to(index)
    q = _prepared(q_head, q_I, qkv_n, turns, q_weight, q_bias, SCALE_LOG2E, operand, N, D, PARTS, NORM, EPS, ALIGN, I)

    m_I = tl.full((I,), float("-inf"), tl.float32)
    l_I = tl.zeros((I,), tl.float32)
    acc = zero_rows(I, PARTS)
    for j in tl.range(0, N, J, num_stages=STAGES):
        k_J = (j + tl.arange(0, J)).to(index)
        k = _prepared(k_head, k_J, qkv_n, turns, k_weight, k_bias, 1.0, operand, N, D, PARTS, NORM, EPS, ALIGN, J)
        s_IJ = tl.dot(q[0], tl.trans(k[0]), input_precision=PRECISION)
        for i in tl.static_range(1, len(PARTS)):
            s_IJ = tl.dot(q[i], tl.trans(k[i]), s_IJ, input_precision=PRECISION)
        if N % J != 0:
            s_IJ = tl.where((k_J < N)[None, :], s_IJ, float("-inf"))
        new_m_I = tl.maximum(m_I, tl.max(s_IJ, 1))
        fade_I = tl.exp2(m_I - new_m_I)
        p_IJ = tl.exp2(s_IJ - new_m_I[:, None])
        m_I = new_m_I
        l_I = l_I * fade_I + tl.sum(p_IJ, 1)
        p = p_IJ.to(operand)
        v_J = tl.multiple_of(k_J * qkv_n, ALIGN)
        summed = ()
        start = 0
        for i in tl.static_range(len(PARTS)):
            column_P = start + tl.arange(0, PARTS[i])
            v_JP = tl.load(v_head + v_J[:, None] + column_P[None, :], mask=_exists(k_J, N, J)[:, None] & (column_P < D)[None, :], other=0.0)
            summed = summed + (tl.dot(p, v_JP.to(operand), acc[i] * fade_I[:, None], input_precision=PRECISION),)
            start = start + PARTS[i]
        acc = summed

    share_I = 1.0 / l_I
    out_rows = ()
    for i in tl.static_range(len(PARTS)):
        out_rows = out_rows + (acc[i] * share_I[:, None],)
    store_rows(out, ((b * N + q_I) * H + h) * D, _exists(q_I, N, I), out_rows, D, PARTS)


@triton.jit
def _exists(n_R, N: tl.constexpr, R: tl.constexpr):
    """Which tokens there are; all of them, known when compiling, where tiles of R fill N."""
    if N % R == 0:
        return tl.full((R,), True, tl.int1)
    else:
        return n_R < N


@triton.jit
def _prepared(
    head, n_R, head_n: tl.constexpr, turns, weight, bias,
    SCALE: tl.constexpr, OPERAND: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    ALIGN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Tokens n_R of q or k: normalised, turned, scaled and rounded once, as operands of a product."""
    in_R = _exists(n_R, N, R)
    row = load_rows(head, tl.multiple_of(n_R * head_n, ALIGN), in_R, D, PARTS)
    row = normalized_head(row, in_R, weight, bias, NORM, EPS, D, PARTS)
    if turns is not None:
        cosines = ()
        sines = ()
        angles = load_rows(turns, n_R * D, in_R, D, PARTS)
        for i in tl.static_range(len(PARTS)):
            cosine, sine = tl.split(tl.reshape(angles[i], (R, PARTS[i] // 2, 2)))
            cosines = cosines + (cosine,)
            sines = sines + (sine,)
        row = turned(row, cosines, sines, R, PARTS)
    rounded = ()
    for i in tl.static_range(len(PARTS)):
        rounded = rounded + ((row[i] * SCALE).to(OPERAND),)
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
    default = _default(D, qkv.dtype, norm is not None, architecture(qkv.device))
    config = choose("qk_norm_rope_attention_fwd", (D, qkv.dtype, norm is not None), default, qkv.device)
    queries, keys = config.tile
    qkv_b, qkv_n, qkv_s, qkv_h = strides = qkv.stride()[:4]
    launch(
        qk_norm_rope_attention_fwd, (B * H * cdiv(N, queries),), qkv, turns, *affine, out,
        H, qkv_b, qkv_s, qkv_h,
        qkv_n=qkv_n, N=N, D=D, PARTS=row_parts(16 * cdiv(D, 16)), NORM=norm, EPS=eps, SCALE_LOG2E=scale * math.log2(math.e),
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


def _default(D: int, dtype: torch.dtype, norm: bool, architecture: int) -> Config:
    """The largest tile that spills nothing. Only sm_9x and sm_10x leave a product's operands in shared memory; not those of fp32,
    which is three products of tf32."""
    if dtype == torch.float32:
        return Config((32, 16), warps=4, stages=1)
    if architecture // 10 not in (9, 10):
        return Config((128, 32), warps=8, stages=1)
    return Config((128 if D <= 64 or (D <= 80 and not norm) else 64, 64), warps=4, stages=1)


fused_attention = register(
    "qk_norm_rope_attention_fwd",
    "(Tensor qkv, Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, str? norm, float eps,"
    " float scale) -> Tensor",
    _forward,
    _forward_outputs,
)
