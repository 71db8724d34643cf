"""The architecture that is read off the weights is the one that made them."""

import pytest
import torch

from vavae_fast.errors import BadInput
from vavae_fast.models.lightningdit import LIGHTNINGDIT_SIZES, create_lightningdit
from vavae_fast.models.lightningdit_weights import lightningdit_architecture


def made(name, **arguments):
    with torch.device("meta"):
        return create_lightningdit(name, **arguments)


@pytest.mark.parametrize("name", LIGHTNINGDIT_SIZES)
@pytest.mark.parametrize("use_rope", [True, False])
def test_published_sizes_have_their_names(name, use_rope):
    found = lightningdit_architecture(made(name, input_size=8, use_rope=use_rope).state_dict(), "a.pt")
    assert found["name"] == name and "num_heads" not in found
    assert made(**found).config == made(name, input_size=8, use_rope=use_rope).config


@pytest.mark.parametrize("arguments", [
    dict(), dict(use_qknorm=True), dict(use_swiglu=False), dict(use_rmsnorm=False), dict(wo_shift=True), dict(learn_sigma=True),
    dict(patch_size=2, input_size=4), dict(in_channels=16, num_classes=10), dict(num_heads=2), dict(depth=1),
])  # fmt: skip
def test_every_other_argument(arguments):
    custom = dict(hidden_size=32, depth=2, num_heads=4, patch_size=1, input_size=2, in_channels=4, num_classes=3) | arguments
    model = made("custom", **custom)
    found = lightningdit_architecture(model.state_dict(), "a.pt")
    assert made(**found).config == model.config


def test_a_published_width_with_other_heads_is_custom():
    model = made("custom", hidden_size=768, depth=12, num_heads=6, patch_size=1)
    found = lightningdit_architecture(model.state_dict(), "a.pt")
    assert found["name"] == "custom" and found["num_heads"] == 6


def test_what_is_not_in_the_weights_is_said():
    with pytest.raises(BadInput, match="a.pt: the number of heads is not in the weights"):
        lightningdit_architecture(made("custom", hidden_size=32, depth=2, num_heads=4, use_rope=False).state_dict(), "a.pt")
    for state in ({}, {"x_embedder.proj.weight": torch.zeros(2, 2)}, {"blocks.x.weight": torch.zeros(1)}):
        with pytest.raises(BadInput, match="a.pt: not the weights of a LightningDiT"):
            lightningdit_architecture(state, "a.pt")


@pytest.mark.parametrize("name, shape", [
    ("blocks.999999999.norm1.weight", (4,)), ("x_embedder.proj.weight", (10**9, 0, 1, 1)), ("pos_embed", (1, 0, 4)), ("feat_rope.freqs_cos", (4, 0)),
])  # fmt: skip
def test_shapes_of_no_model_are_refused(name, shape):
    state = made("custom", input_size=4, hidden_size=32, depth=1, num_heads=4, patch_size=1).state_dict() | {name: torch.empty(shape, device="meta")}
    with pytest.raises(BadInput, match="x.pt: not the weights of a LightningDiT"):
        lightningdit_architecture(state, "x.pt")
