"""Every operator on the shapes of XL/1 and B/1: right first, then timed side by side with eager, the compiled formula and other libraries."""

import pytest

from benchmarks import operators, optimizers
from benchmarks.timing import subject_clock

pytestmark = pytest.mark.gpu


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        found = operators.rehearsal_cases() if metafunc.config.getoption("--rehearse") else operators.cases()
        metafunc.parametrize("case", found, ids=[case.key.removeprefix("ops/") for case in found])


@pytest.mark.benchmark(group="operators", timer=subject_clock)
def test_operator(benchmark, session, case):
    """The books are of the operator's forward and backward; the baselines beside it are in extra_info and in the summary."""
    settings = operators.REHEARSAL if session.rehearse else operators.Settings()
    rows = operators.measure(case, session.device, settings, session.ceilings, lambda turn, rounds: benchmark.pedantic(turn, rounds=rounds))
    session.judge(benchmark, [dict(row, section="ops", key=f"{case.key}/{row['mode']}") for row in rows])


@pytest.mark.benchmark(group="operators", timer=subject_clock)
def test_optimizer(benchmark, session):
    """One step over the parameters of XL/1."""
    model = None if session.rehearse else "LightningDiT-XL/1"
    row = optimizers.measure(model, session.device, 5, 0.05, session.ceilings, lambda turn, rounds: benchmark.pedantic(turn, rounds=rounds))
    session.judge(benchmark, [dict(row, section="ops", key=optimizers.KEY)])
