"""A non-finite gradient changes nothing, is counted, and too many in a row end the run."""

import copy

import pytest
import torch
from torch import nn

from vavae_fast.errors import BadInput
from vavae_fast.training.ema import EMA
from vavae_fast.training.guard import Guard
from vavae_fast.training.optimizer import clip_gradients

CPU = torch.device("cpu")


def trained(kind=torch.optim.AdamW):
    """A network two steps into its training, with moments."""
    net = nn.Linear(4, 3)
    optimizer = kind(net.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return net, optimizer


def bits(net, optimizer, ema):
    state = [v for p in net.parameters() for v in optimizer.state[p].values()]
    return [t.clone() for t in (*net.parameters(), *state, *ema.shadow.values())]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_a_bad_gradient_leaves_every_bit(kind, max_norm, bad):
    """1e30 is finite, but its square is not: the norm overflows, and scaled by it the step would be silently 0."""
    net, optimizer = trained(kind)
    ema, guard = EMA(net, 0.9), Guard(CPU, 10)
    before = bits(net, optimizer, ema)
    optimizer.zero_grad()
    net(torch.randn(5, 4)).sum().backward()
    net.weight.grad[1, 2] = bad
    ok = guard.step(clip_gradients(net.parameters(), max_norm), optimizer)
    ema.update(2, ok)
    assert not ok and all(torch.equal(a, b) for a, b in zip(before, bits(net, optimizer, ema)))
    assert int(guard.skipped) == int(guard.in_a_row) == 1


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_good_gradient_steps_as_without_the_guard(kind):
    net, optimizer = trained(kind)
    twin, twin_optimizer = copy.deepcopy(net), None
    twin_optimizer = kind(twin.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    guard = Guard(CPU, 10)
    x = torch.randn(5, 4)
    for n, o in ((net, optimizer), (twin, twin_optimizer)):
        o.zero_grad()
        n(x).square().sum().backward()
    assert guard.step(clip_gradients(net.parameters(), None), optimizer)
    twin_optimizer.step()
    assert torch.equal(net.weight, twin.weight) and torch.equal(net.bias, twin.bias)
    assert int(guard.skipped) == int(guard.in_a_row) == 0


def test_a_step_after_a_skipped_one_is_taken():
    net, optimizer = trained()
    guard = Guard(CPU, 10)
    for finite in (False, True):
        optimizer.zero_grad()
        net(torch.randn(5, 4)).sum().backward()
        before = net.weight.detach().clone()
        guard.step(torch.tensor(1.0 if finite else float("nan")), optimizer)
        assert torch.equal(net.weight, before) is not finite


def test_all_optimizers_stand_still_together():
    (net, optimizer), (other, other_optimizer) = trained(), trained()
    before = net.weight.clone(), other.weight.clone()
    for n in (net, other):
        n(torch.randn(5, 4)).sum().backward()
    guard = Guard(CPU, 10)
    guard.step(torch.tensor(float("inf")), optimizer, other_optimizer)
    assert torch.equal(net.weight, before[0]) and torch.equal(other.weight, before[1]) and int(guard.skipped) == 1


def test_counts_in_a_row_and_in_all():
    guard = Guard(CPU, 3)
    for finite, skipped, in_a_row in ((1, 0, 0), (0, 1, 1), (0, 2, 2), (1, 2, 0), (0, 3, 1), (0, 4, 2)):
        guard.step(torch.tensor(1.0 if finite else float("nan")))
        guard.check(1)
        assert (int(guard.skipped), int(guard.in_a_row)) == (skipped, in_a_row)
    guard.step(torch.tensor(float("inf")))
    with pytest.raises(BadInput, match=r"not finite in the last 3 steps up to step 40.*Lower the learning rate") as caught:
        guard.check(40)
    assert "\n" not in str(caught.value)
