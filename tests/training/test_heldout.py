"""The held-out loss: fixed questions, the same answer on one process or several, in one batch or many, and no random number taken."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vavae_fast import rng
from vavae_fast.data.latents import open_store
from vavae_fast.distributed import World
from vavae_fast.flow import create_transport
from vavae_fast.training.heldout import SEED, fixed_times, held_out_loss, read_held_out, spread_rows

ALONE = World(0, 1, torch.device("cpu"))
LOGNORM, UNIFORM = create_transport("Linear", use_lognorm=True), create_transport("Linear")
MEAN, STD = torch.full((1, 2, 1, 1), 1.0), torch.full((1, 2, 1, 1), 2.0)


class Velocity(nn.Module):
    """Answers differently to every x, t and y."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, y):
        return self.scale * x + t.view(-1, 1, 1, 1) + 0.1 * y.view(-1, 1, 1, 1)


@pytest.fixture
def store(tmp_path):
    """11 latents in two shards."""
    generator = torch.Generator().manual_seed(0)
    for number, rows in enumerate((5, 6)):
        latents = torch.randn(rows, 2, 2, 2, generator=generator)
        tensors = dict(latents=latents, latents_flip=latents.flip(-1), labels=torch.arange(rows) % 3)
        save_file(tensors, tmp_path / f"latents_rank{number:02d}_shard000.safetensors", {"total_size": str(rows)})
    return open_store(tmp_path)


def everything(store, count=100, world=ALONE):
    return read_held_out(store, count, MEAN, STD, 0.5, world)


def test_the_loss_is_the_mean_over_latents_each_at_its_own_noise_and_time(store):
    """One by one, from the formula: (model(t x1 + (1 - t) x0, t) - (x1 - x0))^2."""
    model, held = Velocity(), everything(store)
    latents = (store.read(np.arange(11), np.zeros(11, bool)) - 1.0) / 2.0 * 0.5
    losses, times = [], fixed_times(LOGNORM, torch.arange(11))
    for i in range(11):
        x1, index = latents[i : i + 1], torch.tensor([i])
        x0, t = rng.normal(SEED, index, like=x1), times[i : i + 1]
        xt = t * x1 + (1 - t) * x0
        losses.append((model(xt, t, store.labels[index]) - (x1 - x0)).square().mean().item())
    found = held_out_loss(model, LOGNORM, held, 4, False, ALONE)
    assert found["mse"] == pytest.approx(np.mean(losses), rel=1e-6)
    for low in range(10):
        inside = [loss for loss, t in zip(losses, times) if low <= 10 * t < low + 1]
        assert found.get(f"mse_t{low / 10}") == (pytest.approx(np.mean(inside), rel=1e-6) if inside else None)


def test_the_batch_does_not_matter_and_no_random_number_is_taken(store):
    model, held = Velocity(), everything(store)
    state = torch.get_rng_state()
    answers = [held_out_loss(model, LOGNORM, held, batch, False, ALONE) for batch in (1, 4, 64)]
    assert torch.equal(torch.get_rng_state(), state)
    for answer in answers[1:]:
        assert answer == pytest.approx(answers[0], rel=1e-6)
    assert model.scale.grad is None


def test_processes_share_the_set_and_what_fills_up_is_not_counted(store):
    """Three processes: 4 rows each, the twelfth counts nothing; their sums together are one process's."""
    model, whole = Velocity(), everything(store)
    shares = [everything(store, world=World(rank, 3, torch.device("cpu"))) for rank in range(3)]
    assert all(len(share.index) == 4 for share in shares)
    assert sorted(i for share in shares for i in share.index.tolist()) == list(range(12))
    for share in shares:
        for latent, label, i in zip(share.latents, share.labels, share.index.clamp(max=10)):
            assert torch.equal(latent, whole.latents[i]) and label == whole.labels[i]
    sums = []
    three = World(0, 3, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "mean", lambda self, values: (sums.append(values.clone()), values)[1])
        for share in shares:
            held_out_loss(model, LOGNORM, share, 3, False, three)
    loss, number = torch.stack(sums).sum(0).sum(1).tolist()
    assert number == 11 and loss / number == pytest.approx(held_out_loss(model, LOGNORM, whole, 11, False, ALONE)["mse"], rel=1e-6)


def test_fewer_than_there_are_come_from_everywhere(store):
    assert spread_rows(11, 4).tolist() == [0, 2, 5, 8] and spread_rows(3, 100).tolist() == [0, 1, 2]
    held = everything(store, count=4)
    assert held.count == 4 and torch.equal(held.labels, store.labels[[0, 2, 5, 8]])


@pytest.mark.parametrize("transport", [LOGNORM, UNIFORM, create_transport("Linear", partitial_train=(0.2, 0.6), partial_ratio=0.5)])
def test_times_cover_the_training_distribution_evenly(transport):
    """Their ranks fill every tenth of (0, 1) to within a few of a thousand times."""
    times = fixed_times(transport, torch.arange(1000))
    drawn = transport.sample_times(20_000, "cpu", torch.Generator().manual_seed(0)).sort().values
    ranks = torch.searchsorted(drawn, times) / 20_000
    assert ranks.sort().values.sub((torch.arange(1000) + 0.5) / 1000).abs().max() < 0.02
    assert torch.equal(times[:10], fixed_times(transport, torch.arange(10)))
