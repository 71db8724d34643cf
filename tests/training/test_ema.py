"""EMA is its recurrence, in float32, of the trainable parameters alone."""

import pytest
import torch
from torch import nn

from vavae_fast.training.ema import EMA

YES, NO = torch.tensor(True), torch.tensor(False)


def network():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    net[0].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize("decay, warmup", [(0.9999, False), (0.9, False), (0.9999, True), (0.5, True), (0.0, False)])
def test_ema_is_its_recurrence(decay, warmup):
    net = network()
    ema = EMA(net, decay, warmup)
    exact = {name: p.detach().double() for name, p in net.named_parameters() if p.requires_grad}
    assert ema.shadow.keys() == exact.keys() == {"0.weight", "1.weight", "1.bias"}
    for step in range(60):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        ema.update(step, YES)
        d = min(decay, (1 + step) / (10 + step)) if warmup else decay
        exact = {name: d * value + (1 - d) * net.get_parameter(name).detach().double() for name, value in exact.items()}
    for name, value in exact.items():
        # A rounding of the average, one of the difference, in each step; the old ones shrink with it.
        scale = max(value.abs().max().item(), net.get_parameter(name).abs().max().item())
        assert (ema.shadow[name].double() - value).abs().max().item() <= 60 * 2.0**-24 * scale * 4


def test_a_skipped_step_leaves_every_bit():
    net = network()
    ema = EMA(net, 0.9)
    before = {name: value.clone() for name, value in ema.shadow.items()}
    with torch.no_grad():
        net[0].weight.add_(1.0)
    ema.update(0, NO)
    assert all(torch.equal(ema.shadow[name], value) for name, value in before.items())


def test_the_average_is_float32_beside_bf16_weights():
    net = nn.Linear(4, 4).bfloat16()
    ema = EMA(net, 0.9999)
    with torch.no_grad():
        net.weight.add_(1.0)
    ema.update(0, YES)
    assert all(value.dtype == torch.float32 for value in ema.shadow.values())
    assert not torch.equal(ema.shadow["weight"], ema.shadow["weight"].bfloat16().float()), "finer than bf16"


def test_state_is_whole_and_loads_back():
    """A state dict of the module: averaged where trained, its own buffers and frozen parameters elsewhere."""
    net = network()
    ema = EMA(net, 0.5)
    with torch.no_grad():
        net[0].weight.add_(1.0)
        net[1].running_mean.add_(3.0)
    ema.update(0, YES)
    state = {name: value.clone() for name, value in ema.state_dict().items()}
    assert state.keys() == net.state_dict().keys()
    assert torch.equal(state["1.running_mean"], net[1].running_mean) and torch.equal(state["0.bias"], net[0].bias)
    assert not torch.equal(state["0.weight"], net[0].weight)
    other = EMA(network(), 0.5)
    other.load_state_dict(state)
    assert all(torch.equal(other.shadow[name], ema.shadow[name]) for name in ema.shadow)
