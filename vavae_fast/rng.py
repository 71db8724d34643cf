"""Counter-based randomness: every random number is a function of (seed, stream, index), of nothing else.

So a sample's noise does not depend on the batch it stands in, on the number of processes or on what was drawn before,
and a run that resumes needs no generator state. Philox 4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3". The integers are the same on every device; normals agree to the rounding of log, sin and cos.
"""

import math
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What a number is drawn for; two streams never share a counter."""

    NOISE = 0
    TIME = 1
    LABEL_DROP = 2
    FLIP = 3
    LABEL = 4
    POSTERIOR = 5
    CROP = 6
    ORDER = 7
    SUBSTITUTE = 8
    DROPOUT = 9
    SDE = 1 << 16  # + step: the increments of a stochastic sampler


_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _mul_hi_lo(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of m * x for 32-bit values held in int64: the two partial products stay below 2^48."""
    low_part, high_part = m * (x & 0xFFFF), m * (x >> 16)
    high = (high_part + (low_part >> 16)) >> 16
    low = (low_part + ((high_part & 0xFFFF) << 16)) & _MASK
    return high, low


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 on broadcastable int64 counters of 32-bit values -> four int64 tensors of 32-bit values."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        h0, l0 = _mul_hi_lo(_M0, c0)
        h1, l1 = _mul_hi_lo(_M1, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _bits(seed: int, index: Tensor, count: int, stream: int) -> Tensor:
    """(B, count) int64 of uniform 32-bit values for the B counters in `index`."""
    index = index.to(torch.int64).unsqueeze(1)
    block = torch.arange(-(-count // 4), device=index.device).unsqueeze(0)
    c3 = torch.full_like(block, int(stream))
    words = philox(seed, block, index & _MASK, (index >> 32) & _MASK, c3)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :count]


def uniform(seed: int, index: Tensor, stream: int) -> Tensor:
    """index (B,) int64 -> (B,) float32 in (0, 1), on index's device."""
    return _to_unit(_bits(seed, index, 1, stream)[:, 0])


def _to_unit(words: Tensor) -> Tensor:
    """24 of the 32 bits, centred in their cell: never 0; float32 rounds the last cell to 1 - 2^-24."""
    return ((words >> 8).to(torch.float32) + 0.5).mul_(2.0**-24).clamp_(max=1.0 - 2.0**-24)


def normal(seed: int, index: Tensor, like: Tensor, stream: int = Stream.NOISE) -> Tensor:
    """Standard normals of like's shape (B, ...) and dtype; row b is a function of (seed, stream, index[b]) alone.

    index (B,) integer, on like's device. Box-Muller in float32; float64 gets the float32 values.
    """
    if index.shape[:1] != like.shape[:1]:
        raise ValueError(f"rng.normal: {like.shape[0]} rows, but index has shape {tuple(index.shape)}")
    count = math.prod(like.shape[1:])
    u = _to_unit(_bits(seed, index, count + count % 2, stream))
    radius, angle = torch.sqrt(-2.0 * torch.log(u[:, 0::2])), (2.0 * math.pi) * u[:, 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].reshape(like.shape).to(like.dtype)


def integers(seed: int, index: Tensor, high: int, stream: int) -> Tensor:
    """index (B,) -> (B,) int64 uniform in [0, high), on index's device; the bias is below high / 2^32."""
    return (_bits(seed, index, 1, stream)[:, 0] * high) >> 32


def permutation(seed: int, epoch: int, positions: np.ndarray, n: int) -> np.ndarray:
    """Where `positions` (int64, each in [0, n)) go in the permutation of [0, n) that (seed, epoch) names.

    A Feistel network over the next power of four, walked until it falls inside [0, n): no table, so that any place of
    any epoch is one call away.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(k) for k in _round_keys(seed, epoch)]
    out = positions.astype(np.uint64)
    outside = np.ones(out.shape, bool)
    while outside.any():
        left, right = out[outside] >> np.uint64(half), out[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        out[outside] = (left << np.uint64(half)) | right
        outside = out >= n
    return out.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> list[int]:
    counter = torch.tensor([epoch], dtype=torch.int64)
    return _bits(seed, counter, 8, Stream.ORDER)[0].tolist()


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014) on uint64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
