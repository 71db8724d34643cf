"""Uniformity: the three statistics against closed forms; t-SNE and KDE through the public function."""

import sys

import numpy as np
import pytest
import torch

from vavae_fast.evaluation import neighbour_distance_cv, uniformity
from vavae_fast.evaluation.uniformity import density_at_points, density_statistics


def test_even_density():
    found = density_statistics(np.full(100, 0.3))
    assert found == pytest.approx({"density_cv": 0, "normalized_entropy": 1, "gini": 0}, abs=1e-12)


def test_two_level_density():
    """Half of the points at density 1, half at 3: all three by hand."""
    found = density_statistics(np.array([1.0, 3.0] * 50))
    share = np.array([1, 3]) / 4
    entropy = (np.log(50) - (share * np.log(share)).sum()) / np.log(100)
    assert found == pytest.approx({"density_cv": 0.5, "normalized_entropy": entropy, "gini": 0.25}, rel=1e-12)


def test_statistics_do_not_depend_on_units_or_order():
    p = np.random.default_rng(0).exponential(size=200)
    for other in (7e5 * p, 1e-200 * p, p[::-1]):
        assert density_statistics(other) == pytest.approx(density_statistics(p), rel=1e-12)


def test_gini_is_half_the_relative_mean_difference():
    p = np.random.default_rng(1).exponential(size=80)
    expected = np.abs(p[:, None] - p).mean() / (2 * p.mean())
    assert density_statistics(p)["gini"] == pytest.approx(expected, rel=1e-12)


def test_vanishing_density_stays_finite():
    found = density_statistics(np.array([0.0, 0.0, 1.0, 1.0]))
    assert found["normalized_entropy"] == pytest.approx(0.5) and found["gini"] == pytest.approx(0.5)


def test_density_is_scotts_gaussian_kernel():
    pytest.importorskip("scipy")
    x = np.random.default_rng(2).standard_normal((60, 2))
    bandwidth = np.cov(x.T) * 60 ** (-2 / 6)  # Scott: n^(-1/(d+4)), squared
    difference = x[:, None] - x[None]
    exponent = -0.5 * np.einsum("ijk,kl,ijl->ij", difference, np.linalg.inv(bandwidth), difference)
    expected = np.exp(exponent).mean(1) / (2 * np.pi * np.sqrt(np.linalg.det(bandwidth)))
    np.testing.assert_allclose(density_at_points(x), expected, rtol=1e-10)


NAMES = ("density_cv", "normalized_entropy", "gini")


def test_repeats_are_means_over_consecutive_seeds(monkeypatch):
    """With a stand-in for t-SNE whose result the seed decides."""
    pytest.importorskip("scipy")
    embed = lambda points, seed: np.random.default_rng(seed).standard_normal((len(points), 2)) ** 3
    monkeypatch.setattr(sys.modules["vavae_fast.evaluation.uniformity"], "embed", embed)
    x = torch.randn(40, 5)
    one, two, both = uniformity(x, seed=3), uniformity(x, seed=4), uniformity(x.numpy(), seed=3, repeats=2)
    assert set(both) == {f"{name}{end}" for name in NAMES for end in ("", "_std")}
    for name in NAMES:
        pair = [one[name], two[name]]
        assert pair[0] != pair[1] and one[f"{name}_std"] == 0.0
        assert both[name] == pytest.approx(np.mean(pair), rel=1e-12)
        assert both[f"{name}_std"] == pytest.approx(np.std(pair), rel=1e-9)


def test_through_t_sne():
    """The whole way, 1,000 iterations on 40 points: values in their ranges, a function of the seed."""
    pytest.importorskip("sklearn")
    found = uniformity(np.random.default_rng(0).standard_normal((40, 3)), seed=5)
    assert found["density_cv"] > 0 and 0 < found["normalized_entropy"] < 1 and 0 < found["gini"] < 1


@pytest.mark.parametrize("package, name", [("sklearn.manifold", "scikit-learn"), ("scipy.stats", "scipy")])
def test_a_missing_package_names_the_extra(monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    if name == "scipy":
        call = lambda: density_at_points(np.zeros((5, 2)))
    else:
        call = lambda: uniformity(np.random.default_rng(0).standard_normal((40, 3)))
    with pytest.raises(ValueError, match=rf"{name} is not installed; pip install 'vavae-fast\[analyze\]'"):
        call()


@pytest.mark.parametrize(
    "latents, seed, repeats, message",
    [
        (np.zeros((30, 4)), 0, 1, "latents: .* more than 30 rows"),
        (np.full((40, 4), np.nan), 0, 1, "latents: .* NaN"),
        (np.zeros((40, 4, 2)), 0, 1, "latents: .* shape"),
        *((np.zeros((40, 4)), 0, repeats, "repeats: must be an integer") for repeats in (0, 1.0, "1", None)),
        *((np.zeros((40, 4)), seed, 1, "seed: must be an integer, from 0 to 4294967295,") for seed in (-1, 2**32, 0.0, None, "0")),
        (np.zeros((40, 4)), 2**32 - 1, 2, "seed: must be an integer, from 0 to 4294967294,"),
    ],
)
def test_wrong_input_is_one_clear_line(latents, seed, repeats, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        uniformity(latents, seed, repeats)


def test_neighbour_distances_of_a_lattice_are_all_one():
    """On a ring of points every k-th neighbour is equally far; its scale does not matter."""
    angle = 2 * np.pi * np.arange(64) / 64
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert neighbour_distance_cv(ring) == pytest.approx(0, abs=1e-7) and neighbour_distance_cv(9 * ring, 3) == pytest.approx(0, abs=1e-7)


def test_neighbour_distances_against_all_pairs():
    x = np.random.default_rng(3).standard_normal((90, 4)) * np.linspace(0.1, 3, 90)[:, None]
    distance = np.sort(np.sqrt(((x[:, None] - x) ** 2).sum(-1)), axis=1)[:, 10]
    assert neighbour_distance_cv(torch.from_numpy(x)) == pytest.approx(distance.std() / distance.mean(), rel=1e-12)


def test_clusters_are_less_even_than_a_cloud():
    generator = np.random.default_rng(4)
    cloud = generator.standard_normal((400, 8))
    clusters = np.concatenate([cloud[:200], 0.05 * cloud[200:]])
    assert neighbour_distance_cv(clusters) > 2 * neighbour_distance_cv(cloud)


@pytest.mark.parametrize("latents, k, message", [
    (np.zeros((10, 3)), 10, "latents: .* needs more than 10 rows, got 10"), (np.zeros((20, 3)), 0, "k: must be an integer"),
    (np.zeros((20, 3)), 10, "latents: every one has 10 copies"), (np.full((20, 3), np.inf), 10, "latents: .* infinite"),
])  # fmt: skip
def test_wrong_input_of_neighbour_distances(latents, k, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        neighbour_distance_cv(latents, k)
