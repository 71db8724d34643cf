"""Pieces of kernels: rows as tuples of tiles. Arithmetic is fp32; a value is rounded once, where it is stored.

A row of D elements is held as a tuple of tiles [R, part], one for each power of two in PARTS (`_launch.row_parts`), so that no
lane idles at D = 1152. Letters in names: R rows of a tile, P columns of a part, D the row.
"""

from ._compat import tl, triton


@triton.jit
def load_rows(pointer, offset_R, in_R, D: tl.constexpr, PARTS: tl.constexpr):
    """Rows at element offsets offset_R (int64) in fp32; zero in rows outside in_R and columns past D."""
    row = ()
    start = 0
    for i in tl.static_range(len(PARTS)):
        column_P = start + tl.arange(0, PARTS[i])
        mask_RP = in_R[:, None] & (column_P < D)[None, :]
        tile_RP = tl.load(pointer + offset_R[:, None] + column_P[None, :], mask=mask_RP, other=0.0)
        row = row + (tile_RP.to(tl.float32),)
        start = start + PARTS[i]
    return row


@triton.jit
def store_rows(pointer, offset_R, in_R, row, D: tl.constexpr, PARTS: tl.constexpr):
    """The inverse of `load_rows`, rounded to the pointer's dtype."""
    start = 0
    for i in tl.static_range(len(PARTS)):
        column_P = start + tl.arange(0, PARTS[i])
        mask_RP = in_R[:, None] & (column_P < D)[None, :]
        tl.store(pointer + offset_R[:, None] + column_P[None, :], row[i].to(pointer.dtype.element_ty), mask=mask_RP)
        start = start + PARTS[i]


@triton.jit
def load_vector(pointer, D: tl.constexpr, PARTS: tl.constexpr):
    """One vector of D elements in fp32, as tiles [P]; zero past D."""
    vector = ()
    start = 0
    for i in tl.static_range(len(PARTS)):
        column_P = start + tl.arange(0, PARTS[i])
        vector = vector + (tl.load(pointer + column_P, mask=column_P < D, other=0.0).to(tl.float32),)
        start = start + PARTS[i]
    return vector


@triton.jit
def store_vector(pointer, vector, D: tl.constexpr, PARTS: tl.constexpr):
    """The inverse of `load_vector`, rounded to the pointer's dtype."""
    start = 0
    for i in tl.static_range(len(PARTS)):
        column_P = start + tl.arange(0, PARTS[i])
        tl.store(pointer + column_P, vector[i].to(pointer.dtype.element_ty), mask=column_P < D)
        start = start + PARTS[i]


@triton.jit
def zero_vector(PARTS: tl.constexpr):
    """Tiles [P] of fp32 zeros. Not by `tl.zeros`: Triton 3.6 passes no element of a constant tuple to a function of its library."""
    vector = ()
    for i in tl.static_range(len(PARTS)):
        vector = vector + (tl.full((PARTS[i],), 0.0, tl.float32),)
    return vector


@triton.jit
def row_sum(row, PARTS: tl.constexpr):
    """Sum over a row's D elements: [R]."""
    total_R = tl.sum(row[0], 1)
    for i in tl.static_range(1, len(PARTS)):
        total_R += tl.sum(row[i], 1)
    return total_R


@triton.jit
def row_dot(a, b, PARTS: tl.constexpr):
    """Sum over a row of a · b: [R]."""
    total_R = tl.sum(a[0] * b[0], 1)
    for i in tl.static_range(1, len(PARTS)):
        total_R += tl.sum(a[i] * b[i], 1)
    return total_R
