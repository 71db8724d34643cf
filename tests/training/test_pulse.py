"""Slow death is told from convergence, from noise and from single lines, and a resumed run counts on."""

import math

import pytest
import torch

from vavae_fast.errors import BadInput
from vavae_fast.training.guard import Guard
from vavae_fast.training.pulse import LEAST, Pulse


def felt(pulse, norms, losses, steps=100):
    """Log lines every `steps` steps; the step at which the run was ended, or None."""
    for line, (norm, loss) in enumerate(zip(norms, losses), 1):
        try:
            pulse.feel(line * steps, steps, norm, loss)
        except BadInput as error:
            assert "\n" not in str(error) and f"up to step {line * steps}" in str(error) and "no longer learns" in str(error)
            return line * steps
    return None


@pytest.mark.parametrize("dead", [0.0, 1e-30, 3e-5])
def test_a_gradient_that_fades_while_the_loss_stands_ends_the_run_after_200_steps(dead):
    assert felt(Pulse(200), [0.5] * 30 + [dead] * 9, [0.8] * 39) == 3200


def test_it_may_fade_slowly():
    """By half a line: no window of lines sees it, the level of the whole run does."""
    norms = [0.5] * 10 + [0.5**k for k in range(1, 60)]
    ended = felt(Pulse(200), norms, [0.8] * len(norms))
    assert ended is not None and norms[ended // 100 - 1] > 1e-6


def test_a_run_that_never_had_a_gradient():
    assert felt(Pulse(200), [0.0] * 9, [1.0] * 9) == 200


def test_one_live_step_among_the_steps_of_a_line_and_a_single_faint_line_are_no_death():
    assert felt(Pulse(200), ([0.5] * 6 + [0.0] + [0.005, 0.0]) * 20, [0.8] * 200) is None


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_run_that_converges_to_nothing_left_goes_on(power):
    """The error e falls by twelve orders of magnitude; gradients of a smooth loss are of size e, the loss of e ** power at worst."""
    errors = [0.97**k for k in range(900)]
    assert felt(Pulse(200), errors, [e**power for e in errors]) is None


def test_a_run_whose_gradients_fall_as_training_ones_do_goes_on():
    """From 100 at the start to 0.1, with the loss hardly moving: noise around the optimum."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, generator=generator).exp().tolist()
    assert felt(Pulse(200), [n * (100 * 0.9**k + 0.1) for k, n in enumerate(noise)], [1.0 + 0.1 * n for n in noise]) is None


def test_lines_with_skipped_steps_say_nothing_and_stop_no_count():
    pulse = Pulse(300)
    assert felt(pulse, [0.5] * 6 + [0.0, math.nan, 0.0, math.inf, 0.0], [0.8] * 11) == 1100


def test_zero_never_stops():
    assert felt(Pulse(0), [0.5] * 10 + [0.0] * 50, [0.8] * 60) is None


def test_another_objective_has_another_level():
    guard = Guard(torch.device("cpu"), 10, max_faint=200)
    assert felt(guard.pulse, [1000.0] * 10, [0.8] * 10) is None
    guard.expect_another_loss()
    assert felt(guard.pulse, [1e-3] * 10, [0.8] * 10) is None


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_resumed_run_ends_where_the_straight_one_does(cut):
    norms = [0.5] * (LEAST + 1) + [1e-7] * 6
    straight, first = Guard(torch.device("cpu"), 10, max_faint=400), Guard(torch.device("cpu"), 10, max_faint=400)
    resumed = Guard(torch.device("cpu"), 10, max_faint=400)
    assert felt(first.pulse, norms[:cut], [0.8] * cut) in (None, 1000)
    resumed.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    before = felt(straight.pulse, norms, [0.8] * len(norms))
    after = felt(resumed.pulse, norms[cut:], [0.8] * (len(norms) - cut))
    assert before == 1000 and (after == 1000 - 100 * cut or cut >= 10)


def test_a_guard_saved_before_there_was_a_pulse_loads():
    guard = Guard(torch.device("cpu"), 10, max_faint=200)
    old = {name: value for name, value in guard.state_dict().items() if name not in ("faint", "norm_level", "loss_level")}
    guard.load_state_dict(old)
    assert guard.pulse.faint == 0
