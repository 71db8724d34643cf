"""The order of samples: every sample once an epoch, the same whatever the world."""

import time

import numpy as np
import pytest
import torch

from vavae_fast.data.order import RunOrder, batch_positions, check_shares, checked_indices, flips, micro_batches, sample_order
from vavae_fast.data.prefetch import Buffers, ahead
from vavae_fast.errors import BadInput


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
def test_every_sample_comes_once_an_epoch(n):
    positions = np.arange(3 * n)
    epochs = sample_order(5, positions, n).reshape(3, n)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (3, 1)))
    if n >= 64:
        assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0], sample_order(6, positions[:n], n))


def test_order_is_a_function_of_the_position_alone():
    positions = np.arange(500)
    whole = sample_order(1, positions, 37)
    chosen = np.array([499, 0, 36, 37, 38, 200])
    assert np.array_equal(sample_order(1, chosen, 37), whole[chosen])


@pytest.mark.parametrize("n", [5, 37, 50_000])
def test_blocks_do_not_show(n):
    order = RunOrder(3, n)
    for positions in (np.arange(0, 7), np.arange(4 * n - 3, 4 * n + 5), np.arange((1 << 14) - 3, (1 << 14) + 5), np.array([0, 10**9])):
        indices, mirrored = order(positions)
        assert np.array_equal(indices, sample_order(3, positions, n)) and np.array_equal(mirrored, flips(3, positions))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_shares_make_up_the_global_batch(world, micro):
    for step in (0, 3):
        shares = [batch_positions(step, 8, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(shares), np.arange(8 * step, 8 * step + 8))
        for rank, share in enumerate(shares):
            source = micro_batches(step, 8, rank, world, micro)
            assert np.array_equal(np.concatenate([next(source) for _ in range(8 // world // micro)]), share)
            assert next(source)[0] == batch_positions(step + 1, 8, rank, world)[0]


def test_flips_are_fair_and_counted_by_position():
    mirrored = flips(0, np.arange(10_000))
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / 100  # four standard deviations
    assert np.array_equal(flips(0, np.array([17, 3])), mirrored[[17, 3]])


@pytest.mark.parametrize("batch, world, micro, nearest", [(1000, 8, 32, "768, 1024"), (3, 4, 1, "nearest: 4"), (8, 1, 0, "nearest")])
def test_indivisible_batches_name_the_nearest(batch, world, micro, nearest):
    with pytest.raises(BadInput, match=nearest):
        check_shares(batch, world, micro)


def test_indices_of_any_kind():
    for indices in ([1, 0], (1, 0), np.array([1, 0], np.uint8), torch.tensor([1, 0])):
        assert checked_indices(indices, 2, "x").tolist() == [1, 0]
    assert checked_indices([], 2, "x").dtype == np.int64
    for outside in ([2], [-1], torch.tensor([0, 2])):
        with pytest.raises(IndexError, match="outside"):
            checked_indices(outside, 2, "x")
    for wrong in ([True, False], [0.0], 1, [[0]]):
        with pytest.raises(BadInput):
            checked_indices(wrong, 2, "x")


def test_ahead_keeps_the_order_and_raises_in_place():
    def work(k):
        time.sleep(0.01 * (k % 3 == 0))
        if k == 5:
            raise BadInput("five")
        return k

    source = ahead(work, range(8), depth=3, threads=3)
    assert [next(source) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(BadInput, match="five"):
        next(source)


def test_closing_ahead_stops_the_work():
    made = []
    source = ahead(lambda k: made.append(k) or k, iter(int, 1), depth=4)  # an endless run of zeros
    next(source)
    source.close()
    count = len(made)
    time.sleep(0.02)
    assert len(made) == count <= 6


def test_memory_is_lent_again_only_when_no_view_is_left():
    buffers = Buffers((2, 3))
    first = buffers.take()
    view = first.fill_(1.0)[1:]
    del first
    second = buffers.take().fill_(2.0)
    assert (view == 1.0).all()
    place = second.data_ptr()
    del second
    assert buffers.take().data_ptr() == place
