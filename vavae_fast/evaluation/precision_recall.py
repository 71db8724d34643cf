"""Precision and recall by nearest-neighbour manifolds: Kynkäänniemi et al. 2019, algorithm 1.

A set's manifold is the union of the balls around its points that reach to their k-th neighbour. Precision: the share of
samples inside the reference's manifold; recall: the share of the reference inside the samples'. ADM's protocol: pool_3
features, k = 3, 10,000 reference images against 50,000 samples; its distances are fp16, these are exact.
"""

import torch
from torch import Tensor

from vavae_fast.evaluation import distances
from vavae_fast.evaluation.inputs import Array, finite_tensor, integer


def precision_recall(reference_features: Array, sample_features: Array, k: int = 3) -> tuple[float, float]:
    """(precision, recall) of reference (N, D) and samples (M, D); computed on the reference's device.

    k does not count the point itself, a copy of it does count; the border belongs to a ball (<=). `ValueError`: NaN or
    infinity, different D, k not an integer from 1 on, k points or fewer in a set.
    """
    reference = finite_tensor(reference_features, "reference_features", "N, D")
    samples = finite_tensor(sample_features, "sample_features", "N, D").to(reference.device)
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(f"reference_features have {reference.shape[1]} dimensions, sample_features have {samples.shape[1]}")
    fewest = min(len(reference), len(samples))
    if integer(k, "k", 1) >= fewest:
        raise ValueError(f"k: must be below the number of points in either set, {fewest}; got {k}")
    return _share_inside(samples, reference, k), _share_inside(reference, samples, k)


def _share_inside(points: Tensor, centres: Tensor, k: int) -> float:
    """The share of `points` within the k-th neighbour's distance of at least one of `centres`."""
    radius = distances.nearest(centres, centres, k, skip_self=True)[0][:, -1]  # squared
    centre = centres.mean(dim=0, dtype=torch.float64)
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for start, rows in distances.blocks(points, centre):
        here = inside[start : start + len(rows)]  # a view
        for first, columns in distances.blocks(centres, centre):
            margin, rounding = distances.expanded(rows, columns)
            margin -= radius[first : first + len(columns)]
            here |= (margin <= -rounding).any(dim=1)
            undecided = (margin.abs() < rounding) & ~here[:, None]
            for pairs in undecided.nonzero().split(distances.BLOCK):
                row, column = pairs.unbind(dim=1)
                on_border = distances.exact(points[start + row], centres[first + column]) <= radius[first + column]
                here[row[on_border]] = True
    return inside.double().mean().item()
