"""VAVAEPipeline: labels in, images out; image i a function of (seed, i) and the settings alone."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline.pieces import parts, statistics, tokenizer

from vavae_fast import VAVAEPipeline
from vavae_fast.commands import build
from vavae_fast.errors import BadInput
from vavae_fast.flow import LatentScale, SamplerSettings, generate_images, generate_latents
from vavae_fast.models.weights import load_strict
from vavae_fast.pipeline.pipeline import SAMPLERS


@pytest.fixture(scope="module")
def pipeline():
    return VAVAEPipeline(parts(class_names=("ant", "bee", "cicada")), device="cpu")


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def test_importing_the_package_imports_no_torch():
    code = "import sys, vavae_fast; assert 'torch' not in sys.modules and 'numpy' not in sys.modules and 'VAVAEPipeline' in vavae_fast.__all__"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError):
        import vavae_fast

        vavae_fast.VAVAE  # noqa: B018


def test_what_it_says_of_itself(pipeline):
    assert pipeline.labels == dict(ant=0, bee=1, cicada=2) and pipeline.num_classes == 3 and pipeline.image_size == 32
    assert pipeline.device == torch.device("cpu") and pipeline.dtype == torch.float32
    assert repr(pipeline) == "VAVAEPipeline(custom, 32 x 32, 3 classes, cpu, float32)"


def test_images_are_those_of_the_flow_functions(pipeline):
    """By hand, from the networks: the pipeline adds nothing of its own."""
    out = pipeline(labels=[2, 0, 1], seed=7)
    made_of = pipeline._parts
    settings = SamplerSettings(num_steps=4, cfg_scale=1.5, shift=0.3)
    latents = generate_latents(made_of.lightningdit, torch.tensor([2, 0, 1]), (4, 2, 2), settings, seed=7, null_label=3, batch_size=4)
    _, expected = next(generate_images(latents, made_of.tokenizer.decode, LatentScale(made_of.mean, made_of.std)))
    assert np.array_equal(pixels(out.images), expected.permute(0, 2, 3, 1).numpy())
    assert out.labels == [2, 0, 1] and out.seed == 7
    assert all(isinstance(image, Image.Image) and image.size == (32, 32) and image.mode == "RGB" for image in out.images)
    assert len({image.tobytes() for image in out.images}) == 3


def test_called_as_diffusers_calls_dit(pipeline):
    """DiTPipeline's own example, word for word but for the class."""
    class_ids = pipeline.get_label_ids(["bee", "ant"])
    generator = torch.manual_seed(33)
    output = pipeline(class_labels=class_ids, num_inference_steps=5, generator=generator)
    assert output.images[0].size == (32, 32)
    (images,) = pipeline(class_labels=class_ids, guidance_scale=4.0, num_inference_steps=3, output_type="np", return_dict=False)
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.float32


def test_every_output_type_shows_the_same_images(pipeline):
    given = dict(labels=[0, 1], seed=1)
    pil = pixels(pipeline(**given).images)
    array, tensor = pipeline(**given, output_type="np").images, pipeline(**given, output_type="pt").images
    assert array.dtype == np.float32 and np.array_equal(np.rint(array * 255), pil)
    assert tensor.dtype == torch.float32 and np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    latents = pipeline(**given, output_type="latent").images
    assert latents.shape == (2, 4, 2, 2) and np.array_equal(pixels(pipeline.decode(latents)), pil)


@pytest.mark.parametrize("labels", [1, "bee", ["bee"], [1], (1,), np.array([1]), np.int64(1), torch.tensor([[1]])])
def test_a_label_is_a_number_or_a_name(pipeline, labels):
    assert pipeline(labels, seed=0, num_inference_steps=2, output_type="latent").labels == [1]


def test_an_image_depends_on_seed_and_place_alone(pipeline):
    draw = lambda labels, **more: pipeline(labels, seed=5, output_type="latent", **more).images
    whole = draw([0, 1, 2, 0, 1])
    for batch_size in (1, 2, 64):
        assert (draw([0, 1, 2, 0, 1], batch_size=batch_size) - whole).norm() <= 1e-5 * whole.norm()
    assert (draw([0, 1]) - whole[:2]).norm() <= 1e-5 * whole.norm()
    assert not torch.equal(draw([0, 2])[1], whole[1]), "the class matters"
    assert torch.equal(draw([0, 2], num_images_per_label=2), draw([0, 0, 2, 2]))
    assert not torch.allclose(whole[0], whole[3]), "two images of a class are not the same"


def test_seeds(pipeline):
    draw = lambda **more: pipeline(0, output_type="latent", num_inference_steps=2, **more)
    by_generator = [draw(generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert by_generator[0].seed == by_generator[1].seed and torch.equal(by_generator[0].images, by_generator[1].images)
    generator = torch.Generator().manual_seed(3)
    assert draw(generator=generator).seed != draw(generator=generator).seed, "a generator moves on"
    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert first.seed != second.seed and torch.equal(draw().images, first.images)
    assert torch.equal(draw(seed=second.seed).images, second.images)


@pytest.mark.parametrize("more", [
    dict(guidance_scale=4), dict(guidance_scale=0), dict(guidance_interval=(0.4, 1.0)), dict(num_inference_steps=6), dict(timestep_shift=0),
    *(dict(sampler=name) for name in SAMPLERS if name != "euler"),
])  # fmt: skip
def test_every_setting_reaches_the_sampler(pipeline, more):
    latents = pipeline([0, 1], seed=0, output_type="latent", **more).images
    assert torch.isfinite(latents).all() and not torch.equal(latents, pipeline([0, 1], seed=0, output_type="latent").images)


def test_progress_is_told(pipeline):
    told = []
    pipeline([0] * 5, seed=0, num_inference_steps=2, batch_size=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_a_compiled_model_sees_batches_of_one_size(monkeypatch):
    from vavae_fast.pipeline import pipeline as module

    seen = []

    def uncompiled(model, device, precision, regions, graphs):
        assert regions == "blocks"
        return lambda x, t, y: seen.append(len(x)) or model(x, t, y)

    monkeypatch.setattr(module, "predictor", uncompiled)
    draw = lambda **more: VAVAEPipeline(parts(), device="cpu", compile="blocks")([0] * 3, seed=0, batch_size=2, output_type="latent", **more).images
    assert draw(guidance_scale=1).shape == (3, 4, 2, 2) and set(seen) == {2}


@pytest.mark.parametrize("given, words", [
    (dict(labels=[3]), "labels: must be a class number from 0 to 2, or a name of .labels, got 3"),
    (dict(labels=[-1]), "labels: must be a class number"), (dict(labels=[1.0]), "labels: must be a class number"),
    (dict(labels=True), "labels: must be a class number"), (dict(labels=[]), "labels: must be one class or more"),
    (dict(labels=["be"]), "labels: no class 'be'; did you mean 'bee'?"), (dict(labels="zebra"), "labels: no class 'zebra'; .labels holds"),
    (dict(), "labels: must be given, or class_labels"), (dict(labels=[0], class_labels=[0]), "and not both"),
    (dict(labels=[0], guidance_scale=-1), "guidance_scale: must be a number, 0 or more"),
    (dict(labels=[0], guidance_scale=float("nan")), "guidance_scale: must be"), (dict(labels=[0], guidance_scale="4"), "guidance_scale: must be"),
    (dict(labels=[0], guidance_interval=(0.5, 0.1)), "guidance_interval: must be (start, end)"),
    (dict(labels=[0], guidance_interval=0.5), "guidance_interval: must be"),
    (dict(labels=[0], num_inference_steps=1), "num_inference_steps: must be"),
    (dict(labels=[0], num_inference_steps=2.5), "num_inference_steps: must be"), (dict(labels=[0], timestep_shift=-1), "timestep_shift: must be"),
    (dict(labels=[0], sampler="ddim"), "sampler: must be one of euler"), (dict(labels=[0], seed=-1), "seed: must be an integer from 0"),
    (dict(labels=[0], seed=2**63), "seed: must be"), (dict(labels=[0], seed=1, generator=torch.Generator()), "left out where there is a generator"),
    (dict(labels=[0], generator=[torch.Generator()]), "generator: must be one torch.Generator"),
    (dict(labels=[0], batch_size=0), "batch_size: must be"), (dict(labels=[0], num_images_per_label=0), "num_images_per_label: must be"),
    (dict(labels=[0], output_type="png"), "output_type: must be one of pil, np, pt, latent"),
])  # fmt: skip
def test_bad_calls_are_one_line(pipeline, given, words):
    with pytest.raises(BadInput) as caught:
        pipeline(**given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_names_need_to_be_known():
    pipeline = VAVAEPipeline(parts(), device="cpu")
    with pytest.raises(BadInput, match="'ant' is a name, and this model's are not known; give numbers from 0 to 2"):
        pipeline("ant")
    assert pipeline.labels == {}


def test_a_model_without_a_null_class_is_not_guided():
    pipeline = VAVAEPipeline(parts(model=dict(class_dropout_prob=0.0), sample=dict(cfg_scale=1.0)), device="cpu")
    assert len(pipeline([0], guidance_scale=1, seed=0).images) == 1
    with pytest.raises(BadInput, match="guidance_scale: must be 1: this model has no null class"):
        pipeline([0], guidance_scale=2)


def test_encode_and_decode_are_the_tokenizer_s(pipeline):
    made_of = pipeline._parts
    images = pipeline([0, 1], seed=0).images
    array = pixels(images)
    with torch.enable_grad():
        weight = torch.ones((), requires_grad=True)
        (pipeline.encode(images) * weight).sum().backward()
    assert weight.grad is not None, "latents may be used in training"
    z = pipeline.encode(images)
    unit = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(z, made_of.tokenizer.encode(unit).mode())
    assert torch.equal(pipeline.encode(images[0]), made_of.tokenizer.encode(unit[:1]).mode())
    assert torch.equal(z, pipeline.encode(array)) and torch.equal(z, pipeline.encode(torch.from_numpy(array).permute(0, 3, 1, 2)))
    assert torch.allclose(z, pipeline.encode(array.astype(np.float32) / 255), atol=1e-5)
    grey = pipeline.encode(images[0].convert("L"))
    assert grey.shape == (1, 4, 2, 2)
    drawn = pipeline.encode(images, seed=1)
    assert torch.equal(drawn, pipeline.encode(images, seed=1))
    assert not torch.equal(drawn, pipeline.encode(images, seed=2)) and not torch.equal(drawn, z)
    assert pipeline.decode(z, "pt").shape == (2, 3, 32, 32)


@pytest.mark.parametrize("images, words", [
    ("a.png", "images: str"), ([], "images: list"), (np.zeros((32, 32, 3), np.uint8), "images: ndarray (32, 32, 3)"),
    (torch.zeros(1, 1, 32, 32), "images: Tensor (1, 1, 32, 32)"), (torch.full((1, 3, 32, 32), 2.0), "float in [0, 1]"),
    (torch.full((1, 3, 32, 32), torch.nan), "float in [0, 1]"), (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "uint8, or float"),
    ([Image.new("RGB", (32, 32)), Image.new("RGB", (16, 16))], "of one size"), (Image.new("RGB", (30, 32)), "multiples of 16"),
])  # fmt: skip
def test_images_that_cannot_be_encoded(pipeline, images, words):
    with pytest.raises(ValueError) as caught:
        pipeline.encode(images)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_latents_that_cannot_be_decoded(pipeline):
    for latents, words in ((torch.zeros(1, 3, 2, 2), "expected \\(N, 4"), (torch.zeros(4, 2, 2), "latents"), ([1], "latents: must be a tensor")):
        with pytest.raises(ValueError, match=words):
            pipeline.decode(latents)
    with pytest.raises(BadInput, match="output_type: must be one of pil, np, pt"):
        pipeline.decode(torch.zeros(1, 4, 2, 2), "latent")


def test_the_dtype_may_change_and_change_back():
    """What runs is a copy: the networks that are saved keep every bit."""
    pipeline = VAVAEPipeline(parts(), device="cpu")
    before = {name: value.clone() for name, value in pipeline.lightningdit.state_dict().items()}
    exact = pipeline([0, 1], seed=0, output_type="latent").images
    assert pipeline.to(torch.bfloat16) is pipeline and pipeline.dtype == torch.bfloat16
    rounded = pipeline([0, 1], seed=0, output_type="latent").images
    assert not torch.equal(rounded, exact) and (rounded - exact).norm() < 0.05 * exact.norm()
    assert all(torch.equal(value, before[name]) for name, value in pipeline.lightningdit.state_dict().items())
    assert torch.equal(pipeline.to("cpu", torch.float32)([0, 1], seed=0, output_type="latent").images, exact)
    assert VAVAEPipeline(parts(), device="cpu", dtype="tf32").dtype == torch.float32


@pytest.mark.parametrize("given, words", [
    (dict(dtype=torch.float16), "dtype: must be torch.float32, torch.bfloat16, or one of"), (dict(dtype="half"), "dtype: must be"),
    (dict(device="gpu"), "device: 'gpu' is none"), (dict(dtype="fp8", device="cpu"), "torch.bfloat16"),
    (dict(compile="yes"), "compile: must be none, blocks or model"),
])  # fmt: skip
def test_devices_and_dtypes_that_are_none(given, words):
    with pytest.raises(BadInput) as caught:
        VAVAEPipeline(parts(), **given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(pipeline):
    with pytest.raises(BadInput, match="no CUDA GPU"):
        pipeline.to("cuda")
    with pytest.raises(BadInput, match="dtype: must be"):
        pipeline.to("cpu", torch.float16)
    with pytest.raises(BadInput, match="fp8"):
        pipeline.to(dtype="fp8")
    assert pipeline.device.type == "cpu" and pipeline.dtype == torch.float32 and pipeline([0], seed=0), "as it was"


def test_parts_that_do_not_belong_together():
    made_of, (mean, std) = parts(), statistics(8)
    for wrong in (dict(tokenizer=tokenizer(embed_dim=8)), dict(mean=mean), dict(std=std)):
        with pytest.raises(BadInput, match="8.*, the LightningDiT 4; give tokenizer and statistics of the latents it was trained on"):
            VAVAEPipeline(replace(made_of, **wrong), device="cpu")


def test_fused_operators_agree():
    made_of = parts()
    plain = VAVAEPipeline(made_of, device="cpu")
    config = replace(made_of.config, train=replace(made_of.config.train, fused=True))
    model = build.lightningdit(config).eval()
    load_strict(model, made_of.lightningdit.state_dict(), "plain")
    fused = VAVAEPipeline(replace(made_of, config=config, lightningdit=model.requires_grad_(False)), device="cpu")
    a, b = (p([0, 1, 2], seed=0, output_type="latent").images for p in (plain, fused))
    assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu():
    pipeline = VAVAEPipeline(parts())
    assert pipeline.device.type == "cuda" and pipeline.dtype == torch.bfloat16
    exact = VAVAEPipeline(parts(), device="cpu")([0, 1, 2], seed=0, output_type="latent").images
    drawn = pipeline([0, 1, 2], seed=0, output_type="latent").images.cpu()
    assert (drawn - exact).norm() < 0.05 * exact.norm()
    close = pipeline.to(torch.float32)([0, 1, 2], seed=0, output_type="latent").images.cpu()
    assert (close - exact).norm() <= 1e-4 * exact.norm()
    assert len(pipeline([0], seed=0).images) == 1
