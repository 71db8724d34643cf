"""Counter-based randomness: known answers, independence of the batch, distributions."""

import math

import numpy as np
import pytest
import torch

from vavae_fast import rng
from vavae_fast.rng import Stream

KNOWN = [  # Random123's kat_vectors for philox4x32-10: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_philox_known_answers(counter, key, result):
    low, high = (int(word, 16) for word in key.split())
    words = rng.philox(low | high << 32, *(torch.tensor([int(word, 16)]) for word in counter.split()))
    assert " ".join(f"{word.item():08x}" for word in words) == result


def draws(index):
    like = torch.empty(len(index), 3, 5)
    return [
        rng.normal(7, index, like),
        rng.uniform(7, index, Stream.TIME),
        rng.integers(7, index, 1000, Stream.LABEL),
    ]


def test_a_sample_does_not_depend_on_its_batch():
    index = torch.tensor([0, 1, 5, 2**31, 2**40 + 3, 2**62])
    whole = draws(index)
    order = torch.randperm(len(index))
    for shuffled, kept in zip(draws(index[order]), whole):
        assert torch.equal(shuffled, kept[order])
    for row in range(len(index)):
        for single, kept in zip(draws(index[row : row + 1]), whole):
            assert torch.equal(single[0], kept[row])


def test_the_first_numbers_do_not_depend_on_how_many_follow():
    index = torch.arange(4)
    assert torch.equal(rng.normal(1, index, torch.empty(4, 6)), rng.normal(1, index, torch.empty(4, 100))[:, :6])


@pytest.mark.parametrize("a, b", [((1, Stream.NOISE), (2, Stream.NOISE)), ((1, Stream.NOISE), (1, Stream.POSTERIOR)),
                                  ((1, Stream.SDE), (1, Stream.SDE + 1)), ((1, Stream.NOISE), (1 + 2**32, Stream.NOISE))])
def test_seeds_and_streams_are_uncorrelated(a, b):
    index, like = torch.arange(200), torch.empty(200, 100)
    first, second = (rng.normal(seed, index, like, stream=stream).double() for seed, stream in (a, b))
    assert abs((first * second).mean().item()) < 4 / math.sqrt(first.numel())


def test_normal_moments_and_neighbours():
    """Mean, variance, skewness and kurtosis within 4 standard errors of 0, 1, 0, 3; neighbours uncorrelated both ways."""
    x = rng.normal(3, torch.arange(1000), torch.empty(1000, 200)).double()
    error = 4 / math.sqrt(x.numel())
    assert abs(x.mean().item()) < error
    assert abs(x.var().item() - 1) < error * math.sqrt(2)
    assert abs(x.pow(3).mean().item()) < error * math.sqrt(15)
    assert abs(x.pow(4).mean().item() - 3) < error * math.sqrt(96)
    assert abs((x[1:] * x[:-1]).mean().item()) < error and abs((x[:, 1:] * x[:, :-1]).mean().item()) < error


def test_normal_keeps_shape_and_dtype():
    like = torch.empty(2, 3, 7, dtype=torch.float64)
    x = rng.normal(3, torch.arange(2), like)
    assert x.shape == like.shape and x.dtype == torch.float64
    assert torch.equal(x, rng.normal(3, torch.arange(2), like.float()).double())
    with pytest.raises(ValueError, match="2 rows"):
        rng.normal(3, torch.arange(3), like)


def test_uniform_is_uniform_and_open():
    u = rng.uniform(5, torch.arange(100_000), Stream.TIME).double().sort().values
    assert 0 < u[0] and u[-1] < 1
    steps = torch.arange(1, len(u) + 1, dtype=torch.float64) / len(u)
    assert (u - steps).abs().max().item() < 1.95 / math.sqrt(len(u))  # Kolmogorov-Smirnov, p = 0.001
    extremes = rng._to_unit(torch.tensor([0, 0xFFFFFFFF]))
    assert 0 < extremes[0] and extremes[1] < 1


def test_integers_and_flips_are_balanced():
    flips = rng.integers(5, torch.arange(100_000), 2, Stream.FLIP).double()
    assert abs(flips.mean().item() - 0.5) < 4 * 0.5 / math.sqrt(len(flips))
    counts = torch.bincount(rng.integers(5, torch.arange(100_000), 10, Stream.LABEL), minlength=10).double()
    assert len(counts) == 10 and ((counts - 10_000) ** 2 / 10_000).sum() < 27.9  # chi-square, 9 degrees, p = 0.001


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 15, 16, 17, 63, 64, 65, 100, 1000, 4096, 4097, 10_007])
def test_permutation_is_a_bijection(n):
    places = np.arange(n)
    moved = rng.permutation(11, 0, places, n)
    assert np.array_equal(np.sort(moved), places)
    assert np.array_equal(rng.permutation(11, 0, places[::-1], n), moved[::-1]), "a place does not depend on who asks with it"


def test_permutations_differ_by_seed_and_epoch_and_look_random():
    """Fixed points of a random permutation are Poisson(1); rank correlation with the identity is 0 +- 1 / sqrt(n)."""
    places = np.arange(10_000)
    orders = [rng.permutation(seed, epoch, places, len(places)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for i, order in enumerate(orders):
        assert (order == places).sum() < 10
        assert abs(np.corrcoef(order, places)[0, 1]) < 4 / math.sqrt(len(places))
        assert all((order == other).sum() < 10 for other in orders[:i])
