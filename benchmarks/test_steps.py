"""Steps of LightningDiT and of the tokenizer, fused against compiled and eager; VAVAE_REFERENCE adds the public code."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import steps, tokenizer_steps
from benchmarks.timing import subject_clock

pytestmark = pytest.mark.gpu


def pytest_generate_tests(metafunc):
    rehearsed = (*steps.REHEARSED, *tokenizer_steps.REHEARSED)
    found = rehearsed if metafunc.config.getoption("--rehearse") else (*steps.STEPS, *tokenizer_steps.STEPS)
    metafunc.parametrize("step", found, ids=[step.name for step in found])


@pytest.mark.benchmark(group="steps", timer=subject_clock)
def test_step(benchmark, session, step):
    """The books are of the first way; the others beside it are in extra_info and in the summary."""
    reference = os.environ.get("VAVAE_REFERENCE")
    if "public code" in step.arms and not reference:
        pytest.skip("VAVAE_REFERENCE names no checkout of the public LightningDiT")
    settings = steps.REHEARSAL if session.rehearse else steps.Settings()
    settings = replace(settings, reference=Path(reference) if reference else None)
    row = steps.compare(step, session.device, settings, last=lambda turn, rounds: benchmark.pedantic(turn, rounds=rounds))
    session.judge(benchmark, [dict(row, section="steps", key=f"steps/{step.name}")])
