"""The small judge on scikit-learn's digits: what real images, class means and copies score."""

import numpy as np
import pytest
import torch

from vavae_fast.evaluation import RBFClassifier, class_agreement, nearest_distances, pixel_frechet, spread


@pytest.fixture(scope="module")
def digits():
    """(images (1797, 1, 8, 8) in 0..16, labels, order): first 1,437 of the order train, the rest is held out."""
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    return images.reshape(-1, 1, 8, 8), labels, np.random.default_rng(0).permutation(len(images))


@pytest.fixture(scope="module")
def classifier(digits):
    x, y, order = digits
    return RBFClassifier().fit(x[order[:1437]], y[order[:1437]])


def test_held_out_accuracy(digits, classifier):
    x, y, order = digits
    held = order[1437:]
    agreement = class_agreement(x[held], y[held], classifier)
    assert agreement.overall >= 0.97 and agreement.worst >= 0.9
    assert agreement.worst == min(agreement.per_class.values()) and sorted(agreement.per_class) == list(range(10))


def test_accuracy_does_not_depend_on_pixel_units(digits, classifier):
    x, y, order = digits
    train, held = order[:1437], order[1437:]
    scaled = RBFClassifier().fit(torch.from_numpy(x[train] / 8 - 1), torch.from_numpy(y[train]))
    found = scaled.predict(torch.from_numpy(x[held] / 8 - 1))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found, classifier.predict(x[held]))


def test_class_means_agree_and_have_no_spread(digits, classifier):
    """Why agreement alone proves nothing."""
    x, y, _ = digits
    labels = np.repeat(np.arange(10), 40)
    means = np.stack([x[y == c].mean(0) for c in range(10)])[labels]
    assert class_agreement(means, labels, classifier).overall == 1.0
    assert spread(means, labels, x, y) == 0.0
    assert pixel_frechet(means, x) > 200


def test_real_digits_score_near_zero(digits):
    x, y, order = digits
    some = order[:400]
    assert 5 < pixel_frechet(x[some], x) < 20
    assert pixel_frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert spread(x[some], y[some], x, y) == pytest.approx(1, abs=0.03)
    assert spread(x / 2, y, x, y) == pytest.approx(0.5, rel=1e-12)


def test_spread_formula():
    samples, real = np.array([[0.0, 0], [2, 0], [5, 5], [5, 9]]), np.array([[0.0, 0], [4, 0], [1, 1], [1, 5]])
    labels = np.array([0, 0, 1, 1])
    assert spread(samples, labels, real, labels) == pytest.approx((2**0.5 + 8**0.5) / (8**0.5 + 8**0.5), rel=1e-14)


def test_nearest_distances(digits):
    x, _, order = digits
    distance, index = nearest_distances(x[order[:30]], x)
    assert (distance == 0).all() and (x[index] == x[order[:30]]).all()
    a, b = np.random.default_rng(0).standard_normal((20, 6)), np.random.default_rng(1).standard_normal((50, 6))
    between = np.linalg.norm(a[:, None] - b, axis=-1)
    distance, index = nearest_distances(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(distance, between.min(1), rtol=1e-13)
    np.testing.assert_array_equal(index, between.argmin(1))


def test_ridge_solution_interpolates_without_ridge():
    """With ridge -> 0 kernel ridge regression returns its training labels."""
    x, y = np.random.default_rng(0).standard_normal((30, 4)), np.arange(30) % 3 + 5
    np.testing.assert_array_equal(RBFClassifier(ridge=1e-10).fit(x, y).predict(x), y)


def test_wrong_input_is_one_clear_line(classifier):
    x, y = np.random.default_rng(0).standard_normal((6, 4)), np.array([0, 0, 0, 1, 1, 2])
    for call, message in [
        (lambda: RBFClassifier().predict(x), "before fit"),
        (lambda: RBFClassifier().fit(x, y[:5]), "expected 6 integers"),
        (lambda: RBFClassifier().fit(x, y / 2), "expected 6 integers"),
        (lambda: RBFClassifier().fit(np.ones((6, 4)), y), "all values are the same"),
        (lambda: classifier.predict(x), "4 values a point, fitted on 64"),
        (lambda: spread(x, y, x, y), "a class has 1 image"),
        (lambda: nearest_distances(x, x[:, :2]), "4 values each, train has 2"),
        (lambda: pixel_frechet(x * np.nan, x), "samples: 24 of 24"),
        (lambda: pixel_frechet([1, 2], x), "samples: .*list"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
