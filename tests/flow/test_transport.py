"""The training objective: identities, the distribution of t, options used or refused, the reference's numbers."""

import math

import pytest
import torch
from safetensors.torch import load_file

from vavae_fast.errors import BadInput
from vavae_fast.flow import PATHS, create_transport

QUANTILES = torch.linspace(0, 1, 20_003, dtype=torch.float64)[1:-1]  # midpoints enough for moments to 1e-4


def batch(count=4):
    return torch.randn(count, 6, 8, 8), torch.randn(count, 6, 8, 8), torch.linspace(0.1, 0.9, count)


OBJECTIVES = [("velocity", None), *((p, w) for p in ("score", "noise") for w in (None, "velocity", "likelihood"))]


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("prediction, loss_weight", OBJECTIVES)
def test_the_true_answer_has_no_loss(path_type, prediction, loss_weight):
    """A model that knows x0 and x1 scores 0, whatever is predicted, and its output converts to the true velocity and score."""
    transport = create_transport(path_type, prediction, loss_weight)
    x0, x1, t = (value.double() for value in batch())
    v, score = transport.path.velocity(x0, x1, t), -x0 / transport.path.sigma(t).reshape(-1, 1, 1, 1)
    answer = {"velocity": v, "score": score, "noise": x0}[prediction]
    terms = transport.training_losses(lambda x, t: answer, x1, x0=x0, t=t)
    assert terms["loss"].shape == (4,) and terms["loss"].max() < 1e-20 and terms["pred"] is answer
    x = transport.path.interpolate(x0, x1, t)
    torch.testing.assert_close(transport.velocity(answer, x, t), v, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(transport.score(answer, x, t), score, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("prediction", ["score", "noise"])
def test_likelihood_weights(prediction):
    """On the linear path spread = (1 - t) / t and sigma = 1 - t, and sigma * score error = noise error."""
    x0, x1, t = (value.double() for value in batch())
    squared = x0.pow(2).flatten(1).mean(1)  # the loss of predicting nothing
    expected = {None: 1 + 0 * t, "velocity": t**-2.0, "likelihood": 1 / (t * (1 - t))}
    for loss_weight, weight in expected.items():
        transport = create_transport("Linear", prediction, loss_weight)
        loss = transport.training_losses(lambda x, t: torch.zeros_like(x), x1, x0=x0, t=t)["loss"]
        torch.testing.assert_close(loss, weight * squared, rtol=1e-12, atol=0)


def test_losses_are_means_of_each_sample():
    x0, x1, t = batch()
    transport = create_transport(use_cosine_loss=True)
    terms = transport.training_losses(lambda x, t, y: x * y.reshape(-1, 1, 1, 1), x1, dict(y=torch.arange(4.0)), x0=x0, t=t)
    for row in range(4):
        one = slice(row, row + 1)
        alone = transport.training_losses(lambda x, t, row=row: x * row, x1[one], x0=x0[one], t=t[one])
        for key in ("loss", "cos_loss"):
            torch.testing.assert_close(alone[key], terms[key][one], rtol=1e-6, atol=0)
    assert terms["cos_loss"][0] == 1, "a zero prediction has cosine 0"
    assert "cos_loss" not in create_transport().training_losses(lambda x, t: x, x1)


def test_a_bf16_prediction_is_judged_in_fp32():
    x0, x1, t = batch()
    transport = create_transport(use_cosine_loss=True)
    rounded = transport.training_losses(lambda x, t: x.bfloat16(), x1, x0=x0, t=t)
    exact = transport.training_losses(lambda x, t: x.bfloat16().float(), x1, x0=x0, t=t)
    for key in ("loss", "cos_loss"):
        assert rounded[key].dtype == torch.float32 and torch.equal(rounded[key], exact[key])
    all_bf16 = transport.training_losses(lambda x, t: x, x1.bfloat16(), x0=x0.bfloat16(), t=t)
    assert all_bf16["loss"].dtype == torch.float32
    assert transport.velocity(x1.bfloat16(), x1, t).dtype == torch.float32


def test_noise_and_times_are_drawn_when_not_given():
    seen = []
    x1 = torch.full((500, 2, 2, 2), 3.0)
    create_transport().training_losses(lambda x, t: seen.append((x, t)) or x, x1, sp_timesteps=(0.2, 0.4))
    x, t = seen[0]
    assert 0.2 <= t.min() and t.max() <= 0.4 and t.unique().numel() > 400
    x0 = (x - t.reshape(-1, 1, 1, 1) * x1) / (1 - t.reshape(-1, 1, 1, 1))
    assert abs(x0.mean().item()) < 4 / math.sqrt(x0.numel()) and abs(x0.std().item() - 1) < 4 / math.sqrt(2 * x0.numel())


def test_uniform_times():
    t = create_transport().times_from(QUANTILES)
    assert torch.equal(t, QUANTILES)
    t = create_transport("VP", train_eps=0.25).times_from(QUANTILES)
    torch.testing.assert_close(t, 0.75 * QUANTILES)


def test_logit_normal_times():
    """logit(t) is the draw itself; the density is Esser et al. 2024, eq. 19, checked through its distribution function."""
    n = torch.special.ndtri(QUANTILES)
    t = create_transport(use_lognorm=True).times_from(n)
    torch.testing.assert_close(torch.logit(t), n)
    shifted = create_transport(use_lognorm=True, shift_lg=True).times_from(n, shifted_mu=0.7)
    torch.testing.assert_close(torch.logit(shifted), n + 0.7)
    torch.testing.assert_close(create_transport(use_lognorm=True).times_from(n, sp_timesteps=(0.0, 1.0)), QUANTILES)


@pytest.mark.parametrize("use_lognorm", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_partial_times_are_the_mixture(use_lognorm, share):
    """P(t <= x) = share * P(t <= x | a <= t <= b) + (1 - share) * P(t <= x), at the quantiles of the draw."""
    a, b = 0.1, 0.4
    plain = create_transport(use_lognorm=use_lognorm)
    mixed = create_transport(use_lognorm=use_lognorm, partitial_train=[a, b], partial_ratio=share)
    draw = torch.special.ndtri(QUANTILES) if use_lognorm else QUANTILES
    full, t = plain.times_from(draw), mixed.times_from(draw)
    inside = full[(a <= full) & (full <= b)]
    for x in (0.05, 0.15, 0.3, 0.4, 0.7):
        expected = share * (inside <= x).double().mean() + (1 - share) * (full <= x).double().mean()
        assert (t <= x).double().mean().item() == pytest.approx(expected.item(), abs=5e-4)
    if share == 1:
        assert a <= t.min() and t.max() <= b


def test_sample_times_follows_the_draw():
    for use_lognorm, draw in ((False, torch.rand), (True, torch.randn)):
        transport = create_transport(use_lognorm=use_lognorm)
        t = transport.sample_times(9, "cpu", torch.Generator().manual_seed(3))
        assert torch.equal(t, transport.times_from(draw(9, generator=torch.Generator().manual_seed(3))))


def test_eps_defaults_and_given_values():
    """The reference's defaults, without its two faults: VP left sample_eps at None, and a given sample_eps was dropped."""
    def eps(*args, **kwargs):
        transport = create_transport(*args, **kwargs)
        return transport.train_eps, transport.sample_eps

    assert eps("Linear") == eps("GVP") == (0, 0)
    assert eps("Linear", "noise") == eps("GVP", "score") == (1e-3, 1e-3)
    assert eps("VP") == eps("VP", "noise") == (1e-5, 1e-3)
    assert eps("VP", train_eps=0.01, sample_eps=0.02) == eps("Linear", train_eps=0.01, sample_eps=0.02) == (0.01, 0.02)
    assert eps("GVP", "noise", sample_eps=0.02) == (1e-3, 0.02)


def test_intervals():
    linear, noise, vp = create_transport(), create_transport("Linear", "noise"), create_transport("VP")
    assert linear.interval() == linear.interval(sample=True) == (0, 1)
    assert noise.interval() == noise.interval(sample=True) == (1e-3, 1 - 1e-3)
    assert vp.interval() == (0, 1 - 1e-5) and vp.interval(sample=True) == (0, 1 - 1e-3)
    assert linear.interval(True, sde=True, last_step_size=0.04) == (1e-3, 0.96)
    assert linear.interval(True, sde=True, diffusion_form="sigma") == (0, 1 - 1e-3)
    assert noise.interval(True, sde=True, diffusion_form="sigma", last_step_size=0.04) == (1e-3, 0.96)
    assert vp.interval(True, sde=True, last_step_size=0.04) == (0, 0.96)


@pytest.mark.parametrize("options, culprit", [
    (dict(path_type="Linaer"), "did you mean 'Linear'"),
    (dict(prediction="velocty"), "did you mean 'velocity'"),
    (dict(prediction="noise", loss_weight="velo"), "did you mean 'velocity'"),
    (dict(loss_weight="velocity"), "transport.loss_weight"),
    (dict(prediction="noise", use_cosine_loss=True), "transport.use_cosine_loss"),
    (dict(train_eps=0.6), "transport.train_eps"),
    (dict(sample_eps=-0.1), "transport.sample_eps"),
    (dict(partitial_train=(0.5, 0.2)), "transport.partitial_train"),
    (dict(partitial_train=0.5), "transport.partitial_train"),
    (dict(partitial_train=(0.1, 0.2, 0.3)), "transport.partitial_train"),
    (dict(partitial_train=["0.1", None]), "transport.partitial_train"),
    (dict(train_eps="0.1"), "transport.train_eps"),
    (dict(partial_ratio="all"), "transport.partial_ratio"),
    (dict(path_type=["Linear"]), "transport.path_type"),
    (dict(use_lognorm=True, shift_lg=True, partitial_train=(0.1, 0.2)), "transport.shift_lg"),
    (dict(shift_lg=True), "transport.shift_lg"),
    (dict(path_type="VP", fused=True), "transport.fused"),
])
def test_what_cannot_be_used_is_refused(options, culprit):
    with pytest.raises(BadInput, match=culprit):
        create_transport(**options)


def test_a_wrong_prediction_shape_is_named():
    with pytest.raises(BadInput, match=r"returned shape \(2, 12, 4, 4\) for an input of shape \(2, 6, 4, 4\)"):
        create_transport().training_losses(lambda x, t: torch.cat((x, x), 1), torch.randn(2, 6, 4, 4))
    with pytest.raises(BadInput, match="shifted_mu"):
        create_transport(use_lognorm=True).times_from(torch.zeros(1), shifted_mu=1.0)


@pytest.mark.parametrize("prediction", ["velocity", "score", "noise"])
@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (1, 6, 8, 8), (8, 8), (), (4, 12, 8, 8)])
def test_a_prediction_that_would_broadcast_is_refused(prediction, shape):
    transport = create_transport(prediction=prediction)
    x, pred, t = torch.randn(4, 6, 8, 8), torch.randn(shape), torch.tensor(0.5)
    for convert in (transport.velocity, transport.score):
        with pytest.raises(BadInput) as caught:
            convert(pred, x, t)
        assert str(caught.value) == f"the model returned shape {shape} for an input of shape (4, 6, 8, 8); they must agree"
        with pytest.raises(BadInput, match="the model returned a tuple"):
            convert((x, x), x, t)


def test_golden_losses(golden_dir):
    golden = load_file(golden_dir / "transport.safetensors")
    seen = []
    transport = create_transport("Linear", "velocity", None, None, None, use_cosine_loss=True, use_lognorm=True)
    terms = transport.training_losses(
        lambda x, t, y: seen.append((x, t, y)) or golden["pred"], golden["x1"], dict(y=golden["y"]), x0=golden["x0"], t=golden["t"]
    )
    assert torch.equal(seen[0][0], golden["xt"]) and torch.equal(seen[0][1], golden["t"]) and torch.equal(seen[0][2], golden["y"])
    assert torch.equal(transport.path.velocity(golden["x0"], golden["x1"], golden["t"]), golden["ut"])
    pred, u = golden["pred"].double(), golden["ut"].double()
    exact = {
        "loss": (pred - u).pow(2).flatten(1).mean(1),
        "cos_loss": (1 - torch.nn.functional.cosine_similarity(pred, u, dim=1)).flatten(1).mean(1),
    }
    for key, name in (("loss", "mse"), ("cos_loss", "cos")):
        theirs = (golden[name] - exact[key]).abs().max()
        band = torch.finfo(torch.float32).eps * exact[key].abs().max()
        assert (terms[key] - exact[key]).abs().max() <= 2 * (theirs + band)
        torch.testing.assert_close(terms[key], golden[name])


def test_fused_equals_plain():
    """The operators' losses and gradients, against fp64, are as good as plain PyTorch's."""
    pytest.importorskip("vavae_kernels.ops.flow_loss")
    x0, x1, t = batch()

    def run(dtype, fused):
        weight = torch.full((6, 1, 1), 0.7, dtype=dtype, requires_grad=True)
        transport = create_transport(use_cosine_loss=True, fused=fused)
        terms = transport.training_losses(lambda x, t: x * weight, x1.to(dtype), x0=x0.to(dtype), t=t.to(dtype))
        (grad,) = torch.autograd.grad((terms["loss"] + terms["cos_loss"]).mean(), weight)
        return [terms["loss"].detach(), terms["cos_loss"].detach(), grad]

    for fused, plain, exact in zip(run(torch.float32, True), run(torch.float32, False), run(torch.float64, False)):
        band = torch.finfo(torch.float32).eps * exact.abs().max()
        assert (fused - exact).abs().max() <= 2 * ((plain - exact).abs().max() + band)
