"""The cost of the elastic exact mode: a step of one device, and on any machine of one and two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import elastic
from benchmarks.timing import subject_clock

MOST = 2.0  # times a step as ever, on a CPU: its optimizer is PyTorch's plain one then, its norm in fp64, and the model is small


def pytest_generate_tests(metafunc):
    if "step" in metafunc.fixturenames:
        found = elastic.REHEARSED if metafunc.config.getoption("--rehearse") else elastic.STEPS
        metafunc.parametrize("step", found, ids=[step.name for step in found])


@pytest.mark.gpu
@pytest.mark.benchmark(group="elastic", timer=subject_clock)
def test_step(benchmark, session, step):
    session.compare(benchmark, step)


@pytest.mark.benchmark(group="host")
@pytest.mark.parametrize("processes", [1, 2])
def test_processes(benchmark, processes):
    """Ways in turn, in one start of each number of processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "benchmarks.elastic"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = []

    def measure() -> None:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=Path(__file__).parents[1], env=environment)
        assert ran.returncode == 0, ran.stderr[-4000:]
        found.append(json.loads(ran.stdout.splitlines()[-1]))

    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(found[0])
    assert max(found[0]["elastic_over_as_ever"].values()) < MOST
