"""The tokenizer's objectives: laws first, then the reference's outputs, then the whole objective written out."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vavae_fast import losses
from vavae_fast.losses import (
    Alignment,
    Judges,
    LastLayers,
    LossWeights,
    adaptive_weight,
    adopt_weight,
    discriminator_objective,
    generator_loss,
    generator_objective,
    hinge_d_loss,
    kl_loss,
    reconstruction_nll,
    vanilla_d_loss,
    vf_loss,
)
from vavae_fast.models.autoencoder import AutoencoderKL, DiagonalGaussian
from vavae_fast.models.discriminator import PatchDiscriminator

IMPLS = ("torch", "auto")  # written out; the operator


def tokens(b=2, c=6, h=3, w=4, dtype=torch.float64):
    return torch.randn(b, c, h, w, dtype=dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_vf_loss_is_its_definition(impl):
    """Token by token, pair by pair."""
    z, aux, margins = tokens(), tokens(), (0.3, 0.4)
    cosine = lambda a, b: (a @ b / (a.norm() * b.norm())).item()
    mcos, mdms = [], []
    for sample_z, sample_f in zip(z.flatten(2).transpose(1, 2), aux.flatten(2).transpose(1, 2)):
        for z_i, f_i in zip(sample_z, sample_f):
            mcos.append(max(0.0, 1 - margins[1] - cosine(z_i, f_i)))
            mdms += [max(0.0, abs(cosine(z_i, z_j) - cosine(f_i, f_j)) - margins[0]) for z_j, f_j in zip(sample_z, sample_f)]
    found = vf_loss(z, aux, *margins, impl=impl)
    assert found[0].item() == pytest.approx(sum(mdms) / len(mdms), rel=1e-12)
    assert found[1].item() == pytest.approx(sum(mcos) / len(mcos), rel=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_vf_loss_does_not_see_the_length_of_tokens(impl):
    z, aux = tokens(), tokens()
    expected = vf_loss(z, aux, 0.1, 0.2, impl=impl)
    per_token = torch.rand(2, 1, 3, 4, dtype=torch.float64) + 0.1
    for scaled in ((z * 7.0, aux), (z, aux * 1e-3), (z * per_token, aux / per_token)):
        torch.testing.assert_close(vf_loss(*scaled, 0.1, 0.2, impl=impl), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_vf_loss_of_equal_maps_is_zero(impl):
    z = tokens()
    mdms, mcos = vf_loss(z, z.clone(), 0.0, 0.0, impl=impl)
    assert mdms.item() == pytest.approx(0, abs=1e-15) and mcos.item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("impl", IMPLS)
def test_vf_loss_does_not_see_where_tokens_stand(impl):
    z, aux = tokens(), tokens()
    order = torch.randperm(12)
    moved = [x.flatten(2)[..., order].view_as(x) for x in (z, aux)]
    torch.testing.assert_close(vf_loss(*moved, 0.1, 0.2, impl=impl), vf_loss(z, aux, 0.1, 0.2, impl=impl), rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_margins_as_wide_as_the_terms_leave_nothing(impl):
    assert [x.item() for x in vf_loss(tokens(), tokens(), 2.0, 2.0, impl=impl)] == [0.0, 0.0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_zero_token_stays_finite(impl, dtype):
    z, aux = tokens(dtype=dtype), tokens(dtype=dtype)
    z[0, :, 1, 1] = 0
    aux[1, :, 0, 0] = 0
    z.requires_grad_()
    mdms, mcos = vf_loss(z, aux, 0.0, 0.0, impl=impl)
    (gradient,) = torch.autograd.grad((mdms + mcos).float(), z)
    assert mdms.isfinite() and mcos.isfinite()
    others = torch.ones(2, 3, 4, dtype=torch.bool)
    others[0, 1, 1] = False
    assert gradient.movedim(1, -1)[others].isfinite().all() and not gradient.isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_float64_stays_and_half_precision_computes_in_float32(impl):
    z, aux = tokens(dtype=torch.float64), tokens(dtype=torch.float64)
    assert {x.dtype for x in vf_loss(z, aux, 0, 0, impl=impl)} == {torch.float64}
    z16, aux16 = z.bfloat16(), aux.bfloat16()
    found = vf_loss(z16, aux16, 0.0, 0.0, impl=impl)
    expected = vf_loss(z16.double(), aux16.double(), 0.0, 0.0, impl=impl)
    assert {x.dtype for x in found} == {torch.float32}
    for f, e in zip(found, expected):
        assert f.item() == pytest.approx(e.item(), rel=1e-5)  # bf16 arithmetic would miss by 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(f, e) for f, e in zip(vf_loss(z16, aux16, 0.0, 0.0, impl=impl), found))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_projection_is_the_1x1_convolution(impl):
    z, weight = tokens(c=4).requires_grad_(), torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    aux = tokens(c=9)
    results = []
    for terms in (vf_loss(z, aux, 0.1, 0.2, impl=impl, projection=weight), vf_loss(F.conv2d(z, weight[..., None, None]), aux, 0.1, 0.2, "torch")):
        results.append([*terms, *(g for term in terms for g in torch.autograd.grad(term, (z, weight), retain_graph=True))])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_features_with_a_gradient_get_it():
    """reverse_proj false: the projection of the features is what is trained."""
    z, aux = tokens(b=1, c=3, h=1, w=3).requires_grad_(), tokens(b=1, c=3, h=1, w=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, aux: vf_loss(z, aux, 0.05, 0.1), (z, aux))


@pytest.mark.parametrize("impl", IMPLS)
def test_vf_loss_gradient_is_the_derivative(impl):
    z, aux = tokens(b=1, c=3, h=1, w=3).requires_grad_(), tokens(b=1, c=3, h=1, w=3)
    assert torch.autograd.gradcheck(lambda z: vf_loss(z, aux, 0.05, 0.1, impl=impl), z)


@pytest.mark.parametrize("shapes", [((1, 4, 2, 2), (1, 5, 2, 2)), ((1, 4, 2, 2), (1, 4, 2, 3)), ((2, 4, 2, 2), (1, 4, 2, 2)), ((4, 2, 2), (4, 2, 2))])
def test_maps_that_do_not_match_are_named(shapes):
    with pytest.raises(ValueError, match="vf_loss: z is"):
        vf_loss(*map(torch.zeros, shapes), 0, 0)
    with pytest.raises(ValueError, match="impl must be"):
        vf_loss(tokens(), tokens(), 0, 0, impl="cuda")


@pytest.mark.parametrize("impl", IMPLS)
def test_vf_loss_names_a_batch_of_no_tokens_and_margins_that_are_no_numbers(impl):
    with pytest.raises(ValueError, match="vf_loss: z is empty"):
        vf_loss(torch.zeros(0, 4, 2, 2), torch.zeros(0, 4, 2, 2), 0, 0, impl=impl)
    for margins, culprit in ((("0.1", 0.2), "distmat_margin"), ((0.1, None), "cos_margin"), ((float("nan"), 0.2), "distmat_margin")):
        with pytest.raises(ValueError, match=f"^vf_loss: {culprit}: must be a finite number"):
            vf_loss(tokens(), tokens(), *margins, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_vf_loss(golden_dir, impl, case, dtype):
    golden = load_file(golden_dir / "vf_loss.safetensors")
    z, aux = golden[f"{case}.z"].to(dtype).requires_grad_(), golden[f"{case}.aux"].to(dtype)
    terms = dict(zip(("mdms", "mcos"), vf_loss(z, aux, *golden[f"{case}.margins"].tolist(), impl=impl)))
    for name, value in terms.items():
        expected = golden[f"{case}.{name}"].item()
        assert value.item() == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 1e-9), name
        (gradient,) = torch.autograd.grad(value, z, retain_graph=True)
        expected = golden[f"{case}.grad_{name}"]
        error = (gradient.double() - expected).norm() / expected.norm()
        assert error <= (1e-4 if dtype == torch.float32 else 1e-6), name


def test_nll_is_a_sum_over_pixels_and_a_mean_over_images():
    x, r, p = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    assert reconstruction_nll(x, r).item() == pytest.approx(0.5 * 48)
    assert reconstruction_nll(x, r, p, 0.25).item() == pytest.approx((0.5 + 0.25 * 2.0) * 48)
    assert reconstruction_nll(x.bfloat16(), r.bfloat16()).dtype == torch.float32


def test_kl_is_the_mean_over_the_batch():
    posterior = DiagonalGaussian(torch.randn(3, 4, 2, 2))
    assert torch.equal(kl_loss(posterior), posterior.kl().mean())


def test_discriminator_losses_at_known_logits():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert hinge_d_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    log = lambda x: F.binary_cross_entropy_with_logits(*x)
    expected = 0.5 * (log((real, torch.ones(2))) + log((fake, torch.zeros(2))))
    torch.testing.assert_close(vanilla_d_loss(real, fake), expected)
    assert generator_loss(fake).item() == 0.5
    for loss in (hinge_d_loss, vanilla_d_loss):
        assert loss(torch.full((2,), 200.0), torch.full((2,), -200.0)).item() == 0
        assert loss(real.bfloat16(), fake.bfloat16()).dtype == torch.float32


def test_adopt_weight_starts_at_the_threshold():
    assert [adopt_weight(0.5, step, 3) for step in range(5)] == [0.0, 0.0, 0.0, 0.5, 0.5]
    assert adopt_weight(0.5, 1, 3, value=0.1) == 0.1


@pytest.mark.parametrize(("disc_start", "generator", "discriminator"), [(0, 0, 0), (1, 1, 0), (2, 1, 1), (5001, 2501, 2500), (5002, 2501, 2501)])
def test_the_gan_starts_where_the_reference_starts_it(disc_start, generator, discriminator):
    """Its step counts both optimizers: at iteration i, 2 i for the autoencoder, then 2 i + 1 for the discriminator."""
    weights = LossWeights(disc_start=disc_start, disc_factor=0.7)
    for factor, start in ((weights.generator_factor, generator), (weights.discriminator_factor, discriminator)):
        assert factor(start) == 0.7 and (start == 0 or factor(start - 1) == 0.0)


def test_an_unknown_discriminator_loss_is_refused():
    with pytest.raises(ValueError, match="disc_loss must be hinge or vanilla, got 'wgan'"):
        LossWeights(disc_loss="wgan")


def test_adaptive_weight_against_finite_differences():
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 4, dtype=torch.float64)
    first = lambda w: (x @ w.T).tanh().sum()
    second = lambda w: 0.01 * (x @ w.T).square().sum()

    def norm(f, step=1e-6):
        slopes = []
        for i in range(w.numel()):
            shift = torch.zeros(w.numel(), dtype=torch.float64).index_fill(0, torch.tensor(i), step).view_as(w)
            slopes.append((f(w.detach() + shift) - f(w.detach() - shift)) / (2 * step))
        return torch.stack(slopes).norm()

    expected = norm(first) / (norm(second) + 1e-4)
    found = adaptive_weight(first(w), second(w), w, 1e4)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    assert not found.requires_grad
    assert adaptive_weight(first(w), second(w), w, 0.5).item() == 0.5
    assert adaptive_weight(first(w), 0 * second(w), w, 1e8).item() == pytest.approx(norm(first).item() / 1e-4, rel=1e-6)


WEIGHTS = LossWeights(
    kl_weight=1e-3, perceptual_weight=0.8, disc_weight=0.5, disc_start=6, disc_factor=0.7, vf_weight=0.1, adaptive_vf=True,
    distmat_margin=0.1, cos_margin=0.2, distmat_weight=0.7, cos_weight=1.3,
)  # fmt: skip
KEYS = ["loss", "nll", "rec", "perceptual", "kl", "g_loss", "d_weight", "mdms", "mcos", "vf_loss", "vf_weight"]


def distance(x, r):
    """A perceptual distance without a network."""
    return (x - r).square().mean(dim=(1, 2, 3), keepdim=True)


class Step:
    """Everything that one step of the tokenizer sees, in float64."""

    def __init__(self):
        torch.manual_seed(0)
        self.vae = AutoencoderKL(embed_dim=4, ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), resolution=16).double()
        self.discriminator = PatchDiscriminator(ndf=4, n_layers=1).double()
        self.projection = torch.nn.Parameter(torch.randn(6, 4).double())
        self.images, self.features = torch.rand(2, 3, 16, 16).double() * 2 - 1, torch.randn(2, 6, 4, 4).double()
        self.noise = torch.randn(2, 4, 4, 4).double()
        self.last_layers = LastLayers(self.vae.last_encoder_weight, self.vae.last_decoder_weight)

    def parameters(self):
        return [*self.vae.parameters(), self.projection]

    def objective(self, iteration, weights=WEIGHTS, judges=None, aligned=True):
        out = self.vae(self.images, noise=self.noise)
        judges = Judges(distance, self.discriminator) if judges is None else judges
        alignment = Alignment(out.z, self.features, self.projection) if aligned else None
        r, posterior = out.reconstruction, out.posterior
        return generator_objective(self.images, r, posterior, iteration, weights, judges, self.last_layers, alignment)

    def written_out(self, iteration, weights):
        """The reference's forward for optimizer 0, with plain autograd and nothing shared."""
        r, posterior, z = self.vae(self.images, noise=self.noise)
        grad = lambda loss, layer: torch.autograd.grad(loss, layer, retain_graph=True)[0].norm()
        nll = ((self.images - r).abs() + weights.perceptual_weight * distance(self.images, r)).sum() / 2
        g_loss = -self.discriminator(r).mean()
        d_weight = (grad(nll, self.last_layers.decoder) / (grad(g_loss, self.last_layers.decoder) + 1e-4)).clamp(0, 1e4).detach()
        d_weight = d_weight * weights.disc_weight
        projected = torch.einsum("fc,bchw->bfhw", self.projection, z)
        z_n, f_n = F.normalize(projected.flatten(2), dim=1), F.normalize(self.features.flatten(2), dim=1)
        pairs = (torch.einsum("bci,bcj->bij", z_n, z_n) - torch.einsum("bci,bcj->bij", f_n, f_n)).abs()
        mdms = F.relu(pairs - weights.distmat_margin).mean()
        mcos = F.relu(1 - weights.cos_margin - F.cosine_similarity(self.features, projected)).mean()
        vf = weights.distmat_weight * mdms + weights.cos_weight * mcos
        ratio = (grad(nll, self.last_layers.encoder) / (grad(vf, self.last_layers.encoder) + 1e-4)).clamp(0, 1e8).detach()
        vf_weight = weights.vf_weight * ratio if weights.adaptive_vf else torch.tensor(weights.vf_weight, dtype=torch.float64)
        factor = weights.disc_factor if 2 * iteration >= weights.disc_start else 0.0
        loss = nll + weights.kl_weight * posterior.kl().sum() / 2 + d_weight * factor * g_loss + vf_weight * vf
        on = factor > 0
        zero = torch.zeros(()).double()
        return dict(
            loss=loss, nll=nll, rec=(self.images - r).abs().mean(), perceptual=distance(self.images, r).mean(),
            kl=posterior.kl().mean(), g_loss=g_loss if on else zero, d_weight=d_weight if on else zero, mdms=mdms, mcos=mcos,
            vf_loss=vf, vf_weight=vf_weight,
        )  # fmt: skip


def gradients(loss, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("iteration", [0, 2, 3, 50])
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_objective_is_the_reference_s(iteration, adaptive):
    weights = LossWeights(**{**WEIGHTS.__dict__, "adaptive_vf": adaptive})
    step = Step()
    found, expected = step.objective(iteration, weights), step.written_out(iteration, weights)
    assert list(found) == KEYS
    for name in KEYS:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-10, atol=1e-12, msg=name)
    a, b = (gradients(terms["loss"], step.parameters()) for terms in (found, expected))
    assert ((a - b).norm() / b.norm()).item() < 1e-11


def test_only_the_loss_has_a_gradient():
    step = Step()
    terms = step.objective(3)
    assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]
    assert all(value.shape == () for value in terms.values())
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(terms["loss"], step.parameters()))


def test_the_discriminator_is_not_run_before_it_counts():
    def forbidden(images):
        raise AssertionError("the discriminator ran before disc_start")

    step = Step()
    terms = step.objective(2, judges=Judges(distance, forbidden))
    assert terms["g_loss"].item() == 0 and terms["d_weight"].item() == 0
    assert discriminator_objective(step.images, step.images, 2, WEIGHTS, forbidden)["d_loss"].requires_grad is False
    with pytest.raises(AssertionError, match="ran before"):
        step.objective(3, judges=Judges(distance, forbidden))


def test_a_judge_is_run_once_a_step():
    calls = []

    def counting(x, r):
        calls.append(x.shape)
        return distance(x, r)

    step = Step()
    step.objective(3, judges=Judges(counting, step.discriminator))["loss"].backward()
    assert len(calls) == 1


def test_terms_can_be_left_out():
    step = Step()
    terms = step.objective(3, judges=Judges(), aligned=False)
    assert all(terms[name].item() == 0 for name in ("perceptual", "g_loss", "d_weight", "mdms", "mcos", "vf_loss", "vf_weight"))
    torch.testing.assert_close(terms["loss"], terms["nll"] + WEIGHTS.kl_weight * terms["kl"])


def test_projected_features_are_trained_when_the_projection_is_theirs():
    """reverse_proj false: features to z's channels, with a bias."""
    step, linear = Step(), torch.nn.Conv2d(6, 4, 1).double()
    out = step.vae(step.images, noise=step.noise)
    terms = generator_objective(
        step.images, out.reconstruction, out.posterior, 0, WEIGHTS, Judges(distance), step.last_layers, Alignment(out.z, linear(step.features))
    )
    terms["loss"].backward()
    assert linear.weight.grad.abs().max() > 0 and linear.bias.grad.abs().max() > 0


def test_validation_needs_no_graph_and_its_adaptive_weights_are_zero():
    step = Step()
    with torch.no_grad():
        terms = step.objective(3)
    assert terms["vf_weight"].item() == 0 and terms["d_weight"].item() == 0
    assert not terms["loss"].requires_grad
    torch.testing.assert_close(terms["loss"], terms["nll"] + WEIGHTS.kl_weight * terms["kl"])


def test_under_autocast_the_objective_stays_near_and_is_summed_in_float32():
    step = Step()
    exact = step.objective(3)
    for part in (step.vae, step.discriminator):
        part.float()
    step.images, step.features, step.noise = step.images.float(), step.features.float(), step.noise.float()
    step.projection = torch.nn.Parameter(step.projection.detach().float())
    step.last_layers = LastLayers(step.vae.last_encoder_weight, step.vae.last_decoder_weight)
    with torch.autocast("cpu", torch.bfloat16):
        terms = step.objective(3)
    terms["loss"].backward()
    assert {value.dtype for value in terms.values()} == {torch.float32}
    for name in ("loss", "nll", "rec", "kl", "mdms", "mcos"):
        assert terms[name].item() == pytest.approx(exact[name].item(), rel=0.05), name
    assert all(p.grad.isfinite().all() for p in step.parameters())


@pytest.mark.parametrize("name", ["hinge", "vanilla"])
def test_discriminator_objective(name):
    step, weights = Step(), LossWeights(disc_start=1, disc_loss=name, disc_factor=0.5)
    r = (step.images + 0.1).requires_grad_()
    terms = discriminator_objective(step.images, r, 0, weights, step.discriminator)
    expected = 0.5 * losses.DISCRIMINATOR_LOSSES[name](step.discriminator(step.images), step.discriminator(r))
    torch.testing.assert_close(terms["d_loss"], expected, rtol=1e-12, atol=0)
    terms["d_loss"].backward()
    assert r.grad is None and all(p.grad is not None for p in step.discriminator.parameters())
    assert terms["logits_real"].shape == terms["logits_fake"].shape == ()
