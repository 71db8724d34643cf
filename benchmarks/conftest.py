"""What the benchmarks share: guards, the device and its ceilings, and the lines that every measurement ends in.

    pytest benchmarks/ [--guards FILE] [--rehearse]

--rehearse runs what needs a GPU on the CPU: tiny shapes, kernels in Triton's interpreter, no guard on their times.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

MEASURED = pytest.StashKey[list[dict[str, Any]]]()
GUARDS = pytest.StashKey[Any]()


def pytest_addoption(parser):
    parser.addoption("--guards", type=Path, metavar="FILE", help="guards to hold measurements against; default benchmarks/guards.yaml")
    parser.addoption("--rehearse", action="store_true", help="run what needs a GPU on the CPU, tiny, in Triton's interpreter")


def pytest_configure(config):
    if config.getoption("--rehearse"):
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        torch.set_num_threads(1)
    from benchmarks import guards

    try:
        config.stash[GUARDS] = guards.read(config.getoption("--guards") or guards.FILE)
    except guards.GuardError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[MEASURED] = []


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() or config.getoption("--rehearse"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter, config):
    from benchmarks.records import lines

    rows = config.stash.get(MEASURED, [])
    if rows:
        terminalreporter.section("measured, side by side")
        for line in lines(rows):
            terminalreporter.line(line)


class Session:
    """The device of the GPU benchmarks, its ceilings, and how a measurement is kept and judged."""

    def __init__(self, config):
        self.config, self.rehearse = config, config.getoption("--rehearse")
        self.device = torch.device("cpu" if self.rehearse else "cuda")
        self.rates: dict[str, float] | None = None

    @property
    def ceilings(self) -> dict[str, float]:
        """Copy bandwidth and matrix rate, measured once in this run."""
        from benchmarks.ceilings import Rates, bounds, ceilings

        if self.rates is None:
            rows = list(ceilings(Rates(self.device, self.rehearse)))
            self.keep([dict(row, section="ceilings", key=f"ceilings/{row['name']}") for row in rows])
            self.rates = bounds(rows)
        return self.rates

    def keep(self, rows: list[dict[str, Any]]) -> None:
        self.config.stash[MEASURED] += rows

    def compare(self, benchmark, step) -> None:
        """Measure a step's ways side by side, keep and judge the row; skipped where it is no comparison."""
        from benchmarks import steps

        reference = os.environ.get("VAVAE_REFERENCE")
        settings = steps.REHEARSAL if self.rehearse else steps.Settings()
        settings = replace(settings, reference=Path(reference) if reference else None)
        if reason := step.lacking(self.device, settings):
            pytest.skip(reason)
        row = steps.compare(step, self.device, settings, last=lambda turn, rounds: benchmark.pedantic(turn, rounds=rounds))
        self.judge(benchmark, [dict(row, section="steps", key=f"steps/{step.name}")])

    def judge(self, benchmark, rows: list[dict[str, Any]]) -> None:
        """Keep the rows, in pytest-benchmark's file too, and fail where one is under its guard."""
        benchmark.extra_info["rows"] = rows
        self.keep(rows)
        faults = [] if self.rehearse else self.config.stash[GUARDS].faults(rows)
        if faults:
            pytest.fail("\n".join(faults), pytrace=False)


@pytest.fixture(scope="session")
def session(request) -> Session:
    return Session(request.config)


@pytest.fixture
def guards(request):
    return request.config.stash[GUARDS]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
