"""A quick part of the campaign `kills`: other events and moments each time; the seed that is printed brings one back."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TORTURE = Path(__file__).parent


def campaign(part, size, seconds):
    """In a process of its own: pytest's has threads, and must not fork."""
    seed = random.SystemRandom().randrange(1 << 30)
    words = [sys.executable, str(TORTURE), part, "--size", str(size), "--seed", str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"seed {seed}: {done.stdout[-6000:]}{done.stderr[-3000:]}"
    if "not tried: " in done.stdout:
        pytest.skip(re.search("not tried: .*", done.stdout)[0])
    return [int(count.replace(",", "")) for count in re.findall(r"([\d,]+) tried", done.stdout)]


def test_a_save_that_is_killed_or_cut_at_an_event_loses_nothing():
    tried = campaign("kills.saves", 0.015, 200)
    assert len(tried) == 3 and min(tried) >= 5


@pytest.mark.slow  # trains, draws, … in each of the stages that are chosen, several times
@pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on CPUs; and processes forked after a GPU was used cannot use it")
def test_stages_that_are_killed_end_in_the_bits_of_undisturbed_ones():
    tried = campaign("kills.stages", 0.06, 500)
    assert len(tried) == 4 and min(tried) >= 1


@pytest.mark.exhaustive
@pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on CPUs; and processes forked after a GPU was used cannot use it")
def test_every_stage_killed_again_and_again():
    assert sum(campaign("kills.stages", 1, 5000)) >= 300
