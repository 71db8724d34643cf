"""Inception score: its bounds, its splits, its stability."""

import math

import numpy as np
import pytest
import torch

from vavae_fast.evaluation import inception_score


def test_equal_predictions_score_1():
    assert inception_score(np.zeros((50, 10))) == pytest.approx(1.0, abs=1e-14)
    assert inception_score(torch.randn(1, 10).expand(50, 10)) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("height", [50.0, 1e4, 1e30, 1e308])
def test_certain_balanced_predictions_score_the_number_of_classes(height):
    """At 1e308 the difference of two logits overflows, and log p is -inf."""
    logits = np.where(np.eye(8).repeat(5, axis=0) == 1, height, -height)
    assert inception_score(logits) == pytest.approx(8.0, rel=1e-12)


def test_finite_for_logits_at_the_ends_of_fp32():
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, 3e38, 1.0], [0.0, 0.0, 0.0]])
    assert math.isfinite(inception_score(logits)) and inception_score(logits) <= 3


def test_formula():
    logits = torch.randn(40, 6, dtype=torch.float64)
    p = logits.softmax(1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert inception_score(logits) == pytest.approx(expected, rel=1e-13)


def test_splits_in_file_order_and_a_short_last_one_counts():
    logits = torch.randn(25, 4)
    parts = [inception_score(logits[i : i + 10]) for i in (0, 10, 20)]
    assert inception_score(logits, split_size=10) == pytest.approx(sum(parts) / 3, rel=1e-14)
    assert inception_score(logits.flip(0), split_size=10) != pytest.approx(sum(parts) / 3, rel=1e-6)


def test_default_split_is_5000():
    logits = np.random.default_rng(0).standard_normal((5001, 3))
    assert inception_score(logits) == pytest.approx((inception_score(logits[:5000]) + 1) / 2, rel=1e-13)


@pytest.mark.parametrize("split", [0, 2.0, "5", None])
def test_a_split_that_is_no_count_is_named(split):
    with pytest.raises(ValueError, match="^split_size: must be an integer, 1 or more, got "):
        inception_score(np.zeros((4, 2)), split)


@pytest.mark.parametrize(
    "logits, split", [(np.array([[np.nan, 0]]), 5), (np.array([[np.inf, 0]]), 5), (np.zeros(4), 5)]
)
def test_wrong_input_is_a_value_error(logits, split):
    with pytest.raises(ValueError):
        inception_score(logits, split)
