"""The demo's small networks: shapes, freezing, standardised features, a distance that is one, files that are whole."""

import json

import pytest
import torch
from safetensors.torch import load, save_file

from vavae_fast.errors import BadInput
from vavae_fast.models.standins import StandInEncoder, StandInPerceptual, load_standin, save_standin


def images(count=6, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("arguments, shape", [({}, (64, 2, 2)), ({"grid": 4, "dim": 32}, (32, 4, 4)), ({"image_size": 32}, (64, 2, 2))])
def test_encoder_gives_one_feature_a_latent_place(arguments, shape):
    encoder = StandInEncoder(**arguments)
    assert encoder(images(2, encoder.image_size)).shape == (2, *shape)
    assert encoder.feature_dim == shape[0]


def test_encoder_is_frozen_and_its_features_standardised():
    x = images(40)
    encoder = StandInEncoder().standardise(x, batch=7)
    features = encoder(x.requires_grad_())
    assert not features.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    std, mean = torch.std_mean(features, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(64), atol=1e-5, rtol=0)


def test_features_are_means_of_the_tokens_they_cover():
    encoder, x = StandInEncoder(), images(2)
    quadrant = encoder.tokens(x).unflatten(1, (4, 4))[:, 2:, :2].mean((1, 2))
    torch.testing.assert_close(encoder(x)[:, :, 1, 0], quadrant)


def test_hidden_patches_do_not_reach_the_tokens():
    encoder, x = StandInEncoder(), images(1)
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 0] = True
    changed = x.clone()
    changed[:, :, :4, :4] = 0.3
    token = torch.full((64,), 0.1)
    assert torch.equal(encoder.tokens(x, hidden, token), encoder.tokens(changed, hidden, token))
    assert not torch.equal(encoder.tokens(x), encoder.tokens(changed))


@pytest.mark.parametrize("arguments, culprit", [({"grid": 3}, "grid"), ({"image_size": 18}, "image_size"), ({"dim": 30}, "dim")])
def test_arguments_that_do_not_fit_are_named(arguments, culprit):
    with pytest.raises(BadInput, match=culprit):
        StandInEncoder(**arguments)


def test_images_of_another_size_are_an_error():
    with pytest.raises(ValueError, match=r"\(B, 3, 16, 16\)"):
        StandInEncoder()(images(1, 32))


def test_perceptual_distance_is_zero_to_itself_symmetric_and_grows_with_noise():
    network, x = StandInPerceptual(), images(8)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    distances = torch.cat([network(x, x + s * noise).flatten(1) for s in (0.0, 0.1, 0.3, 1.0)], dim=1)
    assert network(x, x + noise).shape == (8, 1, 1, 1)
    assert torch.equal(distances[:, 0], torch.zeros(8))
    assert (distances.diff(dim=1) > 0).all()
    torch.testing.assert_close(network(x, x + noise), network(x + noise, x))


def test_perceptual_gradients_reach_both_images_and_stay_finite_on_black():
    network = StandInPerceptual().requires_grad_(False)
    x, y = torch.full((2, 3, 16, 16), -1.0, requires_grad=True), images(2, seed=3).requires_grad_()
    network(x, y).sum().backward()
    for image in (x, y):
        assert image.grad.isfinite().all() and image.grad.abs().sum() > 0


@pytest.mark.parametrize("network", [StandInEncoder(grid=4, dim=32, depth=1), StandInPerceptual((8, 16), num_classes=7)])
def test_a_saved_network_comes_back_whole_and_frozen(network, tmp_path):
    if isinstance(network, StandInEncoder):
        network.standardise(images(20))
    save_standin(network, tmp_path / "net.safetensors")
    loaded = load_standin(tmp_path / "net.safetensors")
    assert type(loaded) is type(network) and loaded.arguments == network.arguments
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, value in network.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(BadInput, match="no such file"):
        load_standin(path)
    save_standin(StandInPerceptual(), path)
    whole = path.read_bytes()
    state = load(whole)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"net\.safetensors"):
        load_standin(path)
    save_file(state, path)
    with pytest.raises(BadInput, match="kind"):
        load_standin(path)
    del state["head.bias"]
    save_file(state, path, {"kind": "StandInPerceptual", "arguments": json.dumps(StandInPerceptual().arguments)})
    with pytest.raises(BadInput, match=r"head\.bias"):
        load_standin(path)


@pytest.mark.parametrize("arguments", ['{"dim": 1000000000000}', '{"depth": 1000000000}', '{"nothing": 1}', "[1]", "{", '{"heads": 0}'])
def test_metadata_that_do_not_describe_the_weights_are_refused(tmp_path, arguments):
    """Before any memory is asked for."""
    save_file(StandInEncoder(dim=8, depth=1, heads=2).state_dict(), tmp_path / "a.safetensors", {"kind": "StandInEncoder", "arguments": arguments})
    with pytest.raises(BadInput, match="a.safetensors: "):
        load_standin(tmp_path / "a.safetensors")
