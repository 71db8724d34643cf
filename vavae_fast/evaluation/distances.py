"""Euclidean distances between many points: matrix products find the pairs that matter, direct sums give their distances.

|a|^2 + |b|^2 - 2 a.b is fast and loses digits where a is near b; sum (a - b)^2 is exact for copies and the same in both
directions. Everything goes in blocks, so that memory does not grow with the number of points.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2048  # rows at a time: 32 MB in fp64 at 2,048 dimensions
_SPARE = 4  # candidates kept beyond the k nearest, so that rounding does not decide between near ties
_EPS = torch.finfo(torch.float64).eps


def expanded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of all pairs of a (n, D) and b (m, D), fp64, and a bound of their rounding error: (n, m) each."""
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    return (squares - 2 * (a @ b.mT)).clamp_(min=0), squares * (4 * (a.shape[1] + 4) * _EPS)


def exact(a: Tensor, b: Tensor) -> Tensor:
    """sum (a - b)^2 over the last dimension, fp64."""
    return (a.to(torch.float64) - b.to(torch.float64)).square().sum(dim=-1)


def blocks(points: Tensor, centre: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(start, rows - centre in fp64): distances stay, and the expanded form keeps more of their digits."""
    for start in range(0, len(points), BLOCK):
        yield start, points[start : start + BLOCK].to(torch.float64) - centre


def nearest(points: Tensor, others: Tensor, k: int, skip_self: bool = False) -> tuple[Tensor, Tensor]:
    """The k nearest of `others` (M, D) to each of `points` (N, D): squared distances rising, fp64, and indices; (N, k) each.

    `skip_self`: points are the others; row i is not its own neighbour, a copy of it is.
    """
    centre = others.mean(dim=0, dtype=torch.float64)
    candidates = min(k + _SPARE, len(others) - skip_self)
    squared, indices = [], []
    for start, rows in blocks(points, centre):
        best, where = rows.new_empty(len(rows), 0), rows.new_empty(len(rows), 0, dtype=torch.int64)
        for first, columns in blocks(others, centre):
            found, _ = expanded(rows, columns)
            if skip_self and first == start:
                found.fill_diagonal_(torch.inf)
            names = torch.arange(first, first + len(columns), device=found.device).expand_as(found)
            found, names = torch.cat((best, found), dim=1), torch.cat((where, names), dim=1)
            best, order = found.topk(min(candidates, found.shape[1]), dim=1, largest=False)
            where = names.gather(1, order)
        where = where[:, :candidates]
        distance, order = exact(points[start : start + len(rows), None], others[where]).sort(dim=1, stable=True)
        squared.append(distance[:, :k])
        indices.append(where.gather(1, order)[:, :k])
    return torch.cat(squared), torch.cat(indices)
