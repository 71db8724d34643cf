"""Precision and recall against a direct reading of the definition, with borders and copies."""

import numpy as np
import pytest
import torch

from vavae_fast.evaluation import distances, precision_recall


def share_inside(points, centres, k):
    between = np.sort(((centres[:, None] - centres[None]) ** 2).sum(-1), axis=1)
    radius = between[:, k]  # column 0 is the point itself
    return ((((points[:, None] - centres[None]) ** 2).sum(-1) <= radius).any(1)).mean()


def brute_force(reference, samples, k):
    return share_inside(samples, reference, k), share_inside(reference, samples, k)


def clouds(n, m, d, seed):
    rng = np.random.default_rng(seed)
    return rng.random((n, d)), rng.random((m, d)) + 0.6 * np.eye(d)[0]  # cubes that overlap by 0.4


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("d", [2, 5])
def test_matches_the_definition(k, d):
    reference, samples = clouds(90, 130, d, seed=k)
    expected = brute_force(reference, samples, k)
    assert 0 < min(expected) and max(expected) < 1, "the case must be able to tell"
    assert precision_recall(reference, samples, k) == pytest.approx(expected, abs=0)


@pytest.mark.parametrize("block", [3, 16, 64])
def test_does_not_move_with_the_block_size(monkeypatch, block):
    reference, samples = clouds(30, 40, 4, seed=0)
    whole = precision_recall(reference, samples)
    monkeypatch.setattr(distances, "BLOCK", block)
    assert precision_recall(reference, samples) == whole


def test_grid_points_lie_on_borders_and_belong():
    """On integers every neighbour is a tie; -1 and 6 sit on borders of the line, its ends on borders of theirs."""
    line = np.arange(6.0)[:, None]
    assert precision_recall(line, np.array([[-1.0], [6.0], [7.0], [-2.0], [20.0]]), k=1) == pytest.approx((2 / 5, 2 / 6))


def test_border_far_from_the_origin():
    """A sample at exactly the radius, where products of coordinates near 1e4 have lost the digits that decide."""
    rng = np.random.default_rng(1)
    reference = (rng.standard_normal((40, 3)) + 1e4).astype(np.float32)
    assert precision_recall(reference, reference[::-1].copy(), 1) == (1.0, 1.0)
    pair = np.array([[0.0, 0.1], [0.3, 0.7], [50.0, 50.0], [50.0, 51.0]]) + 1e4
    mirrored = np.concatenate([2 * pair[:1] - pair[1:2], pair[2:] + 30])
    assert precision_recall(pair, mirrored, 1) == brute_force(pair, mirrored, 1)


def test_nearest_where_products_cannot_tell():
    """Neighbours 1e-6 away between clusters 1e6 apart: the products' rounding is 1e-4, so only direct sums find the order."""
    rng = np.random.default_rng(2)
    clusters = np.repeat(rng.standard_normal((20, 3)) * 1e6, 4, axis=0)
    points = torch.from_numpy(clusters + rng.standard_normal((80, 3)) * 1e-6)
    squared, index = distances.nearest(points, points, k=1, skip_self=True)
    between = (points[:, None] - points[None]).square().sum(-1).fill_diagonal_(float("inf"))
    assert torch.equal(squared[:, 0], between.amin(1)) and torch.equal(index[:, 0], between.argmin(1))


def test_copies_count_as_neighbours():
    """With a copy of each point the first neighbour is at distance 0, so k = 1 balls hold nothing but their centre."""
    points = np.arange(5.0)[:, None]
    doubled = np.concatenate([points, points])
    assert precision_recall(doubled, np.array([[0.0], [0.4], [1.0], [9.0]]), k=1)[0] == pytest.approx(0.5)
    assert precision_recall(doubled, np.array([[0.0], [0.4], [1.0], [4.4]]), k=2)[0] == pytest.approx(1.0)


def test_same_set_and_far_sets():
    x = torch.randn(50, 8)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)


def test_collapse_keeps_precision_and_loses_recall():
    x = torch.randn(200, 2)
    precision, recall = precision_recall(x, x[:1] + 1e-3 * torch.randn(200, 2))
    assert precision == 1.0 and recall < 0.05


@pytest.mark.parametrize(
    "reference, samples, k, message",
    [
        (np.zeros((9, 2)), np.zeros((9, 3)), 3, "2 dimensions"),
        (np.zeros((9, 2)), np.zeros((3, 2)), 3, "k"),
        *((np.zeros((9, 2)), np.zeros((9, 2)), k, "^k: must be an integer, 1 or more, got ") for k in (0, 3.0, "3", None, True)),
        (np.full((9, 2), np.nan), np.zeros((9, 2)), 3, "reference_features.*NaN"),
        (np.zeros((9, 2)), np.zeros(9), 3, "sample_features"),
    ],
)
def test_wrong_input_is_one_clear_line(reference, samples, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(reference, samples, k)
