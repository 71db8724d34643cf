"""A quick part of the campaign `numbers`; and what it finds."""

import random

import pytest
import torch
from torture.quick import campaign, on_cpu, tried


@on_cpu
def test_numbers_that_are_not_finite_move_nothing(tmp_path):
    rows = campaign(tmp_path, "numbers", size=0.05)
    assert len(rows) == 5 and all(tried(rows))


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
