"""A small Fréchet distance while a run trains: of some thousand samples or reconstructions, for its trend and not for a paper.

Few samples bias FID upwards by much the same amount each time (Chong & Forsyth 2020), so values compare at one number of samples only.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from vavae_fast.distributed import World
from vavae_fast.evaluation import FeatureStatistics, frechet_distance

LEAST = 2048  # samples: fewer leave the covariance of 2,048 features without full rank


@dataclass(frozen=True)
class FidJudge:
    """inception(uint8 images (n, 3, H, W)).pool -> (n, 2048); mu, sigma: the reference's moments of the same features."""

    inception: Callable[[Tensor], Any]
    mu: np.ndarray
    sigma: np.ndarray

    def score(self, images: Iterable[Tensor], world: World) -> float | None:
        """The distance of all processes' `images`, each giving its own; on the main process, None elsewhere. All must call."""
        found = gathered(pool_statistics(self.inception, images), world)
        if found is None:
            return None
        mu, sigma = found.result()
        return frechet_distance(mu.numpy(), sigma.numpy(), self.mu, self.sigma)


def pool_statistics(inception: Callable[[Tensor], object], images: Iterable[Tensor]) -> FeatureStatistics:
    """Moments of inception(batch).pool over uint8 batches (n, 3, H, W), on the CPU."""
    found = FeatureStatistics()
    for batch in images:
        found.update(inception(batch).pool.cpu())
    return found


def gathered(own: FeatureStatistics, world: World) -> FeatureStatistics | None:
    """All processes' moments as one on the main process, None elsewhere. All must call."""
    if world.size == 1:
        return own
    shares = [None] * world.size if world.main else None
    dist.gather_object(own, shares, dst=0, group=world.hosts)
    if not world.main:
        return None
    merged = FeatureStatistics()
    for share in shares:
        merged.merge(share)
    return merged


def share_of(count: int, world: World) -> range:
    """Which of `count` samples a process draws: as many on each, which a sharded model needs, so the last few may be left out."""
    return range(world.rank, count // world.size * world.size, world.size)
