"""Compiled by region: one graph for all blocks, whatever runs inside them, with the gradients of the model as it is."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vavae_fast.models import LightningDiT
from vavae_fast.models.compilation import compile_forward, compile_in_training
from vavae_fast.training.averaged import evaluating

DEPTH = 10  # more blocks than the compiler would make graphs of before it gives up


def model_and_inputs(fused, mode, depth=DEPTH):
    torch.manual_seed(0)
    model = LightningDiT(input_size=2, patch_size=1, in_channels=4, hidden_size=32, depth=depth, num_heads=4, num_classes=5,
                         use_swiglu=True, use_rope=True, use_rmsnorm=True, fused=fused, use_checkpoint=mode).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model, (torch.randn(2, 4, 2, 2), torch.rand(2), torch.arange(2))


def gradients(model, inputs):
    model.zero_grad()
    model(*inputs).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [False, True, "selective"])
@pytest.mark.parametrize("fused", [False, True])
def test_one_graph_serves_all_blocks(fused, mode):
    """Two in the fused form, whose first block has no gate before it."""
    model, inputs = model_and_inputs(fused, mode)
    expected, keys = gradients(model, inputs), list(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    compile_forward(model, "blocks", counter)
    for name, grad in gradients(model, inputs).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-7)
    assert counter.frame_count == (2 if fused else 1)
    assert not torch._dynamo.utils.counters["graph_break"] and list(model.state_dict()) == keys


def test_the_whole_model_is_one_graph_and_none_is_none():
    model, inputs = model_and_inputs(True, False, depth=2)
    expected = model(*inputs)
    counter = CompileCounterWithBackend("eager")
    compile_forward(model, "none", counter)
    model(*inputs)
    assert counter.frame_count == 0
    compile_forward(model, "model", counter)
    torch.testing.assert_close(model(*inputs), expected)
    assert counter.frame_count == 1


def test_too_many_shapes_are_an_error_and_not_a_slow_run():
    model, (x, t, y) = model_and_inputs(False, False, depth=1)
    compile_forward(model, "blocks", "eager")
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for count in range(1, 14):
            model(x[:1].expand(count, -1, -1, -1), t[:1].expand(count), y[:1].expand(count))


def test_what_looks_at_a_model_in_training_makes_no_graphs():
    """Held-out losses, grids and FIDs come in many batch sizes; the graph of training is still there afterwards."""
    model, (x, t, y) = model_and_inputs(True, False, depth=2)
    counter = CompileCounterWithBackend("eager")
    compile_forward(model, "blocks", counter)
    model.train()
    model(x, t, y)
    made = counter.frame_count
    for count in range(1, 14):
        with evaluating(model):
            model(x[:1].expand(count, -1, -1, -1), t[:1].expand(count), y[:1].expand(count))
    model(x, t, y)
    assert counter.frame_count == made == 2


def test_a_frozen_judge_is_compiled_for_the_calls_that_are_differentiated():
    """Others come in many batch sizes. Weights want no gradient, so the graph holds none of theirs."""
    from vavae_fast.models.standins import StandInPerceptual

    torch.manual_seed(0)
    judge = StandInPerceptual(widths=(8, 8)).requires_grad_(False).eval()
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8, requires_grad=True)
    expected = torch.autograd.grad(judge(x, y).sum(), [y])[0]
    counter = CompileCounterWithBackend("aot_eager")
    compile_in_training(judge, counter)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(judge(x, y).sum(), [y])[0], expected)
    with torch.no_grad():
        for count in range(1, 14):
            judge(x[:1].expand(count, -1, -1, -1), x[:1].expand(count, -1, -1, -1))
    assert counter.frame_count == 1
