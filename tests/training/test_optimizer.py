"""Schedules, the gradient norm, and optimizer state as named tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vavae_fast.errors import BadInput
from vavae_fast.training.optimizer import (
    gradient_norm,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_ema_decay,
    set_learning_rate,
    trainable,
)
from vavae_kernels import AdamWEMA


def network():
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))


def with_gradients(scale=1.0):
    net = network()
    (scale * net(torch.randn(7, 3)).square().sum()).backward()
    return net


def test_the_schedule_is_constant_by_default():
    assert {learning_rate(2e-4, step, 100) for step in range(100)} == {2e-4}


@given(st.integers(1, 500), st.integers(0, 200), st.floats(0, 1), st.floats(1e-6, 1.0))
def test_the_schedule_stays_above_0_and_at_most_the_base(max_steps, warmup, decay, base):
    rates = [learning_rate(base, step, max_steps, warmup, decay) for step in range(max_steps)]
    assert all(0 < rate <= base for rate in rates)


def test_warm_up_and_decay_are_linear():
    rates = [learning_rate(1.0, step, 100, warmup_steps=9, decay_fraction=0.2) for step in range(100)]
    torch.testing.assert_close(torch.tensor(rates[:10]), torch.linspace(0.1, 1.0, 10))
    assert set(rates[9:81]) == {1.0}
    torch.testing.assert_close(torch.tensor(rates[80:]), torch.linspace(1.0, 0.05, 20))


def test_set_learning_rate_reaches_every_group():
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_the_norm_is_that_of_all_gradients():
    net = with_gradients()
    exact = torch.sqrt(sum(p.grad.double().square().sum() for p in net.parameters()))
    torch.testing.assert_close(gradient_norm(net.parameters()).double(), exact, rtol=1e-6, atol=0)


def test_the_average_warms_up_to_its_decay():
    net = network()
    optimizer = AdamWEMA(net.named_parameters(), ema_decay=0.99)
    decays = []
    for step in (0, 8, 2000):
        set_ema_decay(optimizer, 0.99, step, warmup=True)
        decays.append(optimizer.param_groups[0]["ema_decay"])
    assert decays == [0.1, 0.5, 0.99]
    set_ema_decay(optimizer, 0.99, 0)
    assert optimizer.param_groups[0]["ema_decay"] == 0.99


def test_parameters_without_gradient_are_passed_over():
    net = with_gradients()
    expected = gradient_norm(list(net.parameters())[2:])
    net[0].weight.grad = net[0].bias.grad = None
    assert torch.equal(gradient_norm(net.parameters()), expected)


def test_trainable_names_what_asks_for_gradients():
    net, other = network(), nn.Linear(2, 2)
    net[0].bias.requires_grad_(False)
    assert list(trainable(net, ("extra", other))) == ["0.weight", "2.weight", "2.bias", "extra.weight", "extra.bias"]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_state_comes_back_bit_for_bit(kind):
    """Straight on, or saved, loaded into a fresh optimizer and on: the same weights."""
    straight = with_gradients()
    optimizer = kind(straight.parameters(), lr=1e-2, fused=True)
    optimizer.step()
    resumed = network()
    resumed.load_state_dict(straight.state_dict())
    fresh = kind(resumed.parameters(), lr=1e-2, fused=True)
    tensors = {k: v.clone() for k, v in optimizer_tensors(optimizer, trainable(straight)).items()}
    assert {k.split(".")[0] for k in tensors} == {"step", "exp_avg", "exp_avg_sq"} and len(tensors) == 12
    load_optimizer_tensors(fresh, trainable(resumed), tensors, "x")
    for p, q in zip(straight.parameters(), resumed.parameters()):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    for o in (optimizer, fresh):
        o.step()
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters()))
    assert torch.equal(tensors["step.0.weight"], torch.tensor(1.0)), "loading copies: the checkpoint's tensors do not move"


def test_state_that_does_not_fit_is_named():
    net = with_gradients()
    optimizer = torch.optim.Adam(net.parameters())
    with pytest.raises(BadInput, match=r"x: optimizer state of '7.weight'"):
        load_optimizer_tensors(optimizer, trainable(net), {"exp_avg.7.weight": torch.ones(1)}, "x")
    with pytest.raises(BadInput, match=r"x: exp_avg.0.weight has shape \(3, 5\), the parameter has \(5, 3\)"):
        load_optimizer_tensors(optimizer, trainable(net), {"exp_avg.0.weight": torch.ones(3, 5)}, "x")
