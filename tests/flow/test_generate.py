"""Generation: an image depends on (seed, index, label) alone; settings are checked; published samples are reproduced."""

import dataclasses

import pytest
import torch
from flow.toys import ToyDiT

from vavae_fast import rng
from vavae_fast.errors import BadInput
from vavae_fast.flow import LatentScale, SamplerSettings, generate_images, generate_latents

SHAPE = (5, 4, 4)
LABELS = torch.tensor([0, 3, 3, 9, 1, 7, 2])
ODE = SamplerSettings(method="euler", num_steps=12, shift=0.3, cfg_scale=4.0, cfg_interval_start=0.11)
SETTINGS = {
    "euler": ODE,
    "heun": dataclasses.replace(ODE, method="heun"),
    "dopri5": dataclasses.replace(ODE, method="dopri5"),
    "sde": dataclasses.replace(ODE, mode="SDE", method="euler", diffusion_form="sigma"),
    "sde heun": dataclasses.replace(ODE, mode="SDE", method="heun", diffusion_form="linear", last_step="Tweedie"),
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def generate(settings=ODE, **options):
    """{index: latent}"""
    batches = generate_latents(ToyDiT(), LABELS, SHAPE, settings, **(dict(seed=3, null_label=10) | options))
    return {i: x for index, latents in batches for i, x in zip(index.tolist(), latents)}


@every_setting
def test_an_image_does_not_depend_on_its_batch(settings):
    whole = generate(settings)
    assert list(whole) == list(range(7)) and whole[0].shape == SHAPE
    for batch_size in (1, 2, 3):
        for index, x in generate(settings, batch_size=batch_size).items():
            torch.testing.assert_close(x, whole[index], rtol=0, atol=1e-5)
    for index, x in generate(settings, indices=[6, 2, 4]).items():
        torch.testing.assert_close(x, whole[index], rtol=0, atol=1e-5)


@every_setting
def test_images_differ_by_index_and_seed(settings):
    first, second = generate(settings), generate(settings, seed=4)
    assert (first[1] - first[2]).abs().max() > 0.1, "the same label, another index"
    assert (first[0] - second[0]).abs().max() > 0.1


def test_resume_and_ranks_share_the_work():
    assert list(generate(indices=range(5, 7))) == [5, 6]
    assert list(generate(indices=range(1, 7, 2), batch_size=2)) == [1, 3, 5]
    assert list(generate(indices=[])) == []


@every_setting
def test_whole_batches_show_the_model_one_size_and_give_the_same_images(settings):
    sizes = set()

    class Sized(ToyDiT):
        def __call__(self, x, t, y):
            sizes.add(len(x))
            return super().__call__(x, t, y)

    batches = generate_latents(Sized(), LABELS, SHAPE, settings, seed=3, null_label=10, batch_size=4, whole_batches=True)
    found = {i: x for index, latents in batches for i, x in zip(index.tolist(), latents, strict=True)}
    assert list(found) == list(range(7)) and sizes <= {4, 8}
    for i, x in generate(settings).items():
        torch.testing.assert_close(found[i], x, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_nothing_waits_and_a_batch_is_decoded_beside_the_next():
    labels, kernel = LABELS.cuda(), torch.randn(3, 5, 1, 1, device="cuda")
    decode = lambda z: torch.tanh(torch.nn.functional.conv2d(z, kernel))
    model = lambda x, t, y: torch.sin(x + t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1))

    def draw():
        return generate_latents(model, labels, SHAPE, ODE, seed=3, null_label=10, batch_size=3)

    plain = {i: x for index, z in draw() for i, x in zip(index.tolist(), torch.clamp(127.5 * decode(z) + 128, 0, 255).to(torch.uint8).cpu())}
    torch.cuda.set_sync_debug_mode("error")
    try:
        latents = list(draw())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for index, images in generate_images(latents, decode, decode_batch=2):
        assert not images.is_cuda and all(torch.equal(x, plain[i]) for i, x in zip(index.tolist(), images))


def test_it_starts_from_the_counter_based_noise():
    seen = []

    def model(x, t, y):
        seen.append((x, y))
        return torch.zeros_like(x)

    unguided = SamplerSettings(num_steps=2)
    ((index, x),) = generate_latents(model, LABELS, SHAPE, unguided, seed=8, null_label=10, indices=[4, 1])
    expected = rng.normal(8, torch.tensor([4, 1]), torch.empty(2, *SHAPE))
    assert index.tolist() == [4, 1] and torch.equal(x, expected) and torch.equal(seen[0][0], expected)
    assert seen[0][1].tolist() == [1, 3] and not x.requires_grad


def test_the_sde_takes_new_increments_each_step():
    """With no drift and constant diffusion the end is the sum of the counter-based increments."""
    settings = SamplerSettings(mode="SDE", method="euler", num_steps=4, diffusion_form="sigma", last_step=None)
    ((index, x),) = generate_latents(lambda x, t, y: 0 * x, LABELS, SHAPE, settings, seed=8, null_label=10)
    other = dataclasses.replace(settings, num_steps=5)
    ((_, finer),) = generate_latents(lambda x, t, y: 0 * x, LABELS, SHAPE, other, seed=8, null_label=10)
    assert torch.isfinite(x).all() and (x - finer).abs().max() > 0.1
    increments = [rng.normal(8, index, x, stream=rng.Stream.SDE + step) for step in range(3)]
    assert all((increments[i] - increments[j]).abs().max() > 1 for i, j in ((0, 1), (1, 2)))


def test_the_scale_undoes_the_normalisation_of_training():
    mean, std, z = torch.randn(1, 5, 1, 1), torch.rand(1, 5, 1, 1) + 0.5, torch.randn(2, 5, 4, 4)
    torch.testing.assert_close(LatentScale(mean, std, 0.3).denormalise((z - mean) / std * 0.3), z)


def test_arguments_are_checked_before_the_first_batch():
    for options, culprit in (
        (dict(indices=[7]), "indices"),
        (dict(indices=[-1]), "indices"),
        (dict(batch_size=0), "batch_size"),
    ):
        with pytest.raises(BadInput, match=culprit):
            generate_latents(ToyDiT(), LABELS, SHAPE, ODE, seed=0, null_label=10, **options)
    with pytest.raises(BadInput, match="labels"):
        generate_latents(ToyDiT(), LABELS.float(), SHAPE, ODE, seed=0, null_label=10)


@pytest.mark.parametrize("options, culprit", [
    (dict(mode="ode"), "sample.mode"),
    (dict(method="eular"), "did you mean 'euler'"),
    (dict(mode="SDE", method="dopri5"), "sample.sampling_method"),
    (dict(num_steps=1), "sample.num_sampling_steps"),
    (dict(num_steps=2.5), "sample.num_sampling_steps"),
    (dict(method=None), "sample.sampling_method"),
    (dict(shift=-1.0), "sample.timestep_shift"),
    (dict(shift="0.3"), "sample.timestep_shift"),
    (dict(cfg_scale=None), "sample.cfg_scale"),
    (dict(cfg_scale=0.5), "sample.cfg_scale"),
    (dict(cfg_interval_start=0.9, cfg_interval_end=0.1), "sample.cfg_interval_start"),
    (dict(cfg_channels="most"), "sample.cfg_channels"),
    (dict(cfg_channels=0), "sample.cfg_channels"),
    (dict(atol=0.0), "sample.atol"),
    (dict(rtol=-1.0), "sample.rtol"),
    (dict(error_norm="rms"), "sample.error_norm"),
    (dict(diffusion_form="sigmoid"), "sample.diffusion_form"),
    (dict(last_step="mean"), "did you mean 'Mean'"),
    (dict(last_step_size=1.0), "sample.last_step_size"),
])
def test_settings_are_checked_when_made(options, culprit):
    with pytest.raises(BadInput, match=culprit):
        SamplerSettings(**options)


def test_images_are_decoded_and_truncated():
    scale = LatentScale(mean=torch.full((1, 5, 1, 1), 0.25), std=torch.full((1, 5, 1, 1), 2.0), multiplier=0.5)
    latents = [(torch.tensor([4, 2]), torch.full((2, 5, 4, 4), 0.1))]
    decoded = []
    ((index, images),) = generate_images(latents, lambda z: decoded.append(z) or torch.tanh(z[:, :3]), scale)
    torch.testing.assert_close(decoded[0], torch.full((2, 5, 4, 4), 0.1 * 2.0 / 0.5 + 0.25))
    assert index.tolist() == [4, 2] and images.shape == (2, 3, 4, 4) and images.dtype == torch.uint8
    sizes = []
    ((_, plain),) = generate_images(latents, lambda z: sizes.append(len(z)) or z[:, :3], decode_batch=1)
    assert sizes == [1, 1]
    assert (plain == 140).all(), "127.5 * 0.1 + 128 = 140.75, truncated"
