"""Streaming moments: NumPy's covariance, whatever the batches, whatever the mean."""

import numpy as np
import pytest
import torch

from vavae_fast.evaluation import FeatureStatistics, feature_statistics


def correlated(n, d, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + offset


def test_matches_numpy_with_n_minus_1():
    x = correlated(500, 7)
    mu, sigma = feature_statistics(x)
    np.testing.assert_allclose(mu, x.mean(axis=0), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 3, 64, 499])
def test_does_not_move_with_the_batch_size(batch):
    x = correlated(500, 7, offset=100.0)
    whole = feature_statistics(x)
    parts = feature_statistics(x[i : i + batch] for i in range(0, 500, batch))
    for a, b in zip(whole, parts):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_more_rows_than_one_internal_block():
    x = correlated(9001, 3)
    np.testing.assert_allclose(feature_statistics(x)[1], np.cov(x, rowvar=False), rtol=1e-11)


def test_a_large_mean_costs_no_digits():
    """Unshifted sums would lose everything: mean^2 eps = 220 against variances near 1."""
    x = correlated(4000, 4)
    shifted = x + 1e9
    _, sigma = feature_statistics(shifted[i : i + 100] for i in range(0, 4000, 100))
    np.testing.assert_allclose(sigma, np.cov(shifted - 1e9, rowvar=False), rtol=1e-9, atol=1e-9)


def test_merge_equals_update_in_any_split():
    x = torch.from_numpy(correlated(300, 5))
    left, right, empty = FeatureStatistics(), FeatureStatistics(), FeatureStatistics()
    left.update(x[:80])
    right.update(x[80:])
    left.merge(right)
    left.merge(empty)
    empty.merge(left)
    for statistics in (left, empty):
        assert statistics.count == 300
        for a, b in zip(statistics.result(), feature_statistics(x)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_result_is_a_copy_and_merge_leaves_the_other():
    x = torch.from_numpy(correlated(50, 3))
    statistics, other = FeatureStatistics(), FeatureStatistics()
    other.update(x)
    before = other.result()
    statistics.merge(other)
    statistics.update(x + 5)
    for a, b in zip(before, other.result()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8])
def test_arithmetic_is_fp64_for_every_dtype(dtype):
    x = torch.randint(0, 200, (64, 3)).to(dtype)
    mu, sigma = feature_statistics(x)
    assert mu.dtype == sigma.dtype == torch.float64
    torch.testing.assert_close(sigma, torch.cov(x.double().T), rtol=1e-12, atol=1e-12)


def test_arrays_in_arrays_out():
    x = correlated(10, 2)
    assert all(isinstance(value, np.ndarray) for value in feature_statistics(x))
    assert all(isinstance(value, torch.Tensor) for value in feature_statistics(torch.from_numpy(x)))
    assert all(isinstance(value, np.ndarray) for value in feature_statistics([x[:4], x[4:]]))


def test_read_only_strided_and_big_endian_arrays():
    x = correlated(40, 6)
    view = x[::2, ::-1]
    view.flags.writeable = False
    np.testing.assert_allclose(feature_statistics(view)[1], np.cov(view, rowvar=False), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(feature_statistics(x.astype(">f8"))[1], feature_statistics(x)[1])


@pytest.mark.parametrize(
    "features, message",
    [
        (np.full((4, 2), np.nan), "8 of 8 values are NaN"),
        (np.array([[1.0, np.inf], [0.0, 0.0]]), "1 of 4 values"),
        (np.zeros(5), "shape"),
        (np.zeros((1, 5)), "2 rows or more, got 1"),
        (np.zeros((0, 5)), "empty"),
        (np.zeros((3, 2), complex), "complex128"),
        (np.array([["a", "b"]]), "NumPy"),
        ([], "got 0"),
        (3, "int"),
        ([np.zeros((3, 2)), np.zeros((3, 4))], "4 dimensions after batches of 2"),
    ],
)
def test_wrong_input_is_one_clear_line(features, message):
    with pytest.raises(ValueError, match=message) as error:
        feature_statistics(features)
    assert "\n" not in str(error.value)


def test_a_refused_batch_leaves_the_statistics():
    statistics = FeatureStatistics()
    statistics.update(torch.eye(3))
    with pytest.raises(ValueError):
        statistics.update(torch.full((2, 3), float("nan")))
    assert statistics.count == 3 and torch.isfinite(statistics.result()[1]).all()


def test_statistics_go_on_from_their_state():
    x = np.random.default_rng(5).standard_normal((50, 4))
    whole, first, second = FeatureStatistics(), FeatureStatistics(), FeatureStatistics()
    first.update(torch.from_numpy(x[:30]))
    second.load_state_dict(first.state_dict())
    for statistics in (whole, second):
        for part in (x[:30], x[30:])[statistics is second :]:
            statistics.update(torch.from_numpy(part))
    assert all(torch.equal(a, b) for a, b in zip(second.result(), whole.result())) and first.count == 30
    assert FeatureStatistics().state_dict() == {}
    second.load_state_dict({})
    assert second.count == 0
