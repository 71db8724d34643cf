"""Held-out loss at fixed noise and times: the same question at every step, so that the answer moves only with the weights.

Latent i of the held-out set is always mixed with rng.normal(SEED, i) at the time whose rank in the training distribution of t is
the i-th number of the golden-ratio sequence, which covers (0, 1) evenly however many there are. Neither depends on the run's seed,
the number of processes or the step, so values compare across steps, resumes and runs on the same latents and distribution of t;
the means over bins of t compare across distributions too.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vavae_fast import rng
from vavae_fast.data.latents import ShardStore
from vavae_fast.distributed import World
from vavae_fast.flow.transport import Transport

SEED = 0
BINS = 10  # of t, of equal width
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class HeldOut:
    """One process's share of a held-out set of `count`: latents (n, C, H, W) normalised, labels (n,), index (n,) = place in the set.

    Every process has the same number of rows, which collectives need; where index >= count, a row is filled up and not counted.
    """

    latents: Tensor
    labels: Tensor
    index: Tensor
    count: int


def spread_rows(rows: int, count: int) -> np.ndarray:
    """min(rows, count) of `rows`, evenly spread: shards are often sorted by class."""
    count = min(rows, count)
    return np.arange(count, dtype=np.int64) * rows // count


def read_held_out(store: ShardStore, count: int, mean: Tensor | None, std: Tensor | None, multiplier: float, world: World) -> HeldOut:
    """Every world-th of `count` latents, normalised as training's: (x - mean) / std where given, times multiplier. On the CPU.

    Of means with standard deviations: the samples that `extract --posterior sample` would have stored.
    """
    rows = spread_rows(len(store), count)
    share = -(-len(rows) // world.size)
    index = np.arange(share, dtype=np.int64) * world.size + world.rank
    wanted = rows[np.minimum(index, len(rows) - 1)]
    flip = np.zeros(share, bool)
    latents = store.read(wanted, flip)
    if store.has_std:
        noise = rng.normal(0, torch.from_numpy(2 * wanted), like=latents, stream=rng.Stream.POSTERIOR)
        latents.addcmul_(store.read(wanted, flip, std=True), noise)
    if mean is not None:
        latents.sub_(mean).div_(std)
    return HeldOut(latents.mul_(multiplier), store.labels[wanted], torch.from_numpy(index), len(rows))


def fixed_times(transport: Transport, index: Tensor) -> Tensor:
    """index (B,) -> t (B,) float32: quantiles of the training distribution of t, by place in the held-out set."""
    rank = ((index.double() + 0.5) * _GOLDEN).frac()
    return transport.times_from((torch.special.ndtri(rank) if transport.use_lognorm else rank).float())


@torch.no_grad()
def held_out_loss(model: nn.Module, transport: Transport, held: HeldOut, batch: int, bf16: bool, world: World) -> dict[str, float]:
    """`mse`: the mean over the whole set of the loss that training logs as mse; `mse_t0.3`: over the t in [0.3, 0.4), where there are any.

    One host sync. The model is in evaluation mode; `batch` latents of each process are computed at once.
    """
    sums = torch.zeros(2, BINS, dtype=torch.float64, device=world.device)
    for rows in torch.arange(len(held.index)).split(batch):
        x1, labels, index = (part[rows].to(world.device) for part in (held.latents, held.labels, held.index))
        t = fixed_times(transport, index)
        x0 = rng.normal(SEED, index, like=x1)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            losses = transport.training_losses(model, x1, dict(y=labels), x0=x0, t=t)["loss"].double()
        counted = (index < held.count).double()
        places = (t * BINS).long().clamp(0, BINS - 1)
        sums[0].index_add_(0, places, losses * counted)
        sums[1].index_add_(0, places, counted)
    loss, number = (world.mean(sums) * world.size).cpu()
    means = {f"mse_t{place / BINS:.1f}": (loss[place] / number[place]).item() for place in range(BINS) if number[place] > 0}
    return {"mse": (loss.sum() / number.sum()).item()} | means
