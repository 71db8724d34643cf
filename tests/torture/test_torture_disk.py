"""A quick part of the campaign `disk`: other stages, levels and moments each time; the seed that is printed brings one back."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TORTURE = Path(__file__).parent


@pytest.mark.slow  # runs a few stages, each undisturbed, on a faulty disk, and on the mended one
@pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on CPUs; and processes forked after a GPU was used cannot use it")
def test_a_disk_that_is_full_refuses_goes_or_is_slow_costs_a_line_and_no_work():
    seed = random.SystemRandom().randrange(1 << 30)
    words = [sys.executable, str(TORTURE), "disk", "--size", "0.03", "--seed", str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"seed {seed}: {done.stdout[-6000:]}{done.stderr[-3000:]}"
    tried = [int(count) for count in re.findall(r"(\d+) tried", done.stdout)]
    untried = done.stdout.count("not tried: ")  # a container may refuse mounts, or that a process watches its child's calls
    assert len(tried) == 6 and sum(count > 0 for count in tried) == 6 - untried
