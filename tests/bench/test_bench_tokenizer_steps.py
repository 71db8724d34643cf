"""The ways that the tokenizer's benchmarks compare do the same, and have names of their own."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from benchmarks import steps, tokenizer_steps
from benchmarks.tokenizer_steps import ShuffledUpsample
from vavae_fast.models.autoencoder_layers import FusedUpsample, Upsample


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 2)])
def test_the_forms_of_doubling_are_one_function(size):
    x = torch.randn(2, 6, *size).double().contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = Upsample(6).double().state_dict()
    found = []
    for form in (Upsample, ShuffledUpsample, FusedUpsample):
        module = form(6).double().to(memory_format=torch.channels_last)
        module.load_state_dict(weights)
        y = module(x)
        v = torch.arange(y.numel()).double().sin().view(y.shape)
        found.append((y, *torch.autograd.grad(y, [x, *module.parameters()], v)))
    for other in found[1:]:
        for value, expected in zip(other, found[0]):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_ways_are_known():
    assert {arm for step in tokenizer_steps.STEPS for arm in step.arms} <= set(tokenizer_steps.BASELINES)


def test_encoding_is_compared_on_the_same_weights_and_images():
    step = steps.rehearsal(next(step for step in tokenizer_steps.STEPS if step.what == "encode"))
    makers = step.makers(torch.device("cpu"), steps.REHEARSAL)
    exact, *others = (makers[arm]() for arm in ("plain fp32", "naive bf16", "fused"))
    for call in others:
        torch.testing.assert_close(call().float(), exact(), rtol=0.1, atol=0.1)
