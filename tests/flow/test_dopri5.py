"""dopri5: its law, torchdiffeq as an oracle, and control that does not depend on the batch."""

import math

import pytest
import torch

from vavae_fast.errors import BadInput
from vavae_fast.flow.dopri5 import _ERROR, _FOURTH_ORDER, _NODES, _STAGES, dopri5, dopri5_states

every_norm = pytest.mark.parametrize("error_norm", ["sample", "batch"])


def swirl(x, t):
    """Nonlinear, stiffer for larger x, with coordinates coupled inside a sample; t () or (B,)."""
    t = t.reshape(-1, 1) if t.ndim else t
    return torch.stack((x[:, 1] * (1 + x[:, 0] ** 2), -x[:, 0]), dim=1) * torch.cos(3 * t) + 0.3 * t


def test_a_velocity_of_another_shape_is_refused():
    with pytest.raises(BadInput, match=r"returned shape \(3, 1\) for an input of shape \(3, 2\)"):
        dopri5(lambda x, t: x[:, :1], torch.randn(3, 2), torch.tensor([0.0, 1.0]))


def test_tableau_satisfies_the_order_conditions():
    """Row sums are the nodes; sum b c^k = 1 / (k + 1) to order 5 for the solution and to order 4 for the embedded one."""
    for node, row in zip(_NODES, _STAGES):
        assert sum(row) == pytest.approx(node, abs=1e-14)
    nodes = (0.0, *_NODES)
    for weights, order in (((*_STAGES[-1], 0.0), 5), (_FOURTH_ORDER, 4)):
        for k in range(order):
            assert sum(w * c**k for w, c in zip(weights, nodes)) == pytest.approx(1 / (k + 1), abs=1e-14)
    assert sum(_ERROR) == pytest.approx(0, abs=1e-15)


@every_norm
def test_error_follows_the_tolerance(error_norm):
    """On dx/dt = x cos t the error stays within a small multiple of rtol as rtol falls by 10^8."""
    x, times = torch.ones(2, 3, dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    for rtol in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10):
        end = dopri5(lambda x, t: x * torch.cos(t).reshape(-1, 1), x, times, 1e-14, rtol, error_norm)
        assert (end - math.exp(math.sin(2))).abs().max().item() < 10 * rtol


@every_norm
def test_order_five(error_norm):
    """The work of an order 5 method: 10^5 times the accuracy costs about 10 times the steps."""

    def evaluations(rtol):
        calls = []
        dopri5(lambda x, t: calls.append(0) or x * torch.cos(9 * t).reshape(-1, 1), x, times, 1e-14, rtol, error_norm)
        return len(calls)

    x, times = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0.0, 8.0], dtype=torch.float64)
    assert 5 < evaluations(1e-11) / evaluations(1e-6) < 15


@pytest.mark.parametrize("times", [[0.0, 1.0], [0.0, 0.1, 0.35, 1.0], [1.0, 0.6, 0.0]])
def test_batch_norm_equals_torchdiffeq(times):
    """The same steps and the same interpolation: equal far below the tolerance of the integration (1e-3), in fp64, where the
    step sizes do not depend on rounding."""
    odeint = pytest.importorskip("torchdiffeq").odeint
    generator = torch.Generator().manual_seed(2)
    x, times = 2 * torch.randn(16, 2, generator=generator, dtype=torch.float64), torch.tensor(times)
    calls = {"theirs": 0, "ours": 0}

    def counted(who, x, t):
        calls[who] += 1
        return swirl(x, t)

    theirs = odeint(lambda t, x: counted("theirs", x, t), x, times, method="dopri5", atol=1e-6, rtol=1e-3)
    ours = list(dopri5_states(lambda x, t: counted("ours", x, t), x, times, 1e-6, 1e-3, "batch"))
    assert calls["ours"] == calls["theirs"] > 20
    torch.testing.assert_close(torch.stack(ours), theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dopri5(swirl, x, times, error_norm="batch"), theirs[-1], rtol=1e-9, atol=1e-9)


def test_sample_norm_does_not_depend_on_the_batch():
    """Bit for bit, with a row that takes many more steps than the others."""
    x = torch.randn(6, 2, dtype=torch.float64) * torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 4.0], dtype=torch.float64).reshape(-1, 1)
    times = torch.tensor([0.0, 0.3, 1.0])

    def solve(x, norm):
        return torch.stack(list(dopri5_states(swirl, x, times, 1e-6, 1e-3, norm)), dim=1)

    whole = solve(x, "sample")
    for row in range(len(x)):
        assert torch.equal(solve(x[row : row + 1], "sample")[0], whole[row])
    assert torch.equal(solve(x.flip(0), "sample").flip(0), whole)
    assert not torch.equal(solve(x[:1], "batch")[0], solve(x, "batch")[0]), "the batch norm does depend on it"


def test_sample_norm_stays_inside_the_interval():
    seen = []
    dopri5(lambda x, t: seen.append(t) or swirl(x, t), torch.randn(4, 2), torch.tensor([0.2, 0.9]), error_norm="sample")
    seen = torch.stack(seen)
    assert seen.min() >= torch.tensor(0.2) and seen.max() <= torch.tensor(0.9)


@every_norm
def test_interpolated_states_are_as_accurate_as_the_end(error_norm):
    times = torch.linspace(0, 2, 50, dtype=torch.float64)
    x = torch.ones(2, 1, dtype=torch.float64)
    states = torch.stack(list(dopri5_states(lambda x, t: -x, x, times, 1e-8, 1e-6, error_norm)))
    torch.testing.assert_close(states[:, 0, 0], torch.exp(-times), rtol=1e-5, atol=1e-6)


@every_norm
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_velocity_that_is_not_finite_stops_with_an_error(error_norm, bad):
    def velocity(x, t):
        return torch.where(t.reshape(-1, 1) > 0.5, bad, x)

    with pytest.raises(ArithmeticError, match="step size underflows"):
        dopri5(velocity, torch.ones(2, 1), torch.tensor([0.0, 1.0]), error_norm=error_norm)
