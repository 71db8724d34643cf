"""SIGKILL and SIGTERM during an extraction cost at most a shard a process; `extraction_kills.py` says how it is done."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KILLS = Path(__file__).parents[1] / "extraction_kills.py"


@pytest.mark.slow  # starts and kills an extraction about twelve times
@pytest.mark.skipif(torch.cuda.is_available(), reason="processes forked after a GPU was used cannot use it")
@pytest.mark.parametrize("processes, kills", [(1, 4), (2, 3)])
def test_killed_extractions_end_in_the_bytes_of_an_undisturbed_one(processes, kills):
    seed = random.SystemRandom().randrange(1 << 30)
    words = ["--processes", str(processes), "--kills", str(kills), "--seed", str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(KILLS), *words], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-6000:]}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == kills == counts["elsewhere"] + counts["in_write"]
