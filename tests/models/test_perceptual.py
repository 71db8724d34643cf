"""LPIPS: a distance on images, and the layouts in which its weights are found."""

import pytest
import torch
from safetensors.torch import save_file

from vavae_fast.errors import BadInput
from vavae_fast.models.perceptual import LPIPS

VGG_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's numbering of vgg16().features


@pytest.fixture(scope="module")
def lpips():
    return LPIPS.random()


@pytest.fixture(scope="module")
def state(lpips):
    return {key: value.clone() for key, value in lpips.state_dict().items()}


@pytest.fixture(scope="module")
def images():
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    return x, (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)


def slice_of(number):
    return next(index for index, end in enumerate((4, 9, 16, 23, 30), start=1) if number < end)


def torchvision_layout(state):
    """vgg16's features, with the classifier that LPIPS has no use for (tiny here)."""
    vgg = {}
    for n in VGG_CONVS:
        for kind in ("weight", "bias"):
            vgg[f"features.{n}.{kind}"] = state[f"net.slice{slice_of(n)}.{n}.{kind}"]
    return {**vgg, "classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}


def linear_layout(state):
    return {key: value for key, value in state.items() if key.startswith("lin")}


def checkpoint_layout(state):
    others = {"encoder.conv_in.weight": torch.zeros(1), "loss.logvar": torch.zeros(())}
    return {**{f"loss.perceptual_loss.{key}": value for key, value in state.items()}, **others}


def test_equal_images_have_distance_zero_others_more(lpips, images):
    x, y = images
    assert lpips(x, x).flatten().tolist() == [0.0, 0.0]
    assert lpips(x, y).shape == (2, 1, 1, 1) and (lpips(x, y) > 0).all()


def test_symmetric(lpips, images):
    x, y = images
    torch.testing.assert_close(lpips(x, y), lpips(y, x), rtol=0, atol=0)


def test_an_image_s_distance_does_not_depend_on_its_batch(images):
    lpips, (x, y) = LPIPS.random().double(), [image.double() for image in images]
    torch.testing.assert_close(lpips(x, y)[1:], lpips(x[1:], y[1:]), rtol=1e-12, atol=0)


def test_equation_one(images):
    """Written out for the first slice alone: the other linear layers are zero."""
    lpips = LPIPS.random().double()
    for index in range(1, 5):
        getattr(lpips, f"lin{index}").model[1].weight.zero_()
    x, y = (image.double() for image in images)
    units = []
    for image in (x, y):
        scaled = (image - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        f = lpips.net.slice1(scaled)
        units.append(f / f.norm(dim=1, keepdim=True).clamp_min(1e-300))
    weight = lpips.lin0.model[1].weight
    expected = ((units[0] - units[1]).square() * weight).sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(lpips(x, y).flatten(), expected, rtol=1e-6, atol=0)  # the constants are float32's


def test_frozen_in_eval_mode_with_gradients_for_images_only(lpips, images):
    x, y = images[0], images[1].clone().requires_grad_()
    assert not lpips.train().training and not any(m.training for m in lpips.modules())
    assert not any(p.requires_grad for p in lpips.parameters())
    lpips(x, y).sum().backward()
    assert y.grad.isfinite().all() and y.grad.abs().max() > 0


def test_a_place_without_features_has_a_finite_gradient(state):
    """Where every channel of a slice is 0, the derivative of the length is not defined."""
    dead = {key: torch.zeros_like(value) if key.startswith("net.slice1") else value for key, value in state.items()}
    lpips = LPIPS(dead, "dead")
    y = torch.rand(1, 3, 16, 16).requires_grad_()
    lpips(torch.rand(1, 3, 16, 16), y).sum().backward()
    assert y.grad.isfinite().all()


def test_wrong_images_are_named(lpips):
    with pytest.raises(ValueError, match="needs 16 pixels a side"):
        lpips(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"expected two \(B, 3, H, W\)"):
        lpips(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17))


def test_two_files_and_one_checkpoint_give_the_same_network(tmp_path, state, lpips, images):
    torch.save(torchvision_layout(state), tmp_path / "vgg16.pth")
    torch.save(linear_layout(state), tmp_path / "vgg.pth")
    torch.save({"state_dict": checkpoint_layout(state)}, tmp_path / "vavae.ckpt")
    save_file(state, tmp_path / "merged.safetensors")
    duplicated = {**state, **{key.replace("lin", "lins."): value for key, value in linear_layout(state).items()}}
    torch.save(duplicated, tmp_path / "package.pth")
    expected = lpips(*images)
    two = LPIPS.from_files(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    assert torch.equal(two(*images), expected)
    for name in ("vavae.ckpt", "merged.safetensors", "package.pth"):
        assert torch.equal(LPIPS.from_files(tmp_path / name)(*images), expected), name


def test_missing_weights_are_asked_for_by_name_and_key(tmp_path, state):
    with pytest.raises(BadInput, match=r"vgg16-397923af.pth.*perceptual.vgg_weights.*vgg.pth.*perceptual.linear_weights"):
        LPIPS.from_files(None)
    with pytest.raises(BadInput, match=r"nowhere.pth: no such file.*vgg16-397923af.pth"):
        LPIPS.from_files(tmp_path / "nowhere.pth", tmp_path / "vgg.pth")
    torch.save(torchvision_layout(state), tmp_path / "vgg16.pth")
    with pytest.raises(BadInput, match=r"no linear layers.*perceptual.linear_weights"):
        LPIPS.from_files(tmp_path / "vgg16.pth")
    with pytest.raises(BadInput, match=r"no linear layers.*perceptual.linear_weights"):
        LPIPS.from_files(tmp_path / "vgg16.pth", tmp_path / "vgg16.pth")


def test_an_incomplete_vgg_is_refused(tmp_path, state):
    vgg = torchvision_layout(state)
    del vgg["features.28.bias"]
    torch.save(vgg, tmp_path / "vgg16.pth")
    torch.save(linear_layout(state), tmp_path / "vgg.pth")
    with pytest.raises(BadInput, match=r"1 missing: net.slice5.28.bias"):
        LPIPS.from_files(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
