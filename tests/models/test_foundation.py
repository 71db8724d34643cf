"""Frozen encoders through timm: grids, normalisation, nothing to train or save, and every refusal."""

import importlib.util
import sys

import pytest
import torch
from safetensors.torch import save_file

from vavae_fast.errors import BadInput
from vavae_fast.models import foundation
from vavae_fast.models.foundation import FOUNDATION_MODELS, create_foundation_model

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed (vavae-fast[encoders])")
TINY = "timm:vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def tiny():
    return create_foundation_model(TINY, random=True)


@pytest.fixture(scope="module")
def tiny_dinov2():
    """The architecture of dinov2-small, two blocks deep: patch 14, table of 37 x 37 positions."""
    timm = foundation.import_timm()
    encoder = timm.create_model(FOUNDATION_MODELS["dinov2-small"], pretrained=False, num_classes=0, dynamic_img_size=True, depth=2)
    return foundation.FoundationModel(encoder)


@needs_timm
@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 64), (224, 224)])
def test_one_feature_per_16_pixels(tiny, height, width):
    features = tiny(torch.randn(2, 3, height, width))
    assert features.shape == (2, tiny.feature_dim, height // 16, width // 16)
    assert features.is_floating_point() and not features.requires_grad


@needs_timm
def test_features_are_the_patch_tokens_in_raster_order(tiny):
    x = torch.randn(1, 3, 32, 48)
    tokens = tiny.encoder.forward_features(x)[:, 1:]
    assert torch.equal(tiny(x), tokens.reshape(1, 2, 3, -1).permute(0, 3, 1, 2))


@needs_timm
@pytest.mark.parametrize(("size", "resized"), [((64, 64), (56, 56)), ((32, 96), (28, 84))])
def test_a_patch_of_14_sees_the_image_at_fourteen_sixteenths(tiny_dinov2, size, resized):
    x = torch.randn(1, 3, *size)
    small = torch.nn.functional.interpolate(x, size=resized, mode="bilinear", align_corners=False)
    tokens = tiny_dinov2.encoder.forward_features(small)[:, 1:]
    expected = tokens.reshape(1, size[0] // 16, size[1] // 16, -1).permute(0, 3, 1, 2)
    assert torch.equal(tiny_dinov2(x), expected)


@needs_timm
def test_legacy_feeds_images_as_they_are_and_imagenet_normalises(tiny):
    timm = foundation.import_timm()
    encoder = timm.create_model(FOUNDATION_MODELS["mae-base"], pretrained=False, num_classes=0, dynamic_img_size=True, depth=1)
    mean, std = (torch.tensor(encoder.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert abs(mean.flatten()[0].item() - 0.485) < 1e-6
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    seen = []
    encoder.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    foundation.FoundationModel(encoder, "legacy")(x)
    foundation.FoundationModel(encoder, "imagenet")(x)
    assert torch.equal(seen[0], x)
    torch.testing.assert_close(seen[1], ((x + 1) / 2 - mean) / std)


@needs_timm
def test_a_grid_resamples_the_features(tiny):
    x = torch.randn(1, 3, 64, 64)
    tiny.grid = (2, 2)
    smaller = tiny(x)
    tiny.grid = None
    full = tiny(x)
    assert full.shape[2:] == (4, 4) and smaller.shape == (1, tiny.feature_dim, 2, 2)
    constant = foundation._resample(torch.full((1, 2, 4, 4), 3.0), (8, 8))
    torch.testing.assert_close(constant, torch.full((1, 2, 8, 8), 3.0))


@needs_timm
def test_nothing_to_train_or_to_save(tiny):
    owner = torch.nn.Module()
    owner.foundation_model = tiny
    assert not list(owner.parameters()) and not owner.state_dict()
    assert not any(p.requires_grad for p in tiny.encoder.parameters())
    owner.train()
    assert not tiny.encoder.training


@needs_timm
def test_the_encoder_moves_with_its_owner():
    model = create_foundation_model(TINY, random=True)
    model.to(torch.float64)
    assert next(model.encoder.parameters()).dtype == torch.float64
    for dtype in (torch.float64, torch.bfloat16):
        assert model.to(dtype)(torch.randn(1, 3, 16, 16)).dtype == dtype


@needs_timm
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_local_file(tmp_path, tiny, suffix):
    path = tmp_path / f"vit{suffix}"
    state = {**tiny.encoder.state_dict(), "head.weight": torch.zeros(3, tiny.feature_dim), "mask_token": torch.zeros(1)}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(create_foundation_model(TINY, weights=path)(x), tiny(x))


@needs_timm
def test_weights_of_another_encoder_are_refused(tmp_path, tiny):
    state = tiny.encoder.state_dict()
    state["blocks.0.attn.qkv.weights"] = state.pop("blocks.0.attn.qkv.weight")
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(BadInput, match=r"1 missing: blocks.0.attn.qkv.weight; 1 unexpected: blocks.0.attn.qkv.weights"):
        create_foundation_model(TINY, weights=tmp_path / "vit.safetensors")


def test_no_weights_is_an_error_with_the_choices():
    with pytest.raises(BadInput, match=r"'dinov2' has no weights; set foundation.weights.*vit_large_patch14_dinov2.lvd142m.*hub"):
        create_foundation_model("dinov2")


def test_weights_and_random_are_not_both_possible():
    with pytest.raises(BadInput, match="choose one"):
        create_foundation_model("dinov2", weights="hub", random=True)


def test_unknown_names_are_refused():
    with pytest.raises(BadInput, match="expected one of dinov2, dinov2-base"):
        create_foundation_model("dino", random=True)
    with pytest.raises(BadInput, match="input_range"):
        create_foundation_model("dinov2", random=True, input_range="clip")


@needs_timm
@pytest.mark.parametrize(("name", "reason"), [("timm:vit_tinny", "timm has no model"), ("timm:resnet18", "not a vision transformer")])
def test_timm_names_that_do_not_serve(name, reason):
    with pytest.raises(BadInput, match=reason):
        create_foundation_model(name, random=True)


@needs_timm
def test_every_registered_name_is_timm_s():
    timm = foundation.import_timm()
    assert [name for name in FOUNDATION_MODELS.values() if not timm.is_model(name) or name not in timm.list_pretrained(name)] == []


@needs_timm
def test_a_hub_out_of_reach_says_what_to_do(monkeypatch):
    """The client's own error for a file that is neither cached nor reachable."""
    timm = foundation.import_timm()

    def unreachable(*arguments, **options):
        raise FileNotFoundError("cannot find the requested files in the local cache")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(BadInput, match=r"could not fetch vit_tiny_patch16_224 from the hub.*foundation.weights"):
        create_foundation_model(TINY, weights="hub")


@needs_timm
@pytest.mark.parametrize("size", [(30, 32), (32, 8), (0, 16)])
def test_images_off_the_grid_are_named(tiny, size):
    with pytest.raises(ValueError, match="multiples of 16"):
        tiny(torch.zeros(1, 3, *size))


def test_without_timm_the_cure_is_named(monkeypatch):
    monkeypatch.setattr("vavae_fast.models._torchvision._import_torchvision", lambda: None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadInput, match=r"pip install 'vavae-fast\[encoders\]'"):
        create_foundation_model("dinov2", random=True)
