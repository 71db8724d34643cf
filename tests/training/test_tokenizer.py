"""The VA-VAE step against its plain formulation: two losses of the same reconstructions, two Adams, the GAN at its iteration."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tokenizer_states import ADAM, FORM, SEED, batch, state

from vavae_fast import rng
from vavae_fast.distributed import World
from vavae_fast.models.autoencoder import AutoencoderKL
from vavae_fast.training.one_pass import one_pass_gradients
from vavae_fast.training.tokenizer import Stage, accumulate, plain_gradients, tokenizer_step

BOTH = pytest.mark.parametrize("formulation", [plain_gradients, one_pass_gradients])


def copies(*modules):
    return [{name: p.detach().clone() for name, p in module.named_parameters()} for module in modules]


def same(before, module):
    return all(torch.equal(value, module.get_parameter(name)) for name, value in before.items())


def plain_losses(s, b, gan_factor, disc_factor):
    """The reference's formulation, pass by pass: every adaptive weight by its own two gradients at the last layers."""
    x = b.pixels.float() / 127.5 - 1
    posterior = s.autoencoder.encode(x)
    z = posterior.mean + (0.5 * posterior.logvar).exp() * rng.normal(SEED, b.index, like=posterior.mean, stream=rng.Stream.POSTERIOR)
    r = s.autoencoder.decode(z)
    nll = ((x - r).abs() + s.perceptual(x, r)).sum() / len(x)
    kl = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum() / len(x)

    def adaptive(other, layer, most):
        a, b = (torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (nll, other))
        return (a / (b + 1e-4)).clamp(0, most).detach()

    loss = nll + 1e-6 * kl
    g_loss = torch.zeros(())
    if gan_factor:
        g_loss = -s.discriminator(r).mean()
        loss = loss + 0.5 * adaptive(g_loss, s.autoencoder.last_decoder_weight, 1e4) * gan_factor * g_loss
    features = s.foundation(x)
    projected = (s.projection(z), features) if s.reverse_proj else (z, s.projection(features))
    a, f = (t.flatten(2) for t in projected)
    gram = [F.normalize(t, dim=1).transpose(1, 2) @ F.normalize(t, dim=1) for t in (a, f)]
    mdms = F.relu((gram[0] - gram[1]).abs() - 0.1).mean()
    mcos = F.relu(1 - 0.2 - F.cosine_similarity(a, f, dim=1)).mean()
    loss = loss + 0.1 * adaptive(mdms + mcos, s.autoencoder.last_encoder_weight, 1e8) * (mdms + mcos)
    d_loss = torch.zeros(())
    if disc_factor:
        real, fake = s.discriminator(x), s.discriminator(r.detach())
        d_loss = disc_factor * 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return dict(loss=loss, nll=nll, kl=kl, g_loss=g_loss, mdms=mdms, mcos=mcos, d_loss=d_loss)


def assert_gradients(optimizer, parameters, expected):
    """After Adam's first step its moment is (1 - beta1) times the gradient. Equal up to the rounding of the largest ones."""
    largest = max(gradient.abs().max().item() for gradient in expected)
    for p, gradient in zip(parameters, expected):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"] / 0.5, gradient, rtol=1e-4, atol=1e-5 * largest)


@BOTH
@pytest.mark.parametrize("reverse_proj", [True, False])
@pytest.mark.parametrize("gan", [True, False])
def test_losses_and_gradients_are_the_plain_formulation(reverse_proj, gan, formulation):
    s = state(reverse_proj, disc_start=0 if gan else 1000, gradients=formulation)
    twin = state(reverse_proj, disc_start=0 if gan else 1000)
    b = batch()
    expected = plain_losses(twin, b, 1.0 if gan else 0.0, 1.0 if gan else 0.0)
    before = copies(s.autoencoder, s.projection, s.discriminator)
    gradients = dict(zip(twin.trained(), torch.autograd.grad(expected["loss"], list(twin.trained().values()), retain_graph=True)))
    d_gradients = torch.autograd.grad(expected["d_loss"], list(twin.discriminator.parameters())) if gan else []
    values = tokenizer_step(s, 0, [b])
    for key in ("loss", "nll", "kl", "g_loss", "mdms", "mcos", *(["d_loss"] if gan else [])):
        torch.testing.assert_close(values[key], expected[key].detach(), rtol=1e-5, atol=1e-6)
    norm = torch.sqrt(sum(g.double().square().sum() for g in gradients.values())).float()
    torch.testing.assert_close(values["grad_norm"], norm, rtol=1e-4, atol=0)
    assert_gradients(s.optimizer, s.trained().values(), gradients.values())
    if gan:
        assert_gradients(s.optimizer_disc, s.discriminator.parameters(), d_gradients)
    assert same(before[2], s.discriminator) is not gan


@BOTH
def test_the_gan_starts_at_its_iterations(formulation):
    """disc_start 5 counts both networks' steps: the discriminator moves from iteration 2 on, the autoencoder feels it from 3."""
    s = state(disc_start=5, gradients=formulation)
    for iteration in range(5):
        before = copies(s.discriminator)[0]
        values = tokenizer_step(s, iteration, [batch(first=4 * iteration)])
        assert same(before, s.discriminator) is (iteration < 2), iteration
        assert (values["g_loss"] != 0) == (iteration >= 3), iteration
        assert (values.get("d_loss", torch.zeros(())) != 0) == (iteration >= 2), iteration


@BOTH
def test_the_discriminators_adam_counts_the_steps_before_its_start(formulation):
    """As if stepped with zero gradients from the first iteration, which is what the reference does: same update, same count."""
    s = state(disc_start=5, gradients=formulation)
    reference = copy.deepcopy(s.discriminator)
    for iteration in range(2):
        tokenizer_step(s, iteration, [batch(first=4 * iteration)])
    adam = torch.optim.Adam(reference.parameters(), **ADAM)
    for _ in range(2):
        for p in reference.parameters():
            p.grad = torch.zeros_like(p)
        adam.step()
    twin = copy.deepcopy(s)
    x, b = batch(first=8).pixels.float() / 127.5 - 1, batch(first=8)
    with torch.no_grad():
        posterior = twin.autoencoder.encode(x)
        r = twin.autoencoder.decode(posterior.sample(noise=rng.normal(SEED, b.index, like=posterior.mean, stream=rng.Stream.POSTERIOR)))
    loss = 0.5 * (F.relu(1 - reference(x)).mean() + F.relu(1 + reference(r)).mean())
    for p, gradient in zip(reference.parameters(), torch.autograd.grad(loss, list(reference.parameters()))):
        p.grad = gradient
    adam.step()
    tokenizer_step(s, 2, [b])
    for p, q in zip(s.discriminator.parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        assert float(s.optimizer_disc.state[p]["step"]) == float(adam.state[q]["step"]) == 3


@BOTH
def test_the_autoencoders_loss_leaves_no_gradient_in_the_discriminator(formulation):
    """Else the discriminator would also step along the generator's gradient."""
    s = state(gradients=formulation)
    twin = copy.deepcopy(s.discriminator)
    b = batch()
    tokenizer_step(s, 0, [b])
    t = state()
    t.discriminator = twin
    d = plain_losses(t, b, 1.0, 1.0)["d_loss"]
    assert_gradients(s.optimizer_disc, s.discriminator.parameters(), torch.autograd.grad(d, list(twin.parameters())))
    assert all(p.grad is None for p in s.discriminator.parameters())


@pytest.mark.parametrize("proj_fix", [True, False])
def test_proj_fix_keeps_the_projection(proj_fix):
    s = state(proj_fix=proj_fix)
    before = copies(s.projection, s.autoencoder)
    tokenizer_step(s, 0, [batch()])
    assert same(before[0], s.projection) is proj_fix and not same(before[1], s.autoencoder)
    assert ("linear_proj.weight" in s.trained()) is not proj_fix
    assert "linear_proj.weight" in s.groups()["model"], "saved either way"


@BOTH
def test_without_alignment_there_is_no_projection(formulation):
    s = state(vf=False, gradients=formulation)
    values = tokenizer_step(s, 0, [batch()])
    assert values["mdms"] == values["mcos"] == values["vf_loss"] == 0 and torch.isfinite(values["loss"])
    assert not any(name.startswith("linear_proj") for name in s.groups()["model"])


@BOTH
def test_frozen_networks_stay_and_get_no_gradients(formulation):
    s = state(gradients=formulation)
    before = copies(s.foundation, s.perceptual)
    tokenizer_step(s, 0, [batch()])
    assert same(before[0], s.foundation) and same(before[1], s.perceptual)
    assert all(p.grad is None for network in (s.foundation, s.perceptual) for p in network.parameters())


def test_a_bad_gradient_of_either_network_leaves_both():
    for spoil in ("discriminator", "autoencoder"):
        s = state()
        tokenizer_step(s, 0, [batch()])
        with torch.no_grad():
            if spoil == "discriminator":
                s.discriminator.main[0].bias[0] = float("inf")
            else:
                s.autoencoder.decoder.conv_out.bias[0] = float("nan")
        before = copies(s.autoencoder, s.projection, s.discriminator)
        moments = [v.clone() for o in (s.optimizer, s.optimizer_disc) for p in o.state for v in o.state[p].values()]
        tokenizer_step(s, 1, [batch(first=4)])
        for saved, module in zip(before, (s.autoencoder, s.projection, s.discriminator)):
            for name, value in saved.items():
                torch.testing.assert_close(module.get_parameter(name), value, rtol=0, atol=0, equal_nan=True)
        now = [v for o in (s.optimizer, s.optimizer_disc) for p in o.state for v in o.state[p].values()]
        assert all(torch.equal(a, b) for a, b in zip(moments, now)) and int(s.guard.skipped) == 1


def test_each_network_is_clipped_by_its_own_norm():
    s, free = state(max_grad_norm=1e-3), state()
    clipped, whole = tokenizer_step(s, 0, [batch()]), tokenizer_step(free, 0, [batch()])
    torch.testing.assert_close(clipped["grad_norm"], whole["grad_norm"])
    p = next(iter(s.trained().values()))
    ratio = s.optimizer.state[p]["exp_avg"].norm() / free.optimizer.state[next(iter(free.trained().values()))]["exp_avg"].norm()
    torch.testing.assert_close(ratio, 1e-3 / whole["grad_norm"], rtol=1e-3, atol=0)


def test_groups_bring_a_fresh_state_to_the_same_next_step():
    """Saved before the GAN starts, and after."""
    for done in (1, 4):
        straight = state(disc_start=5)
        for step in range(done):
            tokenizer_step(straight, step, [batch(first=4 * step)])
        groups = {group: {k: v.clone() for k, v in tensors.items()} for group, tensors in straight.groups().items()}
        assert groups.keys() == {"model", "discriminator", "optimizer", "optimizer_disc", "guard"}
        resumed = state(disc_start=5)
        resumed.load_groups(groups, "x")
        for step in (done, done + 1):
            for s in (straight, resumed):
                tokenizer_step(s, step, [batch(first=4 * step)])
        for group, tensors in straight.groups().items():
            assert all(torch.equal(value, resumed.groups()[group][name]) for name, value in tensors.items()), (done, group)


def test_dropout_is_a_function_of_seed_step_and_process():
    """No generator's state is saved, so a run that continues must not depend on one."""

    def loss(step=1, rank=0, used=0, **changes):
        s = state(autoencoder=AutoencoderKL(**FORM, dropout=0.5), world=World(rank, 1, torch.device("cpu")), **changes)
        s.autoencoder.load_state_dict(state().autoencoder.state_dict())
        torch.manual_seed(used)  # what a run has drawn so far
        return tokenizer_step(s, step, [batch()])["loss"]

    first = loss()
    assert torch.equal(loss(used=1), first)
    for other in (dict(step=2), dict(rank=1), dict(seed=SEED + 1)):
        assert not torch.equal(loss(**other), first)


@pytest.mark.parametrize("ours", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("theirs", [torch.contiguous_format, torch.channels_last])
def test_gradients_take_the_memory_layout_of_their_parameter(ours, theirs):
    """The fused Adam refuses another; a convolution in channels-last gives its weight's gradient in channels-last."""
    p = torch.nn.Parameter(torch.randn(4, 3, 2, 2).contiguous(memory_format=ours))
    first, second = (torch.randn(4, 3, 2, 2).contiguous(memory_format=theirs) for _ in range(2))
    accumulate({p: first.clone()}, 1)
    assert p.grad.stride() == p.stride() and torch.equal(p.grad, first)
    p.grad = None
    for gradient in (first, second):
        accumulate({p: gradient}, 2)
    assert p.grad.stride() == p.stride()
    torch.testing.assert_close(p.grad, (first + second) / 2)


def test_the_learning_rate_decays_at_the_end():
    """Of each stage."""
    s = state()
    s.stages = (Stage(0, 4, s.weights, 1e-3, decay_fraction=0.5), Stage(4, 6, s.weights, 1e-4, decay_fraction=0.5))
    assert [s.learning_rate(step) for step in range(6)] == pytest.approx([1e-3, 1e-3, 1e-3, 0.5e-3, 1e-4, 1e-4])


# -- stages -----------------------------------------------------------------------------------------------------------


def bits(s):
    """All that a checkpoint of a state holds."""
    return {f"{group} {name}": value.clone() for group, tensors in s.groups().items() for name, value in tensors.items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_skipped(before, after):
    """One step more is counted as skipped, and nothing else is different."""
    for name in ("guard skipped", "guard in_a_row"):
        assert after.pop(name) == before.pop(name) + 1
    assert_same_bits(before, after)


def staged(**changes):
    """Three iterations as configured, three with another weight, two with the projection fixed."""
    s = state(disc_start=3, **changes)
    later = replace(s.weights, disc_start=1, vf_weight=0.05)
    s.stages = (Stage(0, 3, s.weights, 1e-3), Stage(3, 6, later, 5e-4), Stage(6, 8, later, 1e-3, train_projection=False))
    return s


def test_a_stage_is_a_run_from_the_weights_of_the_one_before():
    """Discriminator, its running statistics and the projection among them; fresh optimizers, the GAN's start counted anew."""
    s, batches = staged(), [batch(first=4 * step) for step in range(8)]
    for step in range(8):
        tokenizer_step(s, step, [batches[step]])
    twin = staged()
    for stage in twin.stages:
        run = state()
        run.load_groups(twin.groups() | {"optimizer": {}, "optimizer_disc": {}}, "the stage before")
        run.stages = (replace(stage, begin=0, end=stage.end - stage.begin),)
        for step in range(stage.begin, stage.end):
            tokenizer_step(run, step - stage.begin, [batches[step]])
        twin = run
    assert_same_bits(bits(s), bits(twin))


def test_going_back_leaves_nothing_of_what_came_after():
    """From a stage with the projection fixed and the GAN at work to a step before both."""
    s, batches = staged(), [batch(first=4 * step) for step in range(8)]
    tokenizer_step(s, 0, [batches[0]])
    before = {group: {name: value.clone() for name, value in tensors.items()} for group, tensors in s.groups().items()}
    for step in range(1, 8):
        tokenizer_step(s, step, [batches[step]])
    s.load_groups(before, "step 1")
    fresh = staged()
    fresh.load_groups(before, "step 1")
    assert_same_bits(bits(s), bits(fresh))
    for step in range(1, 4):
        for one in (s, fresh):
            tokenizer_step(one, step, [batches[step]])
    assert_same_bits(bits(s), bits(fresh))


@BOTH
@pytest.mark.parametrize("where", ["decoder", "discriminator"])
def test_a_gradient_that_is_not_finite_in_either_network_leaves_every_bit_of_both(formulation, where):
    """Running statistics of BatchNorm too, which the forward pass had already moved."""

    def spoilt(s, step, b):
        terms, gradients = formulation(s, step, b)
        p = s.autoencoder.last_decoder_weight if where == "decoder" else s.discriminator.main[2].weight
        return terms, gradients | {p: torch.full_like(p, float("nan"))}

    s = state(gradients=formulation)
    tokenizer_step(s, 0, [batch()])
    before = bits(s)
    s.gradients = spoilt
    values = tokenizer_step(s, 1, [batch(first=4)])
    after = bits(s)
    assert torch.isfinite(values["nll"])
    assert_skipped(before, after)


@BOTH
def test_a_nan_in_an_image_changes_nothing(formulation):
    s = state(gradients=formulation)
    tokenizer_step(s, 0, [batch()])
    before = bits(s)
    pixels = batch(first=4).pixels.float()
    pixels[2, 1, 3, 5] = float("nan")
    tokenizer_step(s, 1, [replace(batch(first=4), pixels=pixels)])
    assert_skipped(before, bits(s))


def test_sums_are_logged_per_value_too():
    values = tokenizer_step(state(), 0, [batch()])
    for name, per_value, count in (("loss", "loss_per_pixel", 768), ("nll", "nll_per_pixel", 768), ("kl", "kl_per_latent", 16)):
        torch.testing.assert_close(values[per_value] * count, values[name])
    torch.testing.assert_close(values["nll_per_pixel"], values["rec"] + values["perceptual"])


def test_the_guard_forgets_at_a_stage_and_at_the_gans_start():
    s = staged()
    forgot = []
    s.guard.expect_another_loss = lambda: forgot.append(step)
    for step in range(8):
        s.enter(step)
    assert forgot == [0, 2, 3, 4, 6, 7], "disc_start 3: from iteration 2; disc_start 1: from iteration 1"
