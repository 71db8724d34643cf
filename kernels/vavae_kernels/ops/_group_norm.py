"""The kernels behind `group_norm_silu`: three forward, three backward, and two sums over the batch.

    forward    moments      mean and squared deviations of each channel, over a part of its pixels      reads x
               statistics   those of a group's channels and parts merged (Chan et al. 1983): mean_g, rstd_g
               apply        n = h · w_c + b_c with h = (x - mean_g) · rstd_g;  y = n · sigmoid(n)       reads x, writes y

    backward   sums         S_c = Σ dn and H_c = Σ dn · h over a part of the pixels,                    reads x, dy
                            dn = dy · s (1 + n (1 - s)) with s = sigmoid(n)
               group sums   S_bc and H_bc of a sample;  S_g = Σ_c w_c S_bc / m,  H_g = Σ_c w_c H_bc / m,  m = M N
               dx           rstd_g · (w_c dn - S_g - h H_g)                                             reads x, dy, writes dx
               dw_c = Σ_b H_bc,   db_c = Σ_b S_bc

The variance is never E[x²] - E[x]²: each lane follows its own mean (Welford 1962), so that a group far from zero keeps its
digits. What a part of the pixels gives is [B, S, C], S parts: no atomics, bitwise repeatable.

A tile is P pixels by K channels, read through the strides of x (B, C, N). Channels-last, NCHW and a chunk of channels differ only
in the tile that suits them, and x and dy may differ from each other. M = C / G channels a group.
"""

import torch
from torch import Tensor

from .._compat import tl, triton
from .._launch import Config, cdiv, choose, launch, processors
from .._registry import register
from ._layout import memory_format

LEAST_PIXELS = 64  # of a part: its two fp32 sums a channel are then a thirtieth of what it reads, or less


@triton.jit
def group_norm_moments(
    x, means, deviations,
    N, C, x_b, x_c, x_n, SPLITS, PIXELS,
    P: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: PIXELS pixels of K channels of one sample. means, deviations (B, SPLITS, C)."""
    b, split, c_K = _part(C, SPLITS, K)
    in_K = c_K < C
    x_K = x + b * x_b + c_K.to(tl.int64) * x_c
    count_P = tl.zeros((P,), tl.float32)
    mean_PK = tl.zeros((P, K), tl.float32)
    deviation_PK = tl.zeros((P, K), tl.float32)
    for first in tl.range(0, PIXELS, P, num_stages=STAGES):
        n_P, in_P = _pixels(split, first, N, PIXELS, P)
        x_PK = _load(x_K, n_P, x_n, in_P, in_K)
        count_P += in_P.to(tl.float32)
        share_P = 1.0 / tl.maximum(count_P, 1.0)
        off_PK = tl.where(in_P[:, None], x_PK - mean_PK, 0.0)
        mean_PK += off_PK * share_P[:, None]
        deviation_PK += off_PK * (x_PK - mean_PK)
    mean_K, deviation_K = _merged(count_P[:, None], mean_PK, deviation_PK)
    out_K = (b * SPLITS + split) * C + c_K
    tl.store(means + out_K, mean_K, mask=in_K)
    tl.store(deviations + out_K, deviation_K, mask=in_K)


@triton.jit
def group_norm_statistics(means, deviations, mean, rstd, N, C, SPLITS, PIXELS, M: tl.constexpr, EPS: tl.constexpr, L: tl.constexpr):
    """One program: the SPLITS · M moments of one group of one sample, L at a time."""
    groups = C // M
    b = (tl.program_id(0) // groups).to(tl.int64)
    first_channel = (tl.program_id(0) % groups) * M
    count_L = tl.zeros((L,), tl.float32)
    mean_L = tl.zeros((L,), tl.float32)
    deviation_L = tl.zeros((L,), tl.float32)
    for first in range(0, SPLITS * M, L):
        i_L = first + tl.arange(0, L)
        in_L = i_L < SPLITS * M
        split_L = i_L // M
        at_L = (b * SPLITS + split_L) * C + first_channel + i_L % M
        off_L = tl.load(means + at_L, mask=in_L, other=0.0) - mean_L
        more_L = tl.where(in_L, tl.minimum(N - split_L * PIXELS, PIXELS), 0).to(tl.float32)
        share_L = more_L / tl.maximum(count_L + more_L, 1.0)
        mean_L += off_L * share_L
        deviation_L += tl.load(deviations + at_L, mask=in_L, other=0.0) + off_L * off_L * count_L * share_L
        count_L += more_L
    mean_of_group, deviation = _merged(count_L, mean_L, deviation_L)
    tl.store(mean + tl.program_id(0), mean_of_group)
    tl.store(rstd + tl.program_id(0), tl.rsqrt(deviation / tl.maximum(tl.sum(count_L, 0), 1.0) + EPS))


@triton.jit
def group_norm_apply(
    x, mean, rstd, weight, bias, y,
    N, C, x_b, x_c, x_n, y_b, y_c, y_n, SPLITS,
    M: tl.constexpr, SILU: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One program: P pixels of K channels of one sample."""
    b, split, c_K = _part(C, SPLITS, K)
    in_K = c_K < C
    n_P, in_P = _pixels(split, 0, N, P, P)
    mean_K, rstd_K, weight_K, bias_K = _of_channels(mean, rstd, weight, bias, b, c_K, C, M)
    x_PK = _load(x + b * x_b + c_K.to(tl.int64) * x_c, n_P, x_n, in_P, in_K)
    out_PK = (x_PK - mean_K[None, :]) * (rstd_K * weight_K)[None, :] + bias_K[None, :]
    if SILU:
        out_PK *= tl.sigmoid(out_PK)
    _store(y + b * y_b + c_K.to(tl.int64) * y_c, out_PK, n_P, y_n, in_P, in_K)


@triton.jit
def group_norm_sums(
    dy, x, mean, rstd, weight, bias, sums_dn, sums_h,
    N, C, dy_b, dy_c, dy_n, x_b, x_c, x_n, SPLITS, PIXELS,
    M: tl.constexpr, SILU: tl.constexpr, P: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: S_c and H_c of K channels over PIXELS pixels of one sample. sums_dn, sums_h (B, SPLITS, C)."""
    b, split, c_K = _part(C, SPLITS, K)
    in_K = c_K < C
    mean_K, rstd_K, weight_K, bias_K = _of_channels(mean, rstd, weight, bias, b, c_K, C, M)
    dy_K = dy + b * dy_b + c_K.to(tl.int64) * dy_c
    x_K = x + b * x_b + c_K.to(tl.int64) * x_c
    sum_dn_PK = tl.zeros((P, K), tl.float32)
    sum_h_PK = tl.zeros((P, K), tl.float32)
    for first in tl.range(0, PIXELS, P, num_stages=STAGES):
        n_P, in_P = _pixels(split, first, N, PIXELS, P)
        dn_PK = _load(dy_K, n_P, dy_n, in_P, in_K)  # zero outside, and so adds nothing
        h_PK = (_load(x_K, n_P, x_n, in_P, in_K) - mean_K[None, :]) * rstd_K[None, :]
        if SILU:
            dn_PK *= _silu_slope(h_PK * weight_K[None, :] + bias_K[None, :])
        sum_dn_PK += dn_PK
        sum_h_PK += dn_PK * h_PK
    out_K = (b * SPLITS + split) * C + c_K
    tl.store(sums_dn + out_K, tl.sum(sum_dn_PK, 0), mask=in_K)
    tl.store(sums_h + out_K, tl.sum(sum_h_PK, 0), mask=in_K)


@triton.jit
def group_norm_group_sums(
    sums_dn, sums_h, weight, by_channel_dn, by_channel_h, by_group_dn, by_group_h, N, C, SPLITS, M: tl.constexpr, K: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """One program: the M channels of one group of one sample, S parts at a time. by_channel (B, C), by_group (B, G)."""
    groups = C // M
    b = (tl.program_id(0) // groups).to(tl.int64)
    c_K = (tl.program_id(0) % groups) * M + tl.arange(0, K)
    in_K = tl.arange(0, K) < M
    dn_SK = tl.zeros((S, K), tl.float32)
    h_SK = tl.zeros((S, K), tl.float32)
    for first in range(0, SPLITS, S):
        split_S = first + tl.arange(0, S)
        at_SK = (b * SPLITS + split_S)[:, None] * C + c_K[None, :]
        in_SK = (split_S < SPLITS)[:, None] & in_K[None, :]
        dn_SK += tl.load(sums_dn + at_SK, mask=in_SK, other=0.0)
        h_SK += tl.load(sums_h + at_SK, mask=in_SK, other=0.0)
    dn_K = tl.sum(dn_SK, 0)
    h_K = tl.sum(h_SK, 0)
    tl.store(by_channel_dn + b * C + c_K, dn_K, mask=in_K)
    tl.store(by_channel_h + b * C + c_K, h_K, mask=in_K)
    weight_K = tl.load(weight + c_K, mask=in_K, other=0.0).to(tl.float32)
    tl.store(by_group_dn + tl.program_id(0), tl.sum(weight_K * dn_K, 0) / M / N)
    tl.store(by_group_h + tl.program_id(0), tl.sum(weight_K * h_K, 0) / M / N)


@triton.jit
def group_norm_dx(
    dy, x, mean, rstd, weight, bias, by_group_dn, by_group_h, dx,
    N, C, dy_b, dy_c, dy_n, x_b, x_c, x_n, dx_b, dx_c, dx_n, SPLITS,
    M: tl.constexpr, SILU: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One program: P pixels of K channels of one sample."""
    b, split, c_K = _part(C, SPLITS, K)
    in_K = c_K < C
    n_P, in_P = _pixels(split, 0, N, P, P)
    mean_K, rstd_K, weight_K, bias_K = _of_channels(mean, rstd, weight, bias, b, c_K, C, M)
    of_dn_K, of_h_K, _, _ = _of_channels(by_group_dn, by_group_h, weight, bias, b, c_K, C, M)
    dn_PK = _load(dy + b * dy_b + c_K.to(tl.int64) * dy_c, n_P, dy_n, in_P, in_K)
    h_PK = (_load(x + b * x_b + c_K.to(tl.int64) * x_c, n_P, x_n, in_P, in_K) - mean_K[None, :]) * rstd_K[None, :]
    if SILU:
        dn_PK *= _silu_slope(h_PK * weight_K[None, :] + bias_K[None, :])
    dx_PK = (dn_PK * weight_K[None, :] - of_dn_K[None, :] - h_PK * of_h_K[None, :]) * rstd_K[None, :]
    _store(dx + b * dx_b + c_K.to(tl.int64) * dx_c, dx_PK, n_P, dx_n, in_P, in_K)


@triton.jit
def _part(C, SPLITS, K: tl.constexpr):
    """This program's sample (int64), part of the pixels, and channels. Channels turn fastest: neighbours read the same pixels."""
    blocks = tl.cdiv(C, K)
    part = tl.program_id(0) // blocks
    return (part // SPLITS).to(tl.int64), part % SPLITS, (tl.program_id(0) % blocks) * K + tl.arange(0, K)


@triton.jit
def _pixels(split, first, N, PIXELS, P: tl.constexpr):
    """Pixels `first` to first + P of a part (int64), and which of them exist. PIXELS is a multiple of P."""
    n_P = split.to(tl.int64) * PIXELS + first + tl.arange(0, P)
    return n_P, n_P < N


@triton.jit
def _load(x_K, n_P, x_n, in_P, in_K):
    """Pixels n_P of the channels at x_K, in fp32; zero where there is none."""
    return tl.load(x_K[None, :] + n_P[:, None] * x_n, mask=in_P[:, None] & in_K[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(x_K, x_PK, n_P, x_n, in_P, in_K):
    """The inverse of `_load`, rounded to the pointer's dtype."""
    tl.store(x_K[None, :] + n_P[:, None] * x_n, x_PK.to(x_K.dtype.element_ty), mask=in_P[:, None] & in_K[None, :])


@triton.jit
def _of_channels(mean, rstd, weight, bias, b, c_K, C, M: tl.constexpr):
    """What each of the channels c_K of sample b takes from its group, and its own weight and bias."""
    in_K = c_K < C
    group_K = b * (C // M) + c_K // M
    return (
        tl.load(mean + group_K, mask=in_K, other=0.0),
        tl.load(rstd + group_K, mask=in_K, other=0.0),
        tl.load(weight + c_K, mask=in_K, other=0.0).to(tl.float32),
        tl.load(bias + c_K, mask=in_K, other=0.0).to(tl.float32),
    )


@triton.jit
def _silu_slope(n):
    s = tl.sigmoid(n)
    return s * (1.0 + n * (1.0 - s))


@triton.jit
def _merged(count, mean, deviation):
    """Mean and squared deviations over axis 0 of sets that have `count` elements each."""
    pivot = tl.max(mean, 0)  # any value amid the means: differences are small, and so is their rounding
    total = tl.maximum(tl.sum(count, 0), 1.0)
    merged = pivot + tl.sum(count * (mean - pivot), 0) / total
    off = mean - merged
    return merged, tl.sum(deviation + count * off * off, 0)


def _forward(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, mean (B, G), rstd (B, G)."""
    y, mean, rstd = outputs = _forward_outputs(x, groups, weight, bias, eps, silu)
    weight, bias = weight.contiguous(), bias.contiguous()
    x, y = x.flatten(2), y.flatten(2)
    B, C, N = x.shape
    M = C // groups

    config = choose("group_norm_moments", _key(x), Config((*_tile(x), 4), stages=4), x.device)
    P, K, programs = config.tile
    splits, pixels = _parts(x, P, K, programs)
    means, deviations = mean.new_empty((B, splits, C)), mean.new_empty((B, splits, C))
    launch(
        group_norm_moments, (B * splits * cdiv(C, K),),
        x, means, deviations, N, C, *x.stride(), splits, pixels, P=P, K=K, STAGES=config.stages, config=config,
    )  # fmt: skip
    launch(group_norm_statistics, (B * groups,), means, deviations, mean, rstd, N, C, splits, pixels, M=M, EPS=eps, L=128, config=Config((128,)))

    config = choose("group_norm_apply", _key(x, y), Config(_tile(x, y, elements=4096), 8), x.device)
    P, K = config.tile
    launch(
        group_norm_apply, (B * cdiv(N, P) * cdiv(C, K),),
        x, mean, rstd, weight, bias, y, N, C, *x.stride(), *y.stride(), cdiv(N, P), M=M, SILU=silu, P=P, K=K, config=config,
    )  # fmt: skip
    return outputs


def _forward_outputs(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    of_group = (x.shape[0], groups)
    y = torch.empty_like(x, memory_format=memory_format(x))
    return y, x.new_empty(of_group, dtype=torch.float32), x.new_empty(of_group, dtype=torch.float32)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx, and dweight, dbias in fp32."""
    dx, dweight, dbias = outputs = _backward_outputs(dy, x, weight, bias, mean, rstd, silu)
    weight, bias = weight.contiguous(), bias.contiguous()
    dy, x, dx = dy.flatten(2), x.flatten(2), dx.flatten(2)
    B, C, N = x.shape
    groups = mean.shape[1]
    M = C // groups

    config = choose("group_norm_sums", _key(dy, x), Config((*_tile(dy, x), 4), stages=3), x.device)
    P, K, programs = config.tile
    splits, pixels = _parts(x, P, K, programs)
    sums_dn, sums_h = mean.new_empty((B, splits, C)), mean.new_empty((B, splits, C))
    launch(
        group_norm_sums, (B * splits * cdiv(C, K),),
        dy, x, mean, rstd, weight, bias, sums_dn, sums_h, N, C, *dy.stride(), *x.stride(), splits, pixels,
        M=M, SILU=silu, P=P, K=K, STAGES=config.stages, config=config,
    )  # fmt: skip
    by_channel = mean.new_empty((B, C)), mean.new_empty((B, C))
    by_group = torch.empty_like(mean), torch.empty_like(mean)
    lanes = triton.next_power_of_2(M)
    launch(
        group_norm_group_sums, (B * groups,), sums_dn, sums_h, weight, *by_channel, *by_group, N, C, splits,
        M=M, K=lanes, S=max(1, 256 // lanes), config=Config(()),
    )  # fmt: skip
    for total, of_samples in zip((dbias, dweight), by_channel):
        torch.sum(of_samples, 0, out=total)

    config = choose("group_norm_dx", _key(dy, x, dx), Config(_tile(dy, x, dx, elements=4096), 8), x.device)
    P, K = config.tile
    launch(
        group_norm_dx, (B * cdiv(N, P) * cdiv(C, K),),
        dy, x, mean, rstd, weight, bias, *by_group, dx, N, C, *dy.stride(), *x.stride(), *dx.stride(), cdiv(N, P),
        M=M, SILU=silu, P=P, K=K, config=config,
    )  # fmt: skip
    return outputs


def _backward_outputs(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=memory_format(x))
    return dx, weight.new_empty(weight.shape, dtype=torch.float32), bias.new_empty(bias.shape, dtype=torch.float32)


def _tile(*images: Tensor, elements: int = 2048) -> tuple[int, int]:
    """P pixels by K channels: long along the axis that is dense in every image (B, C, N), square where none is."""
    _, C, N = images[0].shape
    if all(image.stride(1) <= 1 for image in images):
        longest = 128
    elif all(image.stride(2) <= 1 for image in images):
        longest = elements // min(elements, triton.next_power_of_2(max(N, 1)))
    else:
        longest = 64
    K = min(longest, triton.next_power_of_2(C))
    return elements // K, K


def _parts(x: Tensor, P: int, K: int, programs: int) -> tuple[int, int]:
    """-> parts of the N pixels, pixels of a part (a multiple of P): `programs` programs a processor or fewer, so all run at once."""
    B, C, N = x.shape
    wanted = programs * processors(x.device) // max(B * cdiv(C, K), 1)
    splits = max(1, min(wanted, N // max(LEAST_PIXELS, P)))
    pixels = max(1, cdiv(N, splits * P)) * P
    return max(1, cdiv(N, pixels)), pixels


def _key(*images: Tensor) -> tuple[int | torch.dtype, ...]:
    """Of a launch configuration: C, N, dtype, and each image's dense axis, 1 for channels and 2 for pixels."""
    return (*images[0].shape[1:], images[0].dtype, *(1 if image.stride(1) <= 1 else 2 for image in images))


_forward_op = register(
    "group_norm_silu_fwd",
    "(Tensor x, int groups, Tensor weight, Tensor bias, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_outputs,
)
_backward_op = register(
    "group_norm_silu_bwd",
    "(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, bool silu) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_outputs,
)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, silu):
        y, mean, rstd = _forward_op(x, groups, weight, bias, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu = silu
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = _backward_op(dy, x, weight, bias, mean, rstd, ctx.silu)
        return dx, None, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """x (B, C, H, W), weight, bias (C,) -> (B, C, H, W) in x's dtype and memory format."""
    return _GroupNormSiLU.apply(x, groups, weight, bias, eps, silu)
