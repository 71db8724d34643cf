"""Other code bases before and after `patch()`, by the scripts of examples/: eager, patched, compiled, patched and compiled."""

import pytest

from benchmarks import patched
from benchmarks.timing import subject_clock

pytestmark = pytest.mark.gpu


def pytest_generate_tests(metafunc):
    found = patched.REHEARSED if metafunc.config.getoption("--rehearse") else patched.STEPS
    metafunc.parametrize("step", found, ids=[step.name for step in found])


@pytest.mark.benchmark(group="examples", timer=subject_clock)
def test_example(benchmark, session, step):
    """The books are of the model as it was; the other ways beside it are in extra_info and in the summary."""
    session.compare(benchmark, step)
