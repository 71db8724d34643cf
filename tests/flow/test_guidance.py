"""Guidance: equal to the reference's forward_with_cfg, where and on what it acts, and what it costs."""

import pytest
import torch
from flow.toys import ToyDiT

from vavae_fast.errors import BadInput
from vavae_fast.flow import Sampler, create_transport, guided

Y = torch.tensor([3, 0, 9])


def rows(model, t, cfg_scale=4.0, start=0.11):
    """The reference: 2N rows, first half."""
    x = noise()
    y = torch.cat((Y, torch.full_like(Y, model.null_label)))
    return model.forward_with_cfg(torch.cat((x, x)), torch.full((6,), t), y, cfg_scale, True, start)[:3]


def noise():
    return torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("t", [0.0, 0.1, 0.11, 0.4, 1.0])
def test_equals_forward_with_cfg(t):
    model = ToyDiT()
    predict = guided(model, 4.0, Y, model.null_label, interval=(0.11, 1.0))
    torch.testing.assert_close(predict(noise(), torch.tensor(t)), rows(model, t), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(predict(noise(), torch.full((3,), t)), rows(model, t), rtol=1e-6, atol=1e-6)


def test_a_time_each_decides_for_each():
    """What dopri5 does: rows outside the interval stay conditional, rows inside are guided."""
    model, times = ToyDiT(), torch.tensor([0.05, 0.5, 0.9])
    predict = guided(model, 4.0, Y, model.null_label, interval=(0.1, 0.8))
    together = predict(noise(), times)
    for row in range(3):
        one = slice(row, row + 1)
        alone = guided(model, 4.0, Y[one], model.null_label, interval=(0.1, 0.8))(noise()[one], times[row])
        torch.testing.assert_close(together[one], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels, count", [(3, 3), (1, 1), ("all", 5), (32, 5)])
def test_guided_channels(channels, count):
    model, x, t = ToyDiT(), noise(), torch.tensor(0.5)
    cond = model(x, t.expand(3), Y)
    uncond = model(x, t.expand(3), torch.full_like(Y, model.null_label))
    out = guided(model, 2.5, Y, model.null_label, channels)(x, t)
    torch.testing.assert_close(out[:, :count], (uncond + 2.5 * (cond - uncond))[:, :count], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out[:, count:], cond[:, count:], rtol=1e-6, atol=1e-6)


def test_interval_and_cost():
    """Inside the interval, ends included, the model sees 2N rows, outside N; an end of 1 is no upper bound."""
    model = ToyDiT()
    predict = guided(model, 4.0, Y, model.null_label, interval=(0.25, 0.75))
    for t, expected in ((0.24, 3), (0.25, 6), (0.5, 6), (0.75, 6), (0.76, 3)):
        predict(noise(), torch.tensor(t))
        assert model.calls[-1][0] == expected, t
    guided(model, 4.0, Y, model.null_label)(noise(), torch.tensor(1.01))
    assert model.calls[-1][0] == 6
    guided(model, 1.0, Y, model.null_label)(noise(), torch.tensor(0.5))
    assert model.calls[-1][0] == 3, "scale 1 is no guidance"


@pytest.mark.parametrize("start, unguided", [(0.10, 68), (0.11, 73), (0.125, 81)])
def test_steps_saved_in_the_published_schedules(start, unguided):
    """Euler over 250 times, shift 0.3: of 249 steps, so many need no unconditional half."""
    model = ToyDiT()
    predict = guided(model, 6.7, Y, model.null_label, interval=(start, 1.0))
    x = noise()
    Sampler(create_transport()).sample_ode(sampling_method="euler", num_steps=250, timestep_shift=0.3).integrate(predict, x)
    assert [count for count, _ in model.calls] == [3] * unguided + [6] * (249 - unguided)


@pytest.mark.parametrize("method", ["euler", "heun", "dopri5"])
def test_a_whole_trajectory_equals_the_reference_way(method):
    """N latents by `guided` against 2N latents by forward_with_cfg. dopri5's step sizes see the batch: a bounded difference."""
    model, x = ToyDiT(), noise()
    sample = Sampler(create_transport()).sample_ode(sampling_method=method, num_steps=12, timestep_shift=0.3, rtol=1e-6)
    y = torch.cat((Y, torch.full_like(Y, model.null_label)))
    theirs = sample(torch.cat((x, x)), model.forward_with_cfg, y=y, cfg_scale=3.0, cfg_interval=True, cfg_interval_start=0.0)[-1][:3]
    ours = sample.integrate(guided(model, 3.0, Y, model.null_label), x)[-1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4 if method == "dopri5" else 1e-5)


@pytest.mark.parametrize("answer", [lambda x: x[:, :1], lambda x: x[:1], lambda x: x.mean(), lambda x: torch.cat((x, x), dim=1)])
def test_a_model_of_another_shape_is_refused(answer):
    for t in (torch.tensor(0.5), torch.full((3,), 0.5)):
        with pytest.raises(BadInput, match=r"the model returned shape .* for an input of shape \(6, "):
            guided(lambda x, t, y: answer(x), 2.0, Y, 10)(noise(), t)


def test_bad_settings_are_refused():
    for options in (dict(channels=0), dict(channels="first"), dict(interval=(0.5, 0.4))):
        with pytest.raises(BadInput, match="cfg_"):
            guided(ToyDiT(), 2.0, Y, 10, **options)


def test_autoguidance_steers_away_from_the_lesser_model():
    """weak + scale (strong - weak) on the guided channels, both with the label; outside the interval the strong one alone."""
    strong, seen = ToyDiT(), []

    def weak(x, t, y):
        seen.append((len(x), y))
        return 0.5 * strong(x, t, y)

    x, t = noise(), torch.tensor(0.5)
    predict = guided(strong, 3.0, Y, strong.null_label, "all", (0.25, 1.0), guide=weak)
    cond = strong(x, torch.full((len(x),), 0.5), Y)
    torch.testing.assert_close(predict(x, t), 0.5 * cond + 3.0 * (cond - 0.5 * cond))
    assert len(seen) == 1 and seen[0][0] == len(x) and torch.equal(seen[0][1], Y)
    some = guided(strong, 3.0, Y, strong.null_label, 2, (0.25, 1.0), guide=weak)(x, t)
    assert torch.equal(some[:, 2:], cond[:, 2:]) and torch.equal(some[:, :2], predict(x, t)[:, :2])
    calls = len(seen)
    assert torch.equal(predict(x, torch.tensor(0.1)), strong(x, torch.full((len(x),), 0.1), Y)) and len(seen) == calls
    with pytest.raises(BadInput, match="the model returned shape"):
        guided(strong, 3.0, Y, strong.null_label, guide=lambda x, t, y: x[:1])(x, t)
