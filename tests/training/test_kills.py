"""SIGKILL at random moments costs time and nothing else; `kills.py` says how it is done."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KILLS = Path(__file__).parents[1] / "kills.py"


def campaign(engine, processes, kills, seed, seconds):
    words = ["--engine", engine, "--processes", str(processes), "--kills", str(kills), "--seed", str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(KILLS), *words], capture_output=True, text=True, timeout=seconds, env=environment)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-6000:]}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == kills == counts["in_step"] + counts["in_save"]
    return counts


@pytest.mark.slow  # starts and kills a run about ten times
@pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on CPUs: kernels of GPUs need not add in one order")
@pytest.mark.parametrize("engine, processes, kills", [("dit", 1, 6), ("dit", 2, 3), ("tokenizer", 1, 3), ("tokenizer", 2, 1)])
def test_killed_runs_end_in_the_bits_of_an_undisturbed_one(engine, processes, kills):
    campaign(engine, processes, kills, seed=random.SystemRandom().randrange(1 << 30), seconds=300)


@pytest.mark.exhaustive
@pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on CPUs: kernels of GPUs need not add in one order")
@pytest.mark.parametrize("engine", ["dit", "tokenizer"])
@pytest.mark.parametrize("processes", [1, 2])
def test_fifty_kills(engine, processes):
    counts = campaign(engine, processes, 50, seed=0, seconds=3000)
    assert min(counts["in_step"], counts["in_save"]) >= 5, "both moments were struck"
