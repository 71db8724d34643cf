"""What LightningDiT costs: the paper's counts, and activations as a real training step keeps them."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vavae_fast.errors import BadInput
from vavae_fast.models import LIGHTNINGDIT_SIZES, LightningDiT, create_lightningdit
from vavae_fast.models.lightningdit_cost import activation_bytes_per_image, flops_per_image, parameter_count, training_bytes
from vavae_kernels._compat import INTERPRETED
from vavae_kernels._registry import auto_means

needs_kernels = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")

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


def bytes_held(model: LightningDiT, count: int) -> int:
    """What a forward pass of `count` images really allocates and does not free, by PyTorch's own allocator."""
    inputs = torch.randn(count, 5, 4, 4), torch.rand(count), torch.arange(count)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out = model(*inputs)
    held = sum(event.self_cpu_memory_usage for event in profiled.events())
    del out
    return held


@pytest.mark.parametrize(
    "mode, fused", [(False, False), ("selective", False), (True, False), pytest.param(False, True, marks=needs_kernels)]
)
def test_activation_bytes_are_what_a_forward_pass_holds(mode, fused):
    """The prediction less the one block that runs again in backward."""
    model = LightningDiT(**{**TINY, "depth": 2}, use_checkpoint=mode, fused=fused)
    with auto_means("triton" if fused else "auto"):
        held = bytes_held(model, 2) - bytes_held(model, 1)
    one, two = (activation_bytes_per_image({**model.config, "depth": depth}, "fp32", mode) for depth in (1, 2))
    full = (activation_bytes_per_image({**model.config, "depth": depth}, "fp32") for depth in (1, 2))
    recomputed = -next(full) + next(full) - (two - one) if mode else 0
    predicted = activation_bytes_per_image(model, "fp32", mode) - recomputed
    assert held == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("fused", [False, True])
def test_checkpointing_saves_and_selective_lies_between(fused):
    config = dict(LIGHTNINGDIT_SIZES["LightningDiT-XL/1"], **FORM, input_size=16, in_channels=32, fused=fused)
    everything, selective, blocks = (activation_bytes_per_image(config, "bf16", mode) for mode in (False, "selective", True))
    assert blocks < 0.2 * everything and blocks < 0.4 * selective and selective < 0.7 * everything


@pytest.mark.parametrize("mode", [False, "selective", True])
@pytest.mark.parametrize("accumulating", [False, True])
def test_training_bytes_are_what_a_step_allocates_at_its_peak(mode, accumulating):
    """Within 5 %: the running sum of every allocation and release of a forward and backward pass, over the states."""
    model = LightningDiT(**{**TINY, "input_size": 8, "hidden_size": 64, "depth": 4}, use_checkpoint=mode)
    inputs = torch.randn(8, 5, 8, 8), torch.rand(8), torch.arange(8) % 7
    for first in (True, False):
        if first or not accumulating:
            model.zero_grad(set_to_none=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            model(*inputs).square().mean().backward()
    events = sorted((e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    peak = max(itertools.accumulate(e.nbytes() for e in events))
    parameters = sum(p.numel() for p in model.parameters())
    held_before = (16 + 4 * accumulating) * parameters
    assert held_before + peak == pytest.approx(training_bytes(model, 8, accumulating, "fp32", mode), rel=0.05)
