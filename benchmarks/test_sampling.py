"""Whole draws by the published settings; on any machine, how often their network is evaluated."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import sampling
from benchmarks.timing import subject_clock
from vavae_fast.flow.generate import generate_latents
from vavae_fast.models import create_lightningdit
from vavae_fast.models.inference import predictor

CPU = torch.device("cpu")


def pytest_generate_tests(metafunc):
    if "step" in metafunc.fixturenames:
        found = sampling.REHEARSED if metafunc.config.getoption("--rehearse") else sampling.STEPS
        metafunc.parametrize("step", found, ids=[step.name for step in found])


@pytest.mark.gpu
@pytest.mark.benchmark(group="sampling", timer=subject_clock)
def test_sampling(benchmark, session, step):
    """A share of a baseline's steps stands for all of them: where both are measured, within 5 %."""
    session.compare(benchmark, step)
    scaling = benchmark.extra_info["rows"][0].get("whole_over_share", {})
    wrong = {way: ratio for way, ratio in scaling.items() if abs(ratio - 1) > 0.05}
    assert session.rehearse or not wrong, f"whole draws take times their shares: {wrong}"


@pytest.mark.benchmark(group="host")
@pytest.mark.parametrize(("start", "forwards"), [(0.10, 430), (0.11, 425), (0.125, 417)], ids=str)
def test_forwards_of_an_image(benchmark, start, forwards):
    """249 shifted steps through the engine, at the interval of the 64-epoch result, of the public code's default and of the 800-epoch result.

    Both halves at every step would be 498 evaluations of the network.
    """
    model = create_lightningdit("custom", **sampling.config("tiny")).eval()
    network = predictor(model, CPU, "fp32")
    evaluated = [0]

    def counting(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        evaluated[0] += len(x)
        return network(x, t, y)

    settings, labels = replace(sampling.PUBLISHED, cfg_interval_start=start), torch.arange(3)
    assert 2 * (settings.num_steps - 1) == 498
    draw = lambda: list(generate_latents(counting, labels, (8, 4, 4), settings, seed=0, null_label=10, batch_size=2))
    benchmark.pedantic(draw, rounds=1)
    benchmark.extra_info.update(forwards=evaluated[0] / 3)
    assert evaluated[0] == 3 * forwards
