"""Layer statistics are what the layers really see; QK-norm comes to weights trained without it."""

import pytest
import torch
import torch.nn.functional as F

from vavae_fast.errors import BadInput
from vavae_fast.models import LightningDiT
from vavae_fast.models.compilation import compile_forward
from vavae_fast.models.diagnostics import layer_statistics, with_qk_norm
from vavae_fast.models.weights import load_strict

FORM = dict(input_size=4, patch_size=1, in_channels=4, hidden_size=32, depth=3, num_heads=4, num_classes=5, use_swiglu=True, use_rope=True,
            use_rmsnorm=True)  # fmt: skip


def model_and_inputs(**changes):
    torch.manual_seed(0)
    model = LightningDiT(**{**FORM, **changes}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, (torch.randn(3, 4, 4, 4), torch.rand(3), torch.arange(3))


@pytest.mark.parametrize("changes", [{}, dict(use_qknorm=True), dict(use_rope=False, use_rmsnorm=False), dict(wo_shift=True)], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_statistics_are_those_of_the_tensors_that_pass(changes, fused, monkeypatch):
    """Against what scaled_dot_product_attention is given, and the plain model's residual stream."""
    model, inputs = model_and_inputs(**changes)
    logits, streams = [], []
    attention = F.scaled_dot_product_attention

    def spying(q, k, v, **options):
        logits.append((q @ k.mT / q.shape[-1] ** 0.5).abs().max())
        return attention(q, k, v, **options)

    hooks = [block.register_forward_pre_hook(lambda _, given: streams.append(given[0].square().mean().sqrt())) for block in model.blocks]
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(F, "scaled_dot_product_attention", spying)
        model(*inputs)
    for hook in hooks:
        hook.remove()
    subject = LightningDiT(**{**FORM, **changes}, fused=fused).eval()
    subject.load_state_dict(model.state_dict())
    found = layer_statistics(subject, *inputs)
    torch.testing.assert_close(found["attention_logit"], torch.stack(logits), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["residual_rms"], torch.stack(streams), rtol=1e-4, atol=1e-6)
    assert not any(block._forward_pre_hooks for block in subject.blocks)


def test_a_compiled_model_shows_its_statistics_too():
    model, inputs = model_and_inputs(fused=True)
    expected = layer_statistics(model, *inputs)
    compile_forward(model, "blocks", "eager")
    for name, values in layer_statistics(model, *inputs).items():
        torch.testing.assert_close(values, expected[name])


@pytest.mark.parametrize("use_rmsnorm", [True, False])
def test_qk_norm_joins_trained_weights_and_keeps_the_scale_of_logits(use_rmsnorm):
    model, inputs = model_and_inputs(use_rmsnorm=use_rmsnorm, hidden_size=64)
    normed = LightningDiT(**{**FORM, "hidden_size": 64, "use_rmsnorm": use_rmsnorm}, use_qknorm=True).eval()
    state, layers = with_qk_norm(model.state_dict(), normed)
    assert layers == 3
    load_strict(normed, state, "x")
    before, after = (layer_statistics(m, *inputs)["attention_logit"] for m in (model, normed))
    assert (after / before).log2().abs().max() < 1, f"logits {before} became {after}"


def test_weights_that_have_the_norm_and_models_that_have_none_are_left_alone():
    normed, _ = model_and_inputs(use_qknorm=True)
    state = normed.state_dict()
    assert with_qk_norm(state, normed) == (state, 0)
    plain, _ = model_and_inputs()
    with pytest.raises(BadInput, match="6 unexpected: blocks.0.attn.q_norm.weight"):
        load_strict(plain, with_qk_norm(state, plain)[0], "x")
