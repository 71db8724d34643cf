"""Pieces of kernels for attention heads: rows of Dh elements, normalised and turned in registers.

`qk_norm_rope` and `qk_norm_rope_attention` share them. As in `_tiles.py`, a row is a tuple of tiles [R, P]; 72 = 64 + 8.
"""

import math

from .._compat import tl, triton
from .._tiles import load_vector, row_dot, row_sum


def alignment(*strides: int) -> int:
    """Elements, up to 16, that divide every offset made of these strides.

    A head of 72 starts at a multiple of 8, which Triton cannot see in a stride that is an argument (it looks for 16), and
    without which it would load element by element.
    """
    return math.gcd(16, *strides)


@triton.jit
def zero_rows(R: tl.constexpr, PARTS: tl.constexpr):
    """R rows of fp32 zeros; `tl.full` as in `zero_vector`."""
    rows = ()
    for i in tl.static_range(len(PARTS)):
        rows = rows + (tl.full((R, PARTS[i]), 0.0, tl.float32),)
    return rows


@triton.jit
def turned(row, cosines, sines, R: tl.constexpr, PARTS: tl.constexpr):
    """Each pair of a row as a complex number, times cos + i sin. A rotation: its backward is the same with -sin.

    cosines, sines: tiles [R, P / 2] or [1, P / 2]. A thread holds whole pairs, so split and join move nothing.
    """
    out = ()
    for i in tl.static_range(len(PARTS)):
        real, imaginary = tl.split(tl.reshape(row[i], (R, PARTS[i] // 2, 2)))
        pair = tl.join(real * cosines[i] - imaginary * sines[i], imaginary * cosines[i] + real * sines[i])
        out = out + (tl.reshape(pair, (R, PARTS[i])),)
    return out


@triton.jit
def standardized(row, in_R, LAYER: tl.constexpr, EPS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
    """h = (row - mean) · rstd, the mean 0 unless LAYER; rows outside in_R give 0 -> h, rstd [R]."""
    if LAYER:
        mean_R = row_sum(row, PARTS) / D
        centred = ()
        start = 0
        for i in tl.static_range(len(PARTS)):
            in_P = start + tl.arange(0, PARTS[i]) < D  # columns past D stay zero, so that the variance is that of D columns
            centred = centred + (tl.where(in_P[None, :], row[i] - mean_R[:, None], 0.0),)
            start = start + PARTS[i]
        row = centred
    rstd_R = tl.where(in_R, tl.rsqrt(row_dot(row, row, PARTS) / D + EPS), 0.0)  # eps may be 0: no 0 · inf in sums over rows
    h = ()
    for i in tl.static_range(len(PARTS)):
        h = h + (row[i] * rstd_R[:, None],)
    return h, rstd_R


@triton.jit
def normalized_head(row, in_R, weight, bias, NORM: tl.constexpr, EPS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
    """norm(row) · weight + bias; NORM None leaves the row as it is."""
    if NORM is not None:
        row, rstd_R = standardized(row, in_R, NORM == "layer", EPS, D, PARTS)
    if weight is not None:
        row = scaled(row, load_vector(weight, D, PARTS), PARTS)
    if bias is not None:
        row = shifted(row, load_vector(bias, D, PARTS), PARTS)
    return row


@triton.jit
def scaled(row, vector, PARTS: tl.constexpr):
    """row · vector, column by column."""
    out = ()
    for i in tl.static_range(len(PARTS)):
        out = out + (row[i] * vector[i][None, :],)
    return out


@triton.jit
def shifted(row, vector, PARTS: tl.constexpr):
    """row + vector, column by column."""
    out = ()
    for i in tl.static_range(len(PARTS)):
        out = out + (row[i] + vector[i][None, :],)
    return out


@triton.jit
def added(a, b, PARTS: tl.constexpr):
    """a + b, both rows."""
    out = ()
    for i in tl.static_range(len(PARTS)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def added_products(sums, a, b, PARTS: tl.constexpr):
    """sums + a · b, all rows."""
    out = ()
    for i in tl.static_range(len(PARTS)):
        out = out + (sums[i] + a[i] * b[i],)
    return out
