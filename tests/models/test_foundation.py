"""Foundation models: every registered one runs, says what it is, and is laid on any grid; nothing to train or save; every refusal."""

import functools
import importlib.util
import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vavae_fast.errors import BadInput
from vavae_fast.models import foundation
from vavae_fast.models.foundation import FoundationModel, PatchEncoder, create_foundation_model
from vavae_fast.models.foundation_models import FOUNDATION_MODELS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed (vavae-fast[encoders])")
TINY = "timm:vit_tiny_patch16_224"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5,) * 3, (0.5,) * 3)
# name -> patch, class and register tokens, channels, pixels it was trained at, mean and std it was trained with: as published.
PUBLISHED = {
    "dinov2": (14, 1, 1024, 518, IMAGENET), "dinov2-small": (14, 1, 384, 518, IMAGENET), "dinov2-base": (14, 1, 768, 518, IMAGENET),
    "dinov2-giant": (14, 1, 1536, 518, IMAGENET), "dinov2-reg": (14, 5, 1024, 518, IMAGENET), "dinov2-reg-small": (14, 5, 384, 518, IMAGENET),
    "dinov2-reg-base": (14, 5, 768, 518, IMAGENET), "dinov2-reg-giant": (14, 5, 1536, 518, IMAGENET),
    "dinov3": (16, 5, 1024, 256, IMAGENET), "dinov3-small": (16, 5, 384, 256, IMAGENET), "dinov3-base": (16, 5, 768, 256, IMAGENET),
    "mae": (16, 1, 1024, 224, IMAGENET), "mae-base": (16, 1, 768, 224, IMAGENET), "mae-huge": (14, 1, 1280, 224, IMAGENET),
    "clip": (14, 1, 1024, 224, OPENAI), "clip-base": (16, 1, 768, 224, OPENAI),
    "siglip2": (16, 0, 1024, 256, HALF), "siglip2-base": (16, 0, 768, 256, HALF), "siglip2-so400m": (16, 0, 1152, 256, HALF),
    "siglip2-512": (16, 0, 1024, 512, HALF), "siglip2-base-512": (16, 0, 768, 512, HALF),
    "sam": (16, 0, 256, 1024, IMAGENET), "sam-base": (16, 0, 256, 1024, IMAGENET), "sam-huge": (16, 0, 256, 1024, IMAGENET),
    "ijepa": (14, 0, 1280, 224, IMAGENET), "ijepa-16": (16, 0, 1280, 448, IMAGENET),
}  # fmt: skip


@functools.cache
def small(name: str, depth: int = 1):
    """The transformer of a registered name, `depth` blocks deep, with random weights that no test changes."""
    if name.startswith("dinov3"):  # it has constants beside its weights
        return awake(name, depth).requires_grad_(False).eval()
    with torch.device("meta"):  # timm's own initialisation of the wide ones takes seconds
        transformer = foundation.build_transformer(FOUNDATION_MODELS[name].timm, depth=depth)
    transformer.to_empty(device="cpu").requires_grad_(False).eval()
    values = 0.02 * torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    for parameter in transformer.parameters():
        parameter.copy_(values.repeat(-(-parameter.numel() // len(values)))[: parameter.numel()].view_as(parameter))
    return transformer


def awake(name: str, depth: int):
    """By timm's own initialisation, but blocks of full strength: DINO's begin at 1e-5 of it."""
    transformer = foundation.build_transformer(FOUNDATION_MODELS[name].timm, depth=depth)
    for key, parameter in transformer.named_parameters():
        if "gamma" in key:
            parameter.data.fill_(1.0)
    return transformer


@pytest.fixture(scope="module")
def tiny():
    return create_foundation_model(TINY, random=True)


def trained_range(x, transformer):
    """[-1, 1] as the transformer's own mean and std want it."""
    mean, std = (torch.tensor(transformer.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return ((x + 1) / 2 - mean) / std


@pytest.mark.parametrize("name", FOUNDATION_MODELS)
def test_every_registered_model_runs_and_is_what_was_published(name):
    """Tokens of 2 x 3 patches, through resizing, normalisation and the drop of other tokens, without our wrapper's help."""
    patch, prefix, channels, pixels, (mean, std) = PUBLISHED[name]
    encoder = PatchEncoder(small(name))
    assert (encoder.patch, encoder.prefix_tokens, encoder.feature_dim, encoder.input_size) == (patch, prefix, channels, pixels)
    assert (encoder.mean, encoder.std) == (mean, std) and encoder.token_grid(256, 512) == (16, 32)
    x = torch.rand(1, 3, 32, 48) * 2 - 1
    resized = x if patch == 16 else F.interpolate(x, size=(2 * patch, 3 * patch), mode="bilinear", align_corners=False)
    raw = encoder.transformer.forward_features(trained_range(resized, encoder.transformer))
    expected = raw if raw.ndim == 4 else raw[:, prefix:].reshape(1, 2, 3, channels).permute(0, 3, 1, 2)
    features = FoundationModel(encoder)(x)
    assert features.shape == (1, channels, 2, 3) and features.isfinite().all() and not features.requires_grad
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_the_table_of_what_was_published_is_of_all():
    assert PUBLISHED.keys() == FOUNDATION_MODELS.keys()
    timm = foundation.import_timm()
    names = [entry.timm for entry in FOUNDATION_MODELS.values()]
    assert len(set(names)) == len(names) and [name for name in names if name not in timm.list_pretrained(name)] == []


def test_dinov3_turns_its_queries_by_place():
    """Without positions, patches moved by one column would be features moved by one column."""
    model = FoundationModel(PatchEncoder(small("dinov3-small", depth=2)))
    x = torch.rand(1, 3, 48, 64) * 2 - 1
    assert (model(x.roll(16, 3)) - model(x).roll(1, 3)).abs().max() > 1e-3


@pytest.mark.parametrize(("depth", "far"), [(2, False), (3, True)])
def test_sam_attends_in_windows_of_14_and_in_its_third_block_everywhere(depth, far):
    """At 256 pixels, a sixteenth of the area that it was trained at: 16 x 16 patches are four windows."""
    model = FoundationModel(PatchEncoder(small("sam-base", depth=depth)))
    x = torch.zeros(1, 3, 256, 256)
    y = x.clone()
    y[:, :, -16:, -16:] = 1
    assert bool((model(y) - model(x))[:, :, :12, :12].any()) is far


@pytest.mark.parametrize(("image", "ratio"), [((256, 256), 8), ((512, 512), 16), ((256, 256), 32), ((200, 120), 8), ((16, 16), 8)])
def test_any_latent_grid(tiny, image, ratio):
    """512 pixels and f8 too, and latents that are no multiple of the patches."""
    grid = (image[0] // ratio, image[1] // ratio)
    features = FoundationModel(tiny.model, grid)(torch.zeros(1, 3, *image))
    assert features.shape == (1, tiny.feature_dim, *grid) and features.isfinite().all()


def test_resampled_features_stay_where_they_were(tiny):
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(FoundationModel(tiny.model, (4, 4))(x), tiny(x)), "its own grid: nothing to do"
    halved = FoundationModel(tiny.model, (2, 2))(x)
    row = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    torch.testing.assert_close(foundation._resample(row, (4, 4))[0, 0, 0, 1:3], torch.tensor([2.5, 4.5]))
    assert halved.shape[2:] == (2, 2) and foundation._resample(row.bfloat16(), (4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize(("pixels", "shown"), [(8, 64), (16, 32), (32, 16)])
def test_pixels_per_patch_is_how_large_an_image_is_shown(tiny, pixels, shown):
    seen = []
    hook = tiny.model.transformer.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1]))
    features = create_like(tiny, pixels)(torch.zeros(1, 3, 32, 32))
    hook.remove()
    assert seen == [shown] and features.shape[-1] == 32 // pixels


def create_like(model, pixels):
    return FoundationModel(PatchEncoder(model.model.transformer, pixels_per_patch=pixels))


@pytest.mark.parametrize(("name", "input_range", "normalised"), [
    ("dinov2", "auto", False), ("dinov2-reg-small", "auto", False), ("mae", "auto", False), ("dinov3", "auto", True), ("clip", "auto", True),
    ("siglip2", "auto", True), ("sam", "auto", True), ("ijepa", "auto", True), ("dinov2", "trained", True), ("clip", "legacy", False),
])  # fmt: skip
def test_legacy_feeds_images_as_they_are(monkeypatch, name, input_range, normalised):
    monkeypatch.setattr(foundation, "build_transformer", lambda timm_name, from_hub: small(name))
    encoder = create_foundation_model(name, random=True, input_range=input_range).model
    x = torch.rand(1, 3, encoder.patch, encoder.patch) * 2 - 1
    assert (encoder.mean == HALF[0]) is (not normalised or name == "siglip2")
    fed = x * encoder.gain + encoder.offset
    torch.testing.assert_close(fed, trained_range(x, encoder.transformer)) if normalised else torch.testing.assert_close(fed, x, rtol=0, atol=0)


def test_nothing_to_train_or_to_save(tiny):
    owner = torch.nn.Module()
    owner.foundation_model = tiny
    assert not list(owner.parameters()) and not owner.state_dict()
    assert not any(p.requires_grad for p in tiny.model.parameters())
    owner.train()
    assert not tiny.model.training and not tiny.model.transformer.training


def test_the_model_moves_with_its_owner():
    owner = torch.nn.Sequential(create_foundation_model(TINY, random=True))
    owner.to(torch.float64)
    assert next(owner[0].model.parameters()).dtype == torch.float64
    for dtype in (torch.float64, torch.bfloat16):
        assert owner.to(dtype)(torch.randn(1, 3, 16, 16)).dtype == dtype


@pytest.mark.parametrize("name", ["dinov2-small", "dinov3-small", "sam-base", "clip-base"])
def test_rounded_weights_change_features_by_their_rounding(name):
    """bf16 keeps 8 bits: two blocks of it move features by a few of their last bits, and as autocast does; autocast around it adds nothing."""
    torch.manual_seed(1)
    model = FoundationModel(PatchEncoder(awake(name, depth=2)))
    x = torch.rand(1, 3, 32, 48) * 2 - 1
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast_each_call = model(x).float()
    model.round_weights(torch.bfloat16)
    rounded = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(x)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, inside)
    assert model.model.gain.dtype == torch.float32 and all(p.dtype == torch.bfloat16 for p in model.model.parameters())
    scale = exact.abs().mean()
    assert 0 < (rounded.float() - exact).abs().mean() / scale < 0.02
    assert (rounded.float() - cast_each_call).abs().mean() / scale < 0.02
    assert F.cosine_similarity(rounded.float(), exact, dim=1).min() > 0.999


@pytest.mark.parametrize("name", ["dinov2-small", "dinov3-small", "mae-base", "clip-base", "siglip2-base", "sam-base", "ijepa"])
def test_nothing_is_made_on_the_cpu_for_another_device(name):
    """A copy from the CPU would wait for a GPU's queue at every step; the first call may, for what it then keeps."""
    made = []

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            made.extend((str(operator), t.device.type) for t in tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with torch.device("meta"):
        model = FoundationModel(PatchEncoder(foundation.build_transformer(FOUNDATION_MODELS[name].timm, depth=3)), grid=(3, 3)).to("meta")
        x = torch.zeros(1, 3, 32, 48)
    model(x)
    with Devices():
        model(x)
    assert len(made) > 50 and {device for _, device in made} == {"meta"}, [name for name, device in made if device == "cpu"]


def test_fp32_weights_run_under_autocast(tiny):
    with torch.autocast("cpu", torch.bfloat16):
        features = tiny(torch.randn(1, 3, 32, 32))
    assert features.isfinite().all() and next(tiny.model.parameters()).dtype == torch.float32


def test_another_kind_of_model_keeps_its_dtypes():
    model = torch.nn.Conv2d(3, 4, 16, 16)
    model.feature_dim = 4
    wrapped = FoundationModel(model, name="mine").round_weights(torch.bfloat16)
    assert model.weight.dtype == torch.float32 and wrapped(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 2, 2) and wrapped.name == "mine"


def test_no_weights_is_an_error_with_the_choices():
    with pytest.raises(BadInput, match=r"'dinov2' has no weights; set foundation.weights.*vit_large_patch14_dinov2.lvd142m.*hub"):
        create_foundation_model("dinov2")


def test_weights_and_random_are_not_both_possible():
    with pytest.raises(BadInput, match="choose one"):
        create_foundation_model("dinov2", weights="hub", random=True)


def test_unknown_names_are_refused():
    with pytest.raises(BadInput, match="no foundation model 'dinov2-smal', did you mean dinov2-small.*ijepa-16, or timm:"):
        create_foundation_model("dinov2-smal", random=True)
    with pytest.raises(BadInput, match="input_range: must be auto, legacy or trained"):
        create_foundation_model("dinov2", random=True, input_range="clip")
    with pytest.raises(BadInput, match="pixels_per_patch: must be above 0"):
        create_foundation_model("dinov2", random=True, pixels_per_patch=0)


@pytest.mark.parametrize(("name", "reason"), [("timm:vit_tinny", "timm .* has no model"), ("timm:resnet18", "not a vision transformer")])
def test_timm_names_that_do_not_serve(name, reason):
    with pytest.raises(BadInput, match=reason):
        create_foundation_model(name, random=True)


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch):
    """The client's own error for a file that is neither cached nor reachable."""
    timm = foundation.import_timm()

    def unreachable(*arguments, **options):
        raise FileNotFoundError("cannot find the requested files in the local cache")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(BadInput, match=r"could not fetch vit_tiny_patch16_224 from the hub.*foundation.weights"):
        create_foundation_model(TINY, weights="hub")


def test_without_timm_the_cure_is_named(monkeypatch):
    monkeypatch.setattr("vavae_fast.models._torchvision._import_torchvision", lambda: None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadInput, match=r"pip install 'vavae-fast\[encoders\]'"):
        create_foundation_model("dinov2", random=True)
