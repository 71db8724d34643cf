"""A non-finite gradient changes nothing, is counted, and too many in a row end the run."""

import copy

import pytest
import torch
from torch import nn

from vavae_fast.training.guard import Guard
from vavae_fast.training.optimizer import gradient_norm
from vavae_kernels import AdamWEMA

CPU = torch.device("cpu")


FUSED = {
    "Adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.1, weight_decay=0.1, fused=True),
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1, fused=True),
    "AdamWEMA": lambda net: AdamWEMA(net.named_parameters(), lr=0.1, weight_decay=0.1, ema_decay=0.9),
}


def trained(kind="AdamW"):
    """A network two steps into its training, with moments."""
    net = nn.Linear(4, 3)
    optimizer = FUSED[kind](net)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return net, optimizer


def bits(net, optimizer):
    return [t.clone() for p in net.parameters() for t in (p, *optimizer.state[p].values())]


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_a_bad_gradient_leaves_every_bit(kind, max_norm, bad):
    """1e30 is finite, but its square is not: the norm overflows, and scaled by it the step would be silently 0."""
    net, optimizer = trained(kind)
    guard = Guard(CPU, 10)
    before = bits(net, optimizer)
    optimizer.zero_grad()
    net(torch.randn(5, 4)).sum().backward()
    net.weight.grad[1, 2] = bad
    ok = guard.step({optimizer: gradient_norm(net.parameters())}, max_norm)
    assert not ok and all(torch.equal(a, b) for a, b in zip(before, bits(net, optimizer), strict=True))
    assert int(guard.skipped) == int(guard.in_a_row) == 1


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("max_norm", [None, 0.01, 1e6])
def test_a_good_gradient_steps_as_without_the_guard_and_as_torch_clips(kind, max_norm):
    net, optimizer = trained(kind)
    twin = copy.deepcopy(net)
    twin_optimizer = FUSED[kind](twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    guard = Guard(CPU, 10)
    x = torch.randn(5, 4)
    for n, o in ((net, optimizer), (twin, twin_optimizer)):
        o.zero_grad()
        n(x).square().sum().backward()
    assert guard.step({optimizer: gradient_norm(net.parameters())}, max_norm)
    if max_norm is not None:
        nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
    twin_optimizer.step()
    for a, b in zip(bits(net, optimizer), bits(twin, twin_optimizer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if max_norm == 0.01 else 0, atol=1e-9 if max_norm == 0.01 else 0)
    assert int(guard.skipped) == int(guard.in_a_row) == 0


def test_a_step_after_a_skipped_one_is_taken():
    net, optimizer = trained()
    guard = Guard(CPU, 10)
    for finite in (False, True):
        optimizer.zero_grad()
        net(torch.randn(5, 4)).sum().backward()
        before = net.weight.detach().clone()
        guard.step({optimizer: torch.tensor(1.0 if finite else float("nan"))})
        assert torch.equal(net.weight, before) is not finite


def test_all_optimizers_stand_still_together():
    (net, optimizer), (other, other_optimizer) = trained(), trained()
    before = net.weight.clone(), other.weight.clone()
    for n in (net, other):
        n(torch.randn(5, 4)).sum().backward()
    guard = Guard(CPU, 10)
    guard.step({optimizer: torch.tensor(1.0), other_optimizer: torch.tensor(float("inf"))})
    assert torch.equal(net.weight, before[0]) and torch.equal(other.weight, before[1]) and int(guard.skipped) == 1


def test_counts_in_a_row_and_in_all():
    guard, (_, optimizer) = Guard(CPU, 3), trained()
    for finite, skipped, in_a_row in ((1, 0, 0), (0, 1, 1), (0, 2, 2), (1, 2, 0), (0, 3, 1), (0, 4, 2)):
        guard.step({optimizer: torch.tensor(1.0 if finite else float("nan"))})
        assert (int(guard.skipped), int(guard.in_a_row), guard.exhausted()) == (skipped, in_a_row, False)
    guard.step({optimizer: torch.tensor(float("inf"))})
    assert guard.exhausted()
    said = str(guard.verdict(40, 8, "They are a's"))
    assert "not finite in the last 3 steps up to step 40 (samples 296 to 319 of the run's order); weights are those before them. They are" in said
    assert said.count("\n") == 0 and "a's. Lower the learning rate" in said
