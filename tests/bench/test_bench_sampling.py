"""The ways of sampling that the benchmarks compare draw the same images, and what a share of a draw is counted for."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from benchmarks import sampling, steps, tokenizer_steps
from benchmarks.sampling import STEPS, WAYS, Way

CPU = torch.device("cpu")
EAGER = replace(steps.REHEARSAL, backend="eager")


def test_every_way_draws_the_same_images(monkeypatch):
    """In fp32: the engine with n latents and its unconditional half by the interval, forward_with_cfg with 2 n, guidance with times of each."""
    monkeypatch.setitem(WAYS, "fused", Way("fp32", fused=True))
    step = sampling.rehearsal(next(step for step in STEPS if step.size == "B/1"))
    makers = step.makers(CPU, EAGER)
    engine = torch.cat(makers["fused"]()())[: step.batch].short()
    assert engine.shape == (2, 3, 16, 16) and engine.float().std() > 1, "images that differ would be seen"
    for way, largest in (("equal batch, whole", 1), ("as configured, whole", 1), ("compiled bf16, whole", 12)):
        images = makers[way]()()[: step.batch].short()
        assert (images - engine).abs().max() <= largest, way


def test_a_share_is_counted_for_the_images_that_it_stands_for():
    step = STEPS[0]
    assert (step.steps("fused"), step.steps("equal batch"), step.steps("as configured")) == (249, 16, 62)
    assert step.images("fused") == 64 and step.images("equal batch") == 64 * 16 / 249 and step.images("as configured") == 4 * 62 / 249
    whole = next(step for step in STEPS if step.size == "B/1" and not step.label)
    assert whole.images("fused") == 128 and whole.images("equal batch, whole") == 64 and whole.images("as configured, whole") == 4
    facts = whole.facts({"fused": 8.0, "equal batch": 0.5, "equal batch, whole": 8.0})
    assert facts["images_per_second"]["fused"] == 16 and facts["images_per_second"]["equal batch, whole"] == 8
    assert facts["whole_over_share"] == {"equal batch": pytest.approx(64 * 16 / 249 / 64 * 8.0 / 0.5, abs=1e-4)}


def test_ratios_are_of_as_many_images():
    """A baseline that takes the same time for a quarter of the images is four times as slow."""
    race = steps.Race({"fused": [lambda: None], "as configured": [lambda: None]}, CPU, seconds=0, warm_up=0)
    race.seconds = {"fused": [2.0, 2.0, 2.0], "as configured": [0.5, 0.5, 0.7]}
    step = STEPS[0]
    row = steps._row(step, type("Arms", (), dict(step=step, peak_gb={}, left_out={})), race)
    assert row["ours"] == "fused" and row["ratio"] == {"as configured": pytest.approx(0.5 / 2.0 * 64 / (4 * 62 / 249), abs=1e-4)}
    assert row["us"]["fused"] == 2e6 and row["us"]["as configured"] == pytest.approx(0.5e6 * 64 / (4 * 62 / 249), abs=0.1)


def test_what_cannot_be_compared_says_why():
    fp8, public = (next(step for step in STEPS if step.label == label) for label in ("fp8", "public code"))
    assert "sample.precision=bf16" in fp8.lacking(CPU, steps.REHEARSAL)
    assert "VAVAE_REFERENCE" in public.lacking(CPU, steps.REHEARSAL)
    assert STEPS[0].lacking(CPU, steps.REHEARSAL) is None


def test_names_are_different_and_ways_are_known():
    every = (*steps.STEPS, *sampling.STEPS, *tokenizer_steps.STEPS)
    assert len({step.name for step in every}) == len(every)
    assert {arm for step in STEPS if isinstance(step, sampling.Draw) for arm in step.arms} == set(sampling.BASELINES)
    assert {arm for step in STEPS if isinstance(step, sampling.OneStep) for arm in step.arms} <= set(steps.BASELINES)


def test_the_forms_of_the_update_are_one_function():
    x, v = torch.randn(2, 8, 4, 4), torch.randn(4, 8, 4, 4)
    torch.testing.assert_close(sampling.short_update(x, v, 0.004), sampling.update(x, v, torch.tensor(0.004)), rtol=1e-6, atol=1e-6)
