"""The kernels behind `rms_norm`, `norm_modulate` and `gate_add_norm_modulate`: one forward, one backward, one reduction.

    r = x + gate_b · o                                     (without a gate r = x)
    h = (r - mean) · rstd                                  (RMS: mean = 0)
    y = h · w · (1 + scale_b) + shift_b                    (each factor may be absent)

Backward of y, with the cotangents dy and, where r is an output, dr', and a = w (1 + scale):

    g  = dy · a,   dr = rstd · (g - h mean(g h) - [LayerNorm] mean(g)) + dr',   dx = dr,   do = gate · dr
    H_b = Σ_n dy · h,   S_b = Σ_n dy,   G_b = Σ_n dr · o
    dscale = w · H_b,   dshift = S_b,   dgate = G_b,   dw = Σ_b (1 + scale_b) · H_b

Three sums a sample give every parameter's gradient, w's included. A program owns rows of one sample and keeps its sums in
registers; they are written as partials [B, S, D] and added by a second kernel: no atomics, bitwise repeatable.

`gate` and `o` come together or not at all. Without scale, B is 1 and the rows are the tokens: `rms_norm`.
"""

import torch
from torch import Tensor

from .._compat import tl, triton
from .._launch import Config, cdiv, choose, inner_contiguous, launch, power_of_two, processors, row_parts
from .._registry import STORAGE_DTYPES, register
from .._tiles import load_rows, load_vector, row_dot, row_sum, store_rows, store_vector, zero_vector

MAX_WIDTH = 1 << 16  # of a row, which a program holds in registers
PIPELINED_WIDTH = 2048  # up to which the tiles of several stages fit the shared memory of every GPU in fp32


@triton.jit
def adaptive_norm_fwd(
    x, o, gate, scale, shift, weight, r, y, rstd, mean,
    N, x_b, x_n, o_b, o_n, gate_b, scale_b, shift_b,
    D: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, LAYER: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One program: R rows of one sample."""
    tiles = tl.cdiv(N, R)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n_R = (tl.program_id(0) % tiles) * R + tl.arange(0, R)
    in_R = n_R < N
    row_R = b * N + n_R
    x_R = b * x_b + n_R.to(tl.int64) * x_n

    res = load_rows(x, x_R, in_R, D, PARTS)
    if gate is not None:
        o_R = b * o_b + n_R.to(tl.int64) * o_n
        y_in = load_rows(o, o_R, in_R, D, PARTS)
        gate_D = load_vector(gate + b * gate_b, D, PARTS)
        summed = ()
        for i in tl.static_range(len(PARTS)):
            summed = summed + (res[i] + gate_D[i][None, :] * y_in[i],)
        res = summed
        store_rows(r, row_R * D, in_R, res, D, PARTS)

    if LAYER:
        mean_R = row_sum(res, PARTS) / D
        centred = ()
        start = 0
        for i in tl.static_range(len(PARTS)):
            in_P = start + tl.arange(0, PARTS[i]) < D  # columns past D stay zero, so that the variance is that of D columns
            centred = centred + (tl.where(in_P[None, :], res[i] - mean_R[:, None], 0.0),)
            start = start + PARTS[i]
        res = centred
        tl.store(mean + row_R, mean_R, mask=in_R)
    rstd_R = tl.rsqrt(row_dot(res, res, PARTS) / D + EPS)
    tl.store(rstd + row_R, rstd_R, mask=in_R)

    start = 0
    for i in tl.static_range(len(PARTS)):
        column_P = start + tl.arange(0, PARTS[i])
        in_P = column_P < D
        out_RP = res[i] * rstd_R[:, None]
        if weight is not None:
            out_RP *= tl.load(weight + column_P, mask=in_P, other=0.0).to(tl.float32)[None, :]
        if scale is not None:
            out_RP *= 1.0 + tl.load(scale + b * scale_b + column_P, mask=in_P, other=0.0).to(tl.float32)[None, :]
        if shift is not None:
            out_RP += tl.load(shift + b * shift_b + column_P, mask=in_P, other=0.0).to(tl.float32)[None, :]
        tl.store(y + row_R[:, None] * D + column_P[None, :], out_RP.to(y.dtype.element_ty), mask=in_R[:, None] & in_P[None, :])
        start = start + PARTS[i]


@triton.jit
def adaptive_norm_bwd(
    dy, dr, x, o, gate, scale, weight, rstd, mean, dx, do, sums_h, sums_dy, sums_gate,
    N, SPLITS, ROWS, dy_b, dy_n, dr_b, dr_n, x_b, x_n, o_b, o_n, gate_b, scale_b,
    D: tl.constexpr, PARTS: tl.constexpr, LAYER: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one sample, R at a time, and their part of the sample's sums."""
    b = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    weight_D = zero_vector(PARTS)
    gain = zero_vector(PARTS)
    if weight is not None:
        weight_D = load_vector(weight, D, PARTS)
    if scale is not None:
        gain = load_vector(scale + b * scale_b, D, PARTS)
    a = ()
    for i in tl.static_range(len(PARTS)):
        a_P = 1.0 + gain[i]
        if weight is not None:
            a_P = a_P * weight_D[i]
        a = a + (a_P,)
    gate_D = zero_vector(PARTS)
    if gate is not None:
        gate_D = load_vector(gate + b * gate_b, D, PARTS)

    sum_h = zero_vector(PARTS)
    sum_dy = zero_vector(PARTS)
    sum_gate = zero_vector(PARTS)
    for first in tl.range(0, ROWS, R, num_stages=STAGES):
        n_R = split * ROWS + first + tl.arange(0, R)
        in_R = (n_R < N) & (first + tl.arange(0, R) < ROWS)
        row_R = b * N + n_R
        n_R = n_R.to(tl.int64)
        cotangent = load_rows(dy, b * dy_b + n_R * dy_n, in_R, D, PARTS)
        res = load_rows(x, b * x_b + n_R * x_n, in_R, D, PARTS)
        if gate is not None:  # r = x + gate · o again, in fp32: r as it was stored may be bf16
            o_rows = load_rows(o, b * o_b + n_R * o_n, in_R, D, PARTS)
            summed = ()
            for i in tl.static_range(len(PARTS)):
                summed = summed + (res[i] + gate_D[i][None, :] * o_rows[i],)
            res = summed
        rstd_R = tl.load(rstd + row_R, mask=in_R, other=0.0)
        mean_R = tl.zeros((R,), tl.float32)
        if LAYER:
            mean_R = tl.load(mean + row_R, mask=in_R, other=0.0)
        h = ()
        g = ()
        for i in tl.static_range(len(PARTS)):
            h = h + ((res[i] - mean_R[:, None]) * rstd_R[:, None],)
            g = g + (cotangent[i] * a[i][None, :],)
        mean_gh_R = row_dot(g, h, PARTS) / D  # columns past D have g = 0
        mean_g_R = tl.zeros((R,), tl.float32)
        if LAYER:
            mean_g_R = row_sum(g, PARTS) / D

        d_res = ()
        for i in tl.static_range(len(PARTS)):
            d_res = d_res + ((g[i] - h[i] * mean_gh_R[:, None] - mean_g_R[:, None]) * rstd_R[:, None],)
        if dr is not None:
            dr_rows = load_rows(dr, b * dr_b + n_R * dr_n, in_R, D, PARTS)
            added = ()
            for i in tl.static_range(len(PARTS)):
                added = added + (d_res[i] + dr_rows[i],)
            d_res = added
        store_rows(dx, row_R * D, in_R, d_res, D, PARTS)

        if gate is not None:
            d_o = ()
            gated = ()
            for i in tl.static_range(len(PARTS)):
                d_o = d_o + (gate_D[i][None, :] * d_res[i],)
                gated = gated + (sum_gate[i] + tl.sum(d_res[i] * o_rows[i], 0),)
            sum_gate = gated
            store_rows(do, row_R * D, in_R, d_o, D, PARTS)
        summed_h = ()
        summed_dy = ()
        for i in tl.static_range(len(PARTS)):
            summed_h = summed_h + (sum_h[i] + tl.sum(cotangent[i] * h[i], 0),)
            summed_dy = summed_dy + (sum_dy[i] + tl.sum(cotangent[i], 0),)
        sum_h = summed_h
        sum_dy = summed_dy

    partial = (b * SPLITS + split) * D
    if sums_h is not None:
        store_vector(sums_h + partial, sum_h, D, PARTS)
    if sums_dy is not None:
        store_vector(sums_dy + partial, sum_dy, D, PARTS)
    if gate is not None:
        store_vector(sums_gate + partial, sum_gate, D, PARTS)


@triton.jit
def adaptive_norm_sums(
    sums_h, sums_dy, sums_gate, scale, weight, dscale, dshift, dgate, dweight,
    SPLITS, D, scale_b, S: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One program: P columns of one sample. Adds the partials, S at a time, and writes the gradients that belong to the sample."""
    b = tl.program_id(0).to(tl.int64)
    column_P = tl.program_id(1) * P + tl.arange(0, P)
    in_P = column_P < D
    h_SP = tl.zeros((S, P), tl.float32)
    dy_SP = tl.zeros((S, P), tl.float32)
    gate_SP = tl.zeros((S, P), tl.float32)
    for first in range(0, SPLITS, S):
        split_S = first + tl.arange(0, S)
        offset_SP = (b * SPLITS + split_S)[:, None] * D + column_P[None, :]
        mask_SP = (split_S < SPLITS)[:, None] & in_P[None, :]
        if sums_h is not None:
            h_SP += tl.load(sums_h + offset_SP, mask=mask_SP, other=0.0)
        if dshift is not None:
            dy_SP += tl.load(sums_dy + offset_SP, mask=mask_SP, other=0.0)
        if dgate is not None:
            gate_SP += tl.load(sums_gate + offset_SP, mask=mask_SP, other=0.0)
    h_P = tl.sum(h_SP, 0)
    dy_P = tl.sum(dy_SP, 0)
    gate_P = tl.sum(gate_SP, 0)
    out_P = b * D + column_P
    if dweight is not None:
        by_scale_P = h_P
        if scale is not None:
            by_scale_P = h_P * (1.0 + tl.load(scale + b * scale_b + column_P, mask=in_P, other=0.0).to(tl.float32))
        tl.store(dweight + out_P, by_scale_P, mask=in_P)
    if dscale is not None:
        if weight is not None:
            h_P *= tl.load(weight + column_P, mask=in_P, other=0.0).to(tl.float32)
        tl.store(dscale + out_P, h_P.to(dscale.dtype.element_ty), mask=in_P)
    if dshift is not None:
        tl.store(dshift + out_P, dy_P.to(dshift.dtype.element_ty), mask=in_P)
    if dgate is not None:
        tl.store(dgate + out_P, gate_P.to(dgate.dtype.element_ty), mask=in_P)


def _forward(
    x: Tensor, o: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None,
    layer: bool, eps: float, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> r (empty without a gate: it is x), y, rstd, mean (empty for RMS)."""
    B, N, D = x.shape
    x, o = inner_contiguous(x), None if o is None else inner_contiguous(o)
    gate, scale, shift = (None if m is None else inner_contiguous(m) for m in (gate, scale, shift))
    outputs = _forward_outputs(x, o, gate, scale, shift, weight, layer, eps, out_dtype)
    r, y, rstd, mean = outputs
    default = Config((power_of_two(4608 / D),), _warps(D, 8192))
    config = choose("adaptive_norm_fwd", (D, x.dtype, out_dtype, gate is not None), default, x.device)
    (R,) = config.tile
    launch(
        adaptive_norm_fwd, (B * cdiv(N, R),),
        x, o, gate, scale, shift, weight if weight is None else weight.contiguous(), r if o is not None else None, y, rstd, mean if layer else None,
        N, *x.stride()[:2], *_strides(o, 2), *_strides(gate, 1), *_strides(scale, 1), *_strides(shift, 1),
        D=D, PARTS=row_parts(D), EPS=eps, LAYER=layer, R=R, config=config,
    )  # fmt: skip
    return outputs


def _forward_outputs(
    x: Tensor, o: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None,
    layer: bool, eps: float, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    statistics = dict(dtype=torch.float32)
    r = x.new_empty(x.shape if o is not None else 0)
    return r, x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape[:2], **statistics), x.new_empty(x.shape[:2] if layer else 0, **statistics)


def _backward(
    dy: Tensor, dr: Tensor | None, x: Tensor, o: Tensor | None, gate: Tensor | None, scale: Tensor | None, weight: Tensor | None,
    rstd: Tensor, mean: Tensor, shift_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> dx, do, dgate, dscale, dshift, dweight; those of an absent argument are empty."""
    B, N, D = x.shape
    dy, x, dr, o = (None if t is None else inner_contiguous(t) for t in (dy, x, dr, o))
    gate, scale, weight = (None if m is None else inner_contiguous(m) for m in (gate, scale, weight))
    outputs = _backward_outputs(dy, dr, x, o, gate, scale, weight, rstd, mean, shift_dtype)
    dx, do, dgate, dscale, dshift, dweight = outputs

    default = Config((power_of_two(1024 / D), 8), _warps(D, PIPELINED_WIDTH), 3 if D <= PIPELINED_WIDTH else 1)
    config = choose("adaptive_norm_bwd", (D, x.dtype, dy.dtype, gate is not None), default, x.device)
    R, programs_per_processor = config.tile
    splits = min(power_of_two(programs_per_processor * processors(x.device) / max(B, 1)), power_of_two(N / R))
    sums = {
        name: x.new_empty((B, splits, D), dtype=torch.float32) if needed else None
        for name, needed in dict(h=scale is not None or weight is not None, dy=shift_dtype is not None, gate=gate is not None).items()
    }
    layer = mean.numel() > 0
    launch(
        adaptive_norm_bwd, (B * splits,),
        dy, dr, x, o, gate, scale, weight, rstd, mean if layer else None, dx, do if o is not None else None, *sums.values(),
        N, splits, cdiv(N, splits), *_strides(dy, 2), *_strides(dr, 2), *_strides(x, 2), *_strides(o, 2), *_strides(gate, 1), *_strides(scale, 1),
        D=D, PARTS=row_parts(D), LAYER=layer, R=R, STAGES=config.stages, config=config,
    )  # fmt: skip
    if any(s is not None for s in sums.values()):
        by_sample = x.new_empty((B, D), dtype=torch.float32) if weight is not None else None
        S = min(64, 1 << (splits - 1).bit_length())
        P = 128 if B * D > 16384 else 16  # few samples have many partials: narrow columns make enough programs
        given = [t if t.numel() else None for t in (dscale, dshift, dgate)]
        launch(
            adaptive_norm_sums, (B, cdiv(D, P)), *sums.values(), scale, weight, *given, by_sample,
            splits, D, *_strides(scale, 1), S=S, P=P, config=Config((S, P), warps=8),
        )  # fmt: skip
        if by_sample is not None:
            torch.sum(by_sample, 0, out=dweight)
    return outputs


def _backward_outputs(
    dy: Tensor, dr: Tensor | None, x: Tensor, o: Tensor | None, gate: Tensor | None, scale: Tensor | None, weight: Tensor | None,
    rstd: Tensor, mean: Tensor, shift_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, _, D = x.shape

    def like(tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        return x.new_empty(0 if tensor is None else shape, dtype=None if tensor is None else tensor.dtype)

    dshift = x.new_empty(0 if shift_dtype is None else (B, D), dtype=shift_dtype)
    dweight = x.new_empty(0 if weight is None else D, dtype=torch.float32)
    return x.new_empty(x.shape), like(o, x.shape), like(gate, (B, D)), like(scale, (B, D)), dshift, dweight


def _warps(D: int, width: int) -> int:
    """Four for rows up to `width`, whose values then fit the registers; more for wider ones, at most what a program can have."""
    return min(32, 4 * (1 << (cdiv(D, width) - 1).bit_length()))


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()[:count]


_forward_op = register(
    "adaptive_norm_fwd",
    "(Tensor x, Tensor? o, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, bool layer, float eps, ScalarType out_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_outputs,
)
_backward_op = register(
    "adaptive_norm_bwd",
    "(Tensor dy, Tensor? dr, Tensor x, Tensor? o, Tensor? gate, Tensor? scale, Tensor? weight, Tensor rstd, Tensor mean,"
    " ScalarType? shift_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_outputs,
)


class _AdaptiveNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, o, gate, scale, shift, weight, layer, eps, out_dtype):
        r, y, rstd, mean = _forward_op(x, o, gate, scale, shift, weight, layer, eps, out_dtype)
        ctx.save_for_backward(x, o, gate, scale, weight, rstd, mean)
        ctx.shift_dtype = None if shift is None else shift.dtype
        ctx.out_dtype = out_dtype
        ctx.set_materialize_grads(False)
        return r, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dr, dy):
        x, o, gate, scale, weight, rstd, mean = ctx.saved_tensors
        if dy is None:
            dy = x.new_zeros(x.shape, dtype=ctx.out_dtype)
        if o is None:
            dr = None
        dx, do, dgate, dscale, dshift, dweight = _backward_op(dy, dr, x, o, gate, scale, weight, rstd, mean, ctx.shift_dtype)
        absent = None
        return (
            dx, absent if o is None else do, absent if gate is None else dgate, absent if scale is None else dscale,
            absent if ctx.shift_dtype is None else dshift, absent if weight is None else dweight.to(weight.dtype), None, None, None,
        )  # fmt: skip


def why_not_kernel(x: Tensor, out_dtype: torch.dtype) -> str | None:
    """A reason for `use_triton`, if x (..., D) or the result's dtype is outside of what these kernels take."""
    if x.shape[-1] > MAX_WIDTH:
        return f"takes rows of at most {MAX_WIDTH}, got {x.shape[-1]}"
    if x.numel() // x.shape[-1] >= 2**31:
        return f"counts rows in 32 bits, got {x.numel() // x.shape[-1]}"
    return None if out_dtype in STORAGE_DTYPES else f"writes float32, bfloat16 and float16, got {out_dtype}"


def adaptive_norm(
    x: Tensor, o: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None,
    layer: bool, eps: float, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x, o (B, N, D), gate, scale, shift (B, D), weight (D,) -> r (x's dtype; empty without o), y (out_dtype), both (B, N, D)."""
    return _AdaptiveNorm.apply(x, o, gate, scale, shift, weight, layer, eps, out_dtype)
