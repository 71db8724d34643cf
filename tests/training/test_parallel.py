"""Averaging gradients over processes, in buckets; the collective itself is replaced by its definition."""

import pytest
import torch
from torch import nn

from vavae_fast.distributed import World
from vavae_fast.training import parallel
from vavae_fast.training.parallel import average_gradients


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 1))


@pytest.mark.parametrize("bucket", [1, 40, 1 << 20])
def test_each_gradient_becomes_the_mean_whatever_the_buckets(monkeypatch, bucket):
    """Another process has three times our gradients: the sum is four times ours, the mean twice."""
    net, sizes = network(), []
    net(torch.randn(5, 3)).sum().backward()
    net[1].weight.grad = None  # a parameter that took no part
    before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    monkeypatch.setattr(parallel, "BUCKET_BYTES", bucket)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda flat: (sizes.append(flat.numel()), flat.mul_(4))[1])
    average_gradients(net.parameters(), World(0, 2, torch.device("cpu")))
    for p, gradient in zip(net.parameters(), before):
        assert p.grad is None if gradient is None else torch.equal(p.grad, 2 * gradient)
    assert sum(sizes) == sum(g.numel() for g in before if g is not None)
    assert len(sizes) == {1: 4, 40: 2, 1 << 20: 1}[bucket]


def test_one_process_communicates_nothing(monkeypatch):
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda flat: pytest.fail("one process must not"))
    net = network()
    net(torch.randn(5, 3)).sum().backward()
    average_gradients(net.parameters(), World(0, 1, torch.device("cpu")))
