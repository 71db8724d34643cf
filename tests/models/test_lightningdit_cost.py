"""What LightningDiT costs: the paper's counts, and activations as a real training step keeps them."""

import pytest
import torch

from vavae_fast.errors import BadInput
from vavae_fast.models import LIGHTNINGDIT_SIZES, LightningDiT, create_lightningdit
from vavae_fast.models.lightningdit_cost import activation_bytes_per_image, flops_per_image, parameter_count

FORM = dict(use_swiglu=True, use_rope=True, use_rmsnorm=True)
TINY = dict(FORM, input_size=4, patch_size=1, in_channels=5, hidden_size=32, depth=3, num_heads=4, num_classes=7)


def test_sizes_and_counts_are_the_papers():
    """675.26 M parameters (the official log) and 237.3 GFLOP for XL/1; training is three forwards: 711.8 GFLOP."""
    with torch.device("meta"):
        model = create_lightningdit("LightningDiT-XL/1")
    assert f"{parameter_count(model) / 1e6:.2f}" == "675.26"
    assert f"{flops_per_image(model) / 1e9:.1f}" == "237.3" and f"{3 * flops_per_image(model) / 1e9:.1f}" == "711.8"
    with torch.device("meta"):
        fused = create_lightningdit("LightningDiT-B/1", fused=True)
    assert f"{flops_per_image(fused) / 1e9:.1f}" == "46.0"
    assert set(LIGHTNINGDIT_SIZES) == {f"LightningDiT-{s}/{p}" for s in ("S", "B", "L", "XL", "1p0B", "1p6B") for p in (1, 2)}


def test_activation_bytes():
    """Eager XL/1 saves 32.7 units a block under autocast, a unit being one bf16 activation; checkpointing saves its input."""
    config = dict(LIGHTNINGDIT_SIZES["LightningDiT-XL/1"], input_size=16, use_swiglu=True, use_rope=True, use_rmsnorm=True)
    unit = 256 * 1152 * 2
    saved = activation_bytes_per_image(config, "bf16")
    assert saved / unit / 28 == pytest.approx(32.7, rel=0.03)
    assert activation_bytes_per_image(config, "fp32") > 1.5 * saved
    checkpointed = activation_bytes_per_image(config, "bf16", checkpointing=True)
    assert checkpointed == pytest.approx((28 * 2 + 33 + 20) * unit, rel=0.2)
    with pytest.raises(BadInput, match="precision"):
        activation_bytes_per_image(config, "fp16")


@pytest.mark.parametrize("fused", [False, True])
def test_activation_bytes_of_a_checkpointed_model_are_what_it_keeps(fused):
    """Counted on the model itself: its inputs to blocks, and, while one block runs backward, that block's own."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    model = LightningDiT(**TINY, use_checkpoint=True, fused=fused)
    totals = []
    for count in (1, 2):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(torch.randn(count, 5, 4, 4), torch.rand(count), torch.arange(count))
        totals.append(sum(storage.nbytes() for storage in kept.values()))
        del out
    one, two = (activation_bytes_per_image({**model.config, "depth": depth}, "fp32") for depth in (1, 2))
    gates = model.depth * 6 * model.hidden_size * 4 if fused else 0  # (N, 6 D): not a token's, left out of the estimate
    assert activation_bytes_per_image(model, "fp32", checkpointing=True) == totals[1] - totals[0] - gates + (two - one)
