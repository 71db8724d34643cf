"""Samplers: the law of their order, Gaussians whose flow, marginals and likelihood are known, the reference's numbers."""

import math

import pytest
import torch
from flow import gaussian
from safetensors.torch import load_file

from vavae_fast.errors import BadInput
from vavae_fast.flow import ODE_METHODS, PATHS, SAMPLERS, Sampler, create_transport, time_grid
from vavae_fast.flow.samplers import SDE_SAMPLERS

every_path = pytest.mark.parametrize("path_type", PATHS)
every_prediction = pytest.mark.parametrize("prediction", ["velocity", "score", "noise"])


def perfect(transport):
    """A model(x, t) that knows the Gaussian problem."""
    return lambda x, t: gaussian.predictions(transport.path, x, t)[transport.prediction]


# Time grids


def test_grids_equal_the_reference_bit_for_bit(golden_dir):
    golden = {key: value for key, value in load_file(golden_dir / "transport.safetensors").items() if key.startswith("grid.")}
    assert len(golden) >= 3
    for key, times in golden.items():
        _, count, shift = key.split(".", 2)
        assert torch.equal(time_grid(int(count[1:]), float(shift.removeprefix("shift"))), times), key


def test_time_grid():
    assert time_grid(3).tolist() == [0, 0.5, 1] and time_grid(3).dtype == torch.float32
    times = time_grid(250, 0.3)
    assert len(times) == 250 and times[0] == 0 and times[-1] == 1 and (times.diff() > 0).all()
    assert times[1] < time_grid(250)[1], "a shift below 1 is denser near the noise"
    assert time_grid(2, t0=0.25, t1=0.5).tolist() == [0.25, 0.5]
    for bad in (dict(num_steps=1), dict(num_steps=5, shift=-0.1)):
        with pytest.raises(BadInput):
            time_grid(**bad)


# Fixed steps


@pytest.mark.parametrize("solve", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_sampler_converges_at_its_order(solve):
    """Halving the step divides the error by 2 ** order; on dx/dt = -x the solution is exp(-t)."""

    def error(steps):
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        x = solve(lambda x, t: -x, torch.ones(3, dtype=torch.float64), times)
        return (x - math.exp(-1)).abs().max().item()

    assert math.log2(error(64) / error(128)) == pytest.approx(solve.order, abs=0.05)


@pytest.mark.parametrize("solve", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_sampler_converges_at_its_order_where_time_matters(solve):
    """dx/dt = x cos t on uneven times: an evaluation at the wrong time lowers the order."""

    def error(steps):
        times = 2 * torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.5
        x = solve(lambda x, t: x * torch.cos(t), torch.ones(3, dtype=torch.float64), times)
        return (x - math.exp(math.sin(2))).abs().max().item()

    assert math.log2(error(64) / error(128)) == pytest.approx(solve.order, abs=0.15)


@pytest.mark.parametrize("solve", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_sampler_is_exact_where_it_must_be(solve):
    """A constant velocity in one step; backwards along the same times; no change over no time."""
    x = torch.randn(2, 3, dtype=torch.float64)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.equal(solve(lambda x, t: torch.ones_like(x), x, times), x + 1)
    assert torch.equal(solve(lambda x, t: torch.ones_like(x), x, times.flip(0)), x - 1)
    assert torch.equal(solve(lambda x, t: x, x, times[:1]), x)


@pytest.mark.parametrize("method", ["euler", "heun2", "midpoint", "rk4"])
def test_fixed_steps_equal_torchdiffeq(method):
    odeint = pytest.importorskip("torchdiffeq").odeint
    x, times = torch.randn(4, 5, dtype=torch.float64), time_grid(9, 0.3).double()

    def velocity(x, t):
        return torch.sin(3 * x) + t * x

    theirs = odeint(lambda t, x: velocity(x, t), x, times, method=method)[-1]
    torch.testing.assert_close(SAMPLERS[method](velocity, x, times), theirs, rtol=1e-13, atol=1e-13)


# ODE and SDE on a Gaussian


@every_path
@every_prediction
def test_ode_is_the_transport_map(path_type, prediction):
    """The flow between Gaussians is affine: (x1 - mean_1) / std_1 = (x0 - mean_0) / std_0, at the ends of the interval."""
    transport = create_transport(path_type, prediction)
    x0 = torch.randn(64, 2, dtype=torch.float64)
    ends = torch.tensor(transport.interval(sample=True), dtype=torch.float32).double()
    (mean0, mean1), (variance0, variance1) = gaussian.moments(transport.path, ends)
    expected = mean1 + (x0 - mean0) * (variance1 / variance0).sqrt()
    x = Sampler(transport).sample_ode(sampling_method="rk4", num_steps=200)(x0, perfect(transport))[-1]
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@every_path
@pytest.mark.parametrize("method", ODE_METHODS)
def test_reverse_undoes_forward(path_type, method):
    transport = create_transport(path_type)
    x0 = torch.randn(16, 2, dtype=torch.float64)
    options = dict(sampling_method=method, num_steps=101, timestep_shift=0.3, rtol=1e-8, atol=1e-10, error_norm="sample")
    x1 = Sampler(transport).sample_ode(**options)(x0, perfect(transport))[-1]
    back = Sampler(transport).sample_ode(**options, reverse=True)(x1, perfect(transport))[-1]
    assert (x1 - x0).abs().max() > 0.5
    order = SAMPLERS[method].order if method in SAMPLERS else 5
    torch.testing.assert_close(back, x0, rtol=0, atol=100 * 0.01**order if order < 4 else 1e-4)


@every_path
@every_prediction
@pytest.mark.parametrize("method", SDE_SAMPLERS)
def test_sde_reaches_the_data(path_type, prediction, method):
    """Mean and standard deviation of 5,000 ends, within four standard errors and the bias of 100 steps."""
    transport = create_transport(path_type, prediction)
    generator = torch.Generator().manual_seed(5)
    sample = Sampler(transport).sample_sde(
        sampling_method=method,
        diffusion_form="sigma",
        num_steps=100,
        noise=lambda step, like: torch.randn(like.shape, dtype=like.dtype, generator=generator),
    )
    x = sample(torch.randn(5_000, 1, dtype=torch.float64, generator=generator), perfect(transport))[-1]
    error = 4 * gaussian.STD / math.sqrt(len(x))
    bias = 0.02
    assert abs(x.mean().item() - gaussian.MEAN) < error + bias
    assert abs(x.std().item() - gaussian.STD) < error + bias


@pytest.mark.parametrize("form", ["constant", "SBDM", "linear", "decreasing", "increasing-decreasing"])
def test_every_diffusion_has_the_same_marginals(form):
    transport = create_transport()
    x0 = torch.randn(5_000, 1, dtype=torch.float64)
    x = Sampler(transport).sample_sde(diffusion_form=form, num_steps=400, last_step=None)(x0, perfect(transport))[-1]
    assert abs(x.mean().item() - gaussian.MEAN) < 0.05 and abs(x.std().item() - gaussian.STD) < 0.05


@pytest.mark.parametrize("last_step", [None, "Mean", "Tweedie", "Euler"])
def test_last_steps(last_step):
    """One exact relation each, from the state before the last step at t = 0.75."""
    transport = create_transport()
    sample = Sampler(transport).sample_sde(
        diffusion_form="linear", last_step=last_step, last_step_size=0.25, num_steps=5, keep_trajectory=True
    )
    states = sample(torch.randn(8, 3, dtype=torch.float64), perfect(transport))
    assert len(states) == 5
    if last_step is None:
        assert torch.equal(states[-1], states[-2]) and sample.times[-1] == 1 - 1e-3
        return
    t, x = torch.full((8,), 0.75, dtype=torch.float64), states[-2]
    known = gaussian.predictions(transport.path, x, t)
    expected = {
        "Mean": x + 0.25 * (known["velocity"] + 0.25 * known["score"]),
        "Euler": x + 0.25 * known["velocity"],
        "Tweedie": (x + 0.25**2 * known["score"]) / 0.75,
    }
    torch.testing.assert_close(states[-1], expected[last_step], rtol=1e-6, atol=1e-6)


def test_sde_increments_come_from_the_caller():
    transport, asked = create_transport(), []

    def noise(step, like):
        asked.append((step, tuple(like.shape)))
        return torch.zeros_like(like)

    sample = Sampler(transport).sample_sde(num_steps=6, noise=noise)
    first = sample(torch.ones(2, 1), perfect(transport))[-1]
    assert asked == [(step, (2, 1)) for step in range(5)]
    assert torch.equal(first, sample(torch.ones(2, 1), perfect(transport))[-1])


@every_path
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_likelihood_of_a_gaussian(path_type, method):
    """log p(x1) = log p_t1(x1), up to the distance of p_t0 from the prior N(0, I), which only VP has; and x1's own noise.

    The divergence estimate is exact, since the Jacobian is diagonal.
    """
    transport = create_transport(path_type)
    ends = torch.tensor(transport.interval(sample=True), dtype=torch.float32).double()
    (mean0, mean1), (std0, std1) = gaussian.moments(transport.path, ends)[0], gaussian.moments(transport.path, ends)[1].sqrt()
    x1 = mean1 + std1 * torch.randn(6, 4, dtype=torch.float64)
    evaluate = Sampler(transport).sample_ode_likelihood(
        sampling_method=method, num_steps=200, rtol=1e-8, atol=1e-9, error_norm="sample"
    )
    logp, x0 = evaluate(x1, perfect(transport))
    torch.testing.assert_close(x0, mean0 + (x1 - mean1) / std1 * std0, rtol=1e-5, atol=1e-5)
    normal = torch.distributions.Normal
    from_prior = (normal(0, 1).log_prob(x0) - normal(mean0, std0).log_prob(x0)).sum(1)
    assert path_type == "VP" or from_prior.abs().max() < 1e-6
    torch.testing.assert_close(logp, normal(mean1, std1).log_prob(x1).sum(1) + from_prior, rtol=1e-5, atol=1e-5)
    assert not x0.requires_grad and not logp.requires_grad


def test_likelihood_uses_an_unbiased_divergence():
    """A velocity A x with a full matrix: the mean over probes tends to the trace."""
    matrix = torch.tensor([[0.3, 0.5], [-0.2, 0.1]], dtype=torch.float64)
    x1 = torch.zeros(4000, 2, dtype=torch.float64)
    logp, _ = Sampler(create_transport()).sample_ode_likelihood(sampling_method="rk4", num_steps=3)(x1, lambda x, t: x @ matrix.T)
    gained = logp + math.log(2 * math.pi)  # x0 = 0
    assert gained.mean().item() == pytest.approx(-0.4, abs=4 * 0.3 / math.sqrt(len(x1)))
    assert gained.std().item() == pytest.approx(0.3, rel=0.05)


# The bound samplers


@pytest.mark.parametrize("method", ODE_METHODS)
def test_only_the_end_is_kept_unless_asked(method):
    transport = create_transport()
    x0 = torch.randn(5, 2)
    options = dict(sampling_method=method, num_steps=7, timestep_shift=0.3)
    end = Sampler(transport).sample_ode(**options)(x0, perfect(transport))
    states = Sampler(transport).sample_ode(**options, keep_trajectory=True)(x0, perfect(transport))
    assert end.shape == (1, 5, 2) and states.shape == (7, 5, 2)
    assert torch.equal(states[0], x0) and torch.equal(states[-1], end[-1])


def test_the_model_gets_a_time_a_sample_and_its_arguments():
    calls = []

    def model(x, t, y):
        calls.append((t, y))
        return torch.zeros_like(x)

    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    result = Sampler(create_transport()).sample_ode(sampling_method="Euler", num_steps=3)(x, model, y="label")
    assert [t.tolist() for t, _ in calls] == [[0.0] * 3, [0.5] * 3] and all(y == "label" for _, y in calls)
    assert calls[0][0].dtype == torch.float64 and not result.requires_grad


def test_names_are_known_or_refused_with_the_nearest():
    sampler = Sampler(create_transport())
    assert SAMPLERS["heun"] is SAMPLERS["heun2"]
    assert {"euler", "heun", "heun2", "dopri5"} <= set(ODE_METHODS)
    for options, nearest in (
        (dict(sampling_method="dopri6"), "dopri5"),
        (dict(error_norm="samples"), "sample"),
    ):
        with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
            sampler.sample_ode(**options)
    for options, nearest in (
        (dict(sampling_method="Eular"), "euler"),
        (dict(diffusion_form="SBMD"), "SBDM"),
        (dict(last_step="mean"), "Mean"),
    ):
        with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
            sampler.sample_sde(**options)


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (1, 2, 4, 4), (), (3, 4, 4, 4)])
def test_a_model_of_another_shape_is_one_clear_error(shape):
    """In every solver: broadcast in silence, it would give images of something else."""
    sampler, x = Sampler(create_transport()), torch.randn(3, 2, 4, 4)
    solvers = [sampler.sample_ode(sampling_method=method, num_steps=3) for method in ODE_METHODS]
    for method in ("euler", "heun"):
        solvers += [sampler.sample_sde(sampling_method=method, last_step=last, num_steps=3) for last in ("Mean", "Tweedie", "Euler")]
    for solve in (*solvers, sampler.sample_ode_likelihood(num_steps=3)):
        with pytest.raises(BadInput) as caught:
            solve(x, lambda x, t: x.new_zeros(shape) + 0 * x.sum())
        assert str(caught.value) == f"the model returned shape {shape} for an input of shape (3, 2, 4, 4); they must agree"


@pytest.mark.parametrize(
    "options, culprit",
    [
        (dict(sampling_method=None), "sampling_method: None is not one of"),
        (dict(sampling_method=["euler"]), "sampling_method"),
        (dict(num_steps=2.5), "num_steps: must be an integer"),
        (dict(num_steps="50"), "num_steps: must be an integer"),
        (dict(num_steps=None), "num_steps: must be an integer"),
        (dict(timestep_shift=None), "timestep_shift: must be a number"),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(options, culprit):
    sampler = Sampler(create_transport())
    for make in (sampler.sample_ode, sampler.sample_sde, sampler.sample_ode_likelihood):
        with pytest.raises(BadInput, match=f"^{culprit}"):
            make(**options)


@pytest.mark.parametrize("options", [dict(atol="1e-6"), dict(rtol=None), dict(atol=0.0)])
def test_tolerances_are_numbers_above_0(options):
    (name,) = options
    with pytest.raises(BadInput, match=f"^{name}: must be a number above 0"):
        Sampler(create_transport()).sample_ode(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("method", SAMPLERS)
def test_no_step_waits_for_the_device(method):
    transport, x = create_transport(), torch.randn(4, 2, device="cuda")
    sample = Sampler(transport).sample_ode(sampling_method=method, num_steps=5, timestep_shift=0.3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(x, lambda x, t: -x * t.reshape(-1, 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
