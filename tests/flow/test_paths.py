"""Paths: the identities between velocity, score and noise, and the reference's numbers."""

import math

import pytest
import torch
from safetensors.torch import load_file

from vavae_fast.errors import BadInput
from vavae_fast.flow.paths import DIFFUSIONS, PATHS, batch_time, look_up

every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
TIMES = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


def points(count=25):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(count, 3, 2, dtype=torch.float64, generator=generator) for _ in range(2))


@every_path
def test_the_path_joins_noise_to_data(path):
    x0, x1 = points(2)
    start, end = path.interpolate(x0, x1, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(end, x1[1], atol=1e-12, rtol=0)
    left_over = path.alpha(torch.zeros((), dtype=torch.float64))
    assert left_over == 0 if path.starts_at_noise else 0 < left_over < 0.01
    torch.testing.assert_close(start, path.sigma(torch.zeros(())) * x0[0] + left_over * x1[0], atol=1e-6, rtol=0)


@every_path
def test_derivatives_are_derivatives(path):
    """d_alpha and d_sigma by autograd in fp64; velocity is d x_t / dt by central differences."""
    t = TIMES.clone().requires_grad_()
    for value, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (exact,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(slope(TIMES), exact, atol=1e-12, rtol=1e-12)
    x0, x1 = points()
    h = 1e-5
    central = (path.interpolate(x0, x1, TIMES + h) - path.interpolate(x0, x1, TIMES - h)) / (2 * h)
    torch.testing.assert_close(path.velocity(x0, x1, TIMES), central, atol=1e-5, rtol=1e-6)


@every_path
def test_closed_forms_of_rate_and_spread(path):
    alpha, sigma = path.alpha(TIMES), path.sigma(TIMES)
    torch.testing.assert_close(path.rate(TIMES), path.d_alpha(TIMES) / alpha, atol=0, rtol=1e-11)
    spread = path.rate(TIMES) * sigma**2 - sigma * path.d_sigma(TIMES)
    torch.testing.assert_close(path.spread(TIMES), spread, atol=1e-12, rtol=1e-11)


@every_path
def test_velocity_score_and_noise_are_one_thing(path):
    """From the true velocity come the true score -x0 / sigma and the true noise, and back."""
    x0, x1 = points()
    x, v = path.interpolate(x0, x1, TIMES), path.velocity(x0, x1, TIMES)
    score = -x0 / path.sigma(TIMES).reshape(-1, 1, 1)
    close = dict(atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(path.score_from_velocity(v, x, TIMES), score, **close)
    torch.testing.assert_close(path.noise_from_velocity(v, x, TIMES), x0, **close)
    torch.testing.assert_close(path.velocity_from_score(score, x, TIMES), v, **close)
    torch.testing.assert_close(path.velocity_from_noise(x0, x, TIMES), v, **close)


@every_path
def test_one_time_for_all_samples_equals_a_time_each(path):
    x0, x1 = points(4)
    t = torch.tensor(0.3, dtype=torch.float64)
    for function in (path.interpolate, path.velocity, path.score_from_velocity, path.velocity_from_noise):
        assert torch.equal(function(x0, x1, t), function(x0, x1, t.expand(4)))
    for form in DIFFUSIONS:
        w = path.diffusion(x0, t.expand(4), form)
        assert w.shape == (4, 1, 1) and (w >= 0).all()
        assert torch.equal(path.diffusion(x0, t, form).expand(4, 1, 1), w)


def test_diffusion_forms():
    """The values of SiT's table at t = 1/4 of the linear path, norm 2."""
    x, t = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    expected = {
        "constant": 2.0,
        "SBDM": 2 * 3.0,
        "sigma": 2 * 0.75,
        "linear": 2 * 0.75,
        "decreasing": 0.25 * (2 * math.cos(math.pi / 4) + 1) ** 2,
        "increasing-decreasing": 2 * 0.5,
        "inccreasing-decreasing": 2 * 0.5,
    }
    assert expected.keys() == DIFFUSIONS.keys()
    for form, value in expected.items():
        assert PATHS["Linear"].diffusion(x, t, form, 2.0).item() == pytest.approx(value, rel=1e-12)


def test_vp_is_finite_up_to_the_data():
    t = torch.tensor(1.0)
    assert PATHS["VP"].spread(t) == pytest.approx(0.05) and PATHS["VP"].rate(t) == pytest.approx(0.05)
    near = torch.tensor(1 - 1e-5)
    exact = PATHS["VP"].sigma(near.double()).item()
    assert PATHS["VP"].sigma(near).item() == pytest.approx(exact, rel=1e-5), "1 - exp(-2e-6) would cancel in float32"


def test_unknown_names_get_the_nearest_known_one():
    with pytest.raises(BadInput, match="did you mean 'sigma'"):
        PATHS["GVP"].diffusion(torch.zeros(1, 1), torch.ones(1), "sigm")
    with pytest.raises(BadInput, match="path_type: 'linear' is not one of Linear, GVP, VP; did you mean 'Linear'"):
        look_up(PATHS, "linear", "path_type")


def test_batch_time_has_the_dtype_and_rows_of_x():
    x = torch.zeros(3, 2, dtype=torch.float64)
    for t in (torch.tensor(0.3), torch.full((3,), 0.3)):
        rows = batch_time(t, x)
        assert rows.shape == (3,) and rows.dtype == torch.float64 and (rows == torch.tensor(0.3).double()).all()


@every_path
def test_golden(path, golden_dir, request):
    """Not further from fp64 than twice the reference's own error, plus float32's rounding of the largest term."""
    name = next(name for name, known in PATHS.items() if known is path)
    golden = load_file(golden_dir / f"path_{name}.safetensors")

    def results(g):
        drift, diff = path.drift(g["xt"], g["t"])
        return {
            "xt": path.interpolate(g["x0"], g["x1"], g["t"]),
            "ut": path.velocity(g["x0"], g["x1"], g["t"]),
            "drift": drift,
            "diff": diff,
            "score": path.score_from_velocity(g["ut"], g["xt"], g["t"]),
        }

    ours, exact = results(golden), results({key: value.double() for key, value in golden.items()})
    for key, value in ours.items():
        assert value.shape == golden[key].shape
        theirs = (golden[key] - exact[key]).abs().max()
        band = torch.finfo(torch.float32).eps * exact[key].abs().max()
        assert (value - exact[key]).abs().max() <= 2 * (theirs + band), key
        assert theirs <= 1e-5 * exact[key].abs().max(), f"{key} is not what the golden file calls so"
