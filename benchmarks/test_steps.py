"""Steps of LightningDiT and of the tokenizer, fused against compiled and eager; VAVAE_REFERENCE adds the public code."""

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
    session.compare(benchmark, step)
