"""Which sample comes when, as a function of (seed, position) alone: no sampler state, no dependence on the world size.

A training run walks through positions 0, 1, 2, …; step s owns the positions [s B, (s + 1) B) of a global batch of B, and
position p is sample permutation(epoch = p // n)[p % n] of n. So resume is a seek, every sample comes once an epoch, and
one GPU or sixty-four train on the same global batches.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vavae_fast import rng
from vavae_fast.errors import BadInput, is_integer

_BLOCK = 1 << 14


def sample_order(seed: int, positions: np.ndarray, n: int) -> np.ndarray:
    """positions (B,) int64, 0 or more -> (B,) int64 indices in [0, n); a batch may reach into the next epoch."""
    indices = np.empty(len(positions), np.int64)
    epochs = positions // n
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = rng.permutation(seed, int(epoch), positions[here] % n, n)
    return indices


class RunOrder:
    """`sample_order` and `flips` of one run, for positions that go forward: computed in blocks, which costs a tenth.

    The permutation is some hundred small NumPy calls however short the batch; in blocks they are few, and release the GIL.
    """

    def __init__(self, seed: int, n: int):
        self.seed, self.n = seed, n
        self._length = min(_BLOCK, 4 * n)  # at most five epochs' permutations a block, however few samples there are
        self._block = lru_cache(maxsize=4)(self._make)  # more than one: threads read ahead, batches cross borders

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """positions (B,) -> indices (B,) int64, mirrored (B,) bool."""
        indices, mirrored = np.empty(len(positions), np.int64), np.empty(len(positions), bool)
        blocks = positions // self._length
        for number in np.unique(blocks):
            here = blocks == number
            order, flipped = self._block(int(number))
            indices[here], mirrored[here] = order[positions[here] % self._length], flipped[positions[here] % self._length]
        return indices, mirrored

    def _make(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(number * self._length, (number + 1) * self._length, dtype=np.int64)
        return sample_order(self.seed, positions, self.n), flips(self.seed, positions)


def batch_positions(step: int, global_batch: int, rank: int, world: int) -> np.ndarray:
    """(B / world,) int64: the contiguous share of `rank` in the positions of `step`."""
    share = global_batch // world
    first = step * global_batch + rank * share
    return np.arange(first, first + share, dtype=np.int64)


def micro_batches(start: int, global_batch: int, rank: int, world: int, micro_batch: int, in_turn: int = 1) -> Iterator[np.ndarray]:
    """The positions of `rank` from step `start` on, for ever, `micro_batch` at a time: share / micro_batch of them a step.

    Of `in_turn` neighbouring ranks, which have a contiguous share together, each takes one micro-batch after the other.
    """
    step = start
    while True:
        together = batch_positions(step, global_batch, rank // in_turn, world // in_turn)
        yield from together.reshape(-1, in_turn, micro_batch)[:, rank % in_turn]
        step += 1


def check_shares(global_batch: int, world: int, micro_batch: int) -> None:
    """`BadInput` unless every process gets the same number of whole micro-batches."""
    unit = world * micro_batch
    if micro_batch < 1 or global_batch < 1 or global_batch % unit:
        below, above = global_batch // max(unit, 1) * unit, (global_batch // max(unit, 1) + 1) * unit
        nearest = f"{below}, {above}" if below > 0 else f"{above}"
        raise BadInput(
            f"train.global_batch_size {global_batch} does not divide over {world} processes x micro-batch {micro_batch}; nearest: {nearest}"
        )


def checked_indices(indices: Sequence[int] | np.ndarray | Tensor, n: int, what: str) -> np.ndarray:
    """Indices of any kind as (m,) int64, each in [0, n): `IndexError` outside it, `BadInput` when they are not integers."""
    array = to_array(indices, f"{what}: indices must be a list of integers")
    if array.ndim == 1 and array.dtype.kind in "Of" and all(map(is_integer, indices)):
        array = np.array(list(indices), object)  # integers beyond int64
    elif array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise BadInput(f"{what}: indices must be a list of integers, got shape {array.shape} of {array.dtype}")
    if array.size and not (0 <= array.min() and array.max() < n):
        outside = array[(array < 0) | (array >= n)][0]
        raise IndexError(f"{what}: index {outside} is outside [0, {n})")
    return array.astype(np.int64)


def to_array(value: Any, expected: str) -> np.ndarray:
    """`value` as NumPy sees it; `BadInput` of one line, opening with `expected`, for what is no array, as rows of unequal length."""
    try:
        return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except (TypeError, ValueError):
        raise BadInput(f"{expected}, got a {type(value).__name__} that is no array") from None


def flips(seed: int, positions: np.ndarray) -> np.ndarray:
    """(B,) bool: whether the sample at each position is mirrored, with probability 1/2."""
    return rng.integers(seed, torch.from_numpy(positions), 2, rng.Stream.FLIP).bool().numpy()
