"""A quick part of the campaign `numbers`, other forms and runs each time: the seed that is printed brings one back; and what it finds."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TORTURE = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on CPUs; and processes forked after a GPU was used cannot use it")
def test_numbers_that_are_not_finite_move_nothing():
    """In a process of its own: pytest's has threads, and must not fork."""
    seed = random.SystemRandom().randrange(1 << 30)
    words = [sys.executable, str(TORTURE), "numbers", "--size", "0.05", "--seed", str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"seed {seed}: {done.stdout[-6000:]}{done.stderr[-3000:]}"
    tried = [int(count) for count in re.findall(r"(\d+) tried", done.stdout)]
    assert len(tried) == 5 and all(tried), done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks for what a CPU would not wait for")
def test_a_guard_that_lets_steps_through_and_one_that_waits_are_found(tmp_path, monkeypatch):
    from torture import engines, numbers

    from vavae_fast.training.guard import Guard

    engines.prepare(tmp_path)
    engine = engines.ENGINES["LightningDiT"](tmp_path, numbers.ALONE, *numbers.overrides("LightningDiT", "plain", 1))
    engine.train(0)
    draw, real = random.Random(0), Guard.step
    assert numbers.spoilt_step(engine, "a gradient that overflows the norm", draw) is None
    with monkeypatch.context() as patched:
        patched.setattr(Guard, "step", lambda self, norms, max_norm=None: real(self, norms, max_norm) if bool(torch.ones(())) else None)
        assert "waits for the device" in numbers.spoilt_step(engine, "a gradient", draw)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "isfinite", lambda value: torch.ones_like(value, dtype=torch.bool))
        assert "moved" in numbers.spoilt_step(engine, "a gradient that overflows the norm", draw)
