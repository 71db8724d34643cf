"""PatchGAN: the reference's keys and shapes, its initialisation, the smallest image."""

import pytest
import torch

from vavae_fast.models.discriminator import PatchDiscriminator

# taming-transformers' NLayerDiscriminator(input_nc=3, ndf=64, n_layers=3), whose weights VA-VAE checkpoints hold.
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
PUBLISHED = {
    "main.0.weight": (64, 3, 4, 4), "main.0.bias": (64,),
    "main.2.weight": (128, 64, 4, 4), **{f"main.3.{name}": (128,) for name in NORM},
    "main.5.weight": (256, 128, 4, 4), **{f"main.6.{name}": (256,) for name in NORM},
    "main.8.weight": (512, 256, 4, 4), **{f"main.9.{name}": (512,) for name in NORM},
    "main.11.weight": (1, 512, 4, 4), "main.11.bias": (1,),
}  # fmt: skip
PUBLISHED.update({key: () for key in PUBLISHED if key.endswith("num_batches_tracked")})


def test_keys_and_shapes_are_the_published_ones():
    found = {key: tuple(value.shape) for key, value in PatchDiscriminator().state_dict().items()}
    assert found == PUBLISHED


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4])
def test_the_smallest_image_leaves_one_patch_and_one_pixel_less_is_refused(n_layers):
    d = PatchDiscriminator(ndf=4, n_layers=n_layers)
    smallest = d.smallest_image
    assert d(torch.randn(2, 3, smallest, smallest)).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match=f"need {smallest} pixels a side"):
        d(torch.randn(2, 3, smallest, smallest - 1))


@pytest.mark.parametrize(("n_layers", "patches"), [(1, 6), (2, 2)])
def test_images_of_16_pixels(n_layers, patches):
    assert PatchDiscriminator(ndf=4, n_layers=n_layers)(torch.randn(2, 3, 16, 16)).shape == (2, 1, patches, patches)


def test_widths_stop_at_eight_times_the_first():
    found = {key: tuple(value.shape) for key, value in PatchDiscriminator(ndf=2, n_layers=5).state_dict().items()}
    assert [found[f"main.{n}.weight"][0] for n in (0, 2, 5, 8, 11, 14, 17)] == [2, 4, 8, 16, 16, 16, 1]


def test_initialisation_is_dcgan_s():
    torch.manual_seed(0)
    d = PatchDiscriminator()
    for module in d.modules():
        if isinstance(module, torch.nn.Conv2d):
            n = module.weight.numel()
            assert abs(module.weight.mean().item()) < 5 * 0.02 / n**0.5
            assert abs(module.weight.std().item() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5
        if isinstance(module, torch.nn.BatchNorm2d):
            n = module.weight.numel()
            assert abs(module.weight.mean().item() - 1) < 5 * 0.02 / n**0.5
            assert module.bias.abs().max() == 0
    assert d.main[0].bias.abs().max() > 0


def test_a_patch_sees_its_own_neighbourhood_only():
    """34 pixels for two layers: a change outside leaves the logit as it is (eval mode: batch norm couples nothing)."""
    d = PatchDiscriminator(ndf=4, n_layers=2).eval()
    x = torch.randn(1, 3, 64, 64)
    changed = x.clone()
    changed[..., 48:, 48:] += 1
    difference = (d(x) - d(changed)).abs()[0, 0]
    assert difference[0, 0] == 0 and difference[-1, -1] > 0


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="n_layers is 0"):
        PatchDiscriminator(n_layers=0)
