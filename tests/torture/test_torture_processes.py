"""A quick part of the campaign `processes`: other faults each time; the seed that is printed brings one back."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TORTURE = Path(__file__).parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes over gloo, forked; on a GPU machine they would share one over NCCL")


def campaign(part):
    """In a process of its own: pytest's has threads, and must not fork. How many faults each row tried."""
    seed = random.SystemRandom().randrange(1 << 30)
    words = [sys.executable, str(TORTURE), part, "--size", "0.05", "--seed", str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"seed {seed}: {done.stdout[-6000:]}{done.stderr[-3000:]}"
    return [int(count) for count in re.findall(r"(\d+) tried", done.stdout)]


def test_who_dies_hangs_or_goes_astray_is_named_and_all_end():
    assert campaign("processes.worlds") == [1, 1]


@pytest.mark.slow  # starts three interpreters
def test_whatever_torchrun_or_a_worker_of_it_is_sent_nothing_is_lost_and_nobody_is_left():
    assert campaign("processes.launched") == [1]
