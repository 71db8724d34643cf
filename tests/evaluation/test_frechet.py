"""Fréchet distance against closed forms: diagonal, commuting, rank-deficient, ill-conditioned; and its laws."""

import numpy as np
import pytest
import torch

from vavae_fast.evaluation import feature_statistics, frechet_distance


def rotation(d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]


def gaussian(n, d, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)
    return feature_statistics(x)


def diagonal_distance(m1, v1, m2, v2):
    return ((m1 - m2) ** 2).sum() + ((np.sqrt(v1) - np.sqrt(v2)) ** 2).sum()


def test_one_dimension():
    assert frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]])) == pytest.approx(4 + 1, rel=1e-14)


@pytest.mark.parametrize("decades", [0, 8, 20, 60])
def test_diagonal_covariances_of_any_grading(decades):
    """Variances over many orders of magnitude, rising in one and falling in the other: no digit is lost."""
    v1 = np.logspace(0, -decades, 12) * np.linspace(1, 2, 12)
    v2 = np.logspace(-decades, 0, 12)
    m = np.zeros(12)
    assert frechet_distance(m, np.diag(v1), m, np.diag(v2)) == pytest.approx(diagonal_distance(m, v1, m, v2), rel=1e-13)


@pytest.mark.parametrize("rank", [1, 5, 30])
def test_commuting_covariances(rank):
    """With common eigenvectors the distance is that of the eigenvalues, full rank or not."""
    q, rng = rotation(30), np.random.default_rng(1)
    v1, v2 = rng.uniform(0.5, 2, 30), rng.uniform(0.5, 2, 30)
    v1[rank:], v2[: 30 - rank] = 0, 0
    m1, m2 = rng.standard_normal(30), rng.standard_normal(30)
    found = frechet_distance(m1, q * v1 @ q.T, m2, q * v2 @ q.T)
    assert found == pytest.approx(diagonal_distance(m1, v1, m2, v2), rel=1e-11)


def test_small_variances_beside_a_singular_block():
    """Relative to the block their eigenvalues are below rounding; what they add to the trace, sqrt(1e-17) each, is not."""
    s1, m = np.diag([1.0, 1, 1e-17, 1e-17, 1e-17]), np.zeros(5)
    s1[:2, :2] = 1
    exact = (2 + 3e-17) + 5 - 2 * (2**0.5 + 3 * 1e-17**0.5)
    assert frechet_distance(m, s1, m, np.eye(5)) == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("n1, n2", [(10, 12), (10, 500), (500, 10), (2, 2)])
def test_fewer_rows_than_dimensions(n1, n2):
    """Rank-deficient: tr (S1 S2)^1/2 is the nuclear norm of X1 X2^T / sqrt((n1 - 1)(n2 - 1)), X centred data."""
    rng = np.random.default_rng(2)
    x1, x2 = rng.standard_normal((n1, 64)), rng.standard_normal((n2, 64)) + 0.3
    c1, c2 = x1 - x1.mean(0), x2 - x2.mean(0)
    trace = np.linalg.svd(c1 @ c2.T, compute_uv=False).sum() / np.sqrt((n1 - 1) * (n2 - 1))
    exact = ((x1.mean(0) - x2.mean(0)) ** 2).sum() + (c1**2).sum() / (n1 - 1) + (c2**2).sum() / (n2 - 1) - 2 * trace
    assert frechet_distance(*feature_statistics(x1), *feature_statistics(x2)) == pytest.approx(exact, rel=1e-10)


def test_ill_conditioned_covariances():
    """Eigenvalues down to 1e-15 in rotated coordinates; the matrix itself is only known to eps, which bounds the error."""
    q, v = rotation(50), np.logspace(0, -15, 50)
    m = np.zeros(50)
    found = frechet_distance(m, q * v @ q.T, m, q * (4 * v) @ q.T)
    assert found == pytest.approx(v.sum(), rel=1e-9)


@pytest.mark.parametrize("n", [20, 2000])
def test_equal_inputs_are_at_distance_zero(n):
    mu, sigma = gaussian(n, 40, seed=3)
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) <= 1e-12 * np.trace(sigma)


@pytest.mark.parametrize("n1, n2", [(2000, 3000), (20, 3000)])
def test_order_does_not_matter(n1, n2):
    a, b = gaussian(n1, 40, seed=4), gaussian(n2, 40, seed=5)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-11)


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e8])
def test_scaling_features_scales_by_the_square(factor):
    (m1, s1), (m2, s2) = gaussian(300, 20, seed=6), gaussian(15, 20, seed=7)
    scaled = frechet_distance(factor * m1, factor**2 * s1, factor * m2, factor**2 * s2)
    assert scaled == pytest.approx(factor**2 * frechet_distance(m1, s1, m2, s2), rel=1e-11)


def test_rotating_features_changes_nothing():
    (m1, s1), (m2, s2), q = gaussian(300, 20, seed=8), gaussian(300, 20, seed=9), rotation(20, seed=10)
    turned = frechet_distance(q @ m1, q @ s1 @ q.T, q @ m2, q @ s2 @ q.T)
    assert turned == pytest.approx(frechet_distance(m1, s1, m2, s2), rel=1e-11)


@pytest.mark.parametrize("n1, n2", [(500, 700), (500, 90)])
def test_agrees_with_sqrtm_where_that_is_accurate(n1, n2):
    linalg = pytest.importorskip("scipy.linalg")
    (m1, s1), (m2, s2) = gaussian(n1, 60, seed=11), gaussian(n2, 60, seed=12)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * linalg.sqrtm(s1 @ s2).real)
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)


def test_dimensions_without_variance():
    m, v1, v2 = np.zeros(4), np.array([1.0, 0, 2, 0]), np.array([0, 3.0, 2, 0])
    assert frechet_distance(m, np.diag(v1), m, np.diag(v2)) == pytest.approx(4.0, rel=1e-14)
    assert frechet_distance(m, np.zeros((4, 4)), m, np.zeros((4, 4))) == 0.0
    assert frechet_distance(m, np.zeros((4, 4)), m + 1, np.eye(4)) == pytest.approx(8.0, rel=1e-14)


def test_tensors_arrays_and_fp32_statistics():
    (m1, s1), (m2, s2) = gaussian(300, 20, seed=13), gaussian(12, 20, seed=14)
    exact = frechet_distance(m1, s1, m2, s2)
    assert frechet_distance(torch.from_numpy(m1), torch.from_numpy(s1), m2, s2) == exact
    low = [value.astype(np.float32) for value in (m1, s1, m2, s2)]
    assert frechet_distance(*low) == pytest.approx(exact, rel=1e-3)  # sqrt(eps of fp32): what a stored fp32 covariance still knows


def mistakes():
    m, s = np.zeros(3), np.eye(3)
    skew, negative, indefinite, ghost = s.copy(), s.copy(), s.copy(), np.diag([1.0, 0.0, 1.0])
    skew[0, 1] = 0.5
    negative[0, 0] = -1
    indefinite[0, 1] = indefinite[1, 0] = 2
    ghost[0, 1] = ghost[1, 0] = 0.5
    yield "nan mean", (np.full(3, np.nan), s), "mu1.*NaN"
    yield "inf covariance", (m, np.full((3, 3), np.inf)), "sigma1.*NaN"
    yield "shape", (m, np.eye(4)), "sigma1"
    yield "not square", (m, np.ones((3, 2))), "sigma1"
    yield "mean is a matrix", (s, s), "mu1"
    yield "asymmetric", (m, skew), "not symmetric"
    yield "negative variance", (m, negative), "negative variance"
    yield "indefinite", (m, indefinite), "positive semi-definite"
    yield "covariance without variance", (m, ghost), "positive semi-definite"
    yield "other features", (np.zeros(2), np.eye(2)), "mu1 has 2 dimensions, mu2 has 3"


@pytest.mark.parametrize("pair, message", [pytest.param(p, m, id=name) for name, p, m in mistakes()])
def test_wrong_input_is_one_clear_line(pair, message):
    with pytest.raises(ValueError, match=message) as error:
        frechet_distance(*pair, np.zeros(3), np.eye(3))
    assert "\n" not in str(error.value)
