"""The predicted cost of a tokenizer's step: what PyTorch's own allocator and counter find in a real one."""

import itertools

import pytest
from tokenizer_states import batch, state
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vavae_fast.training.one_pass import one_pass_gradients
from vavae_fast.training.tokenizer import plain_gradients, tokenizer_step
from vavae_fast.training.tokenizer_cost import _held_bytes, step_cost


class Flops(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def measured(s, batches):
    """Bytes held before and at the peak of one step, by the allocator: the running sum of every allocation and release."""
    held = _held_bytes(s)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        tokenizer_step(s, 2, batches)
    events = sorted((e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return held, max(itertools.accumulate(e.nbytes() for e in events))


@pytest.mark.parametrize("gradients, accumulated, vf", [(plain_gradients, 1, True), (one_pass_gradients, 2, True), (one_pass_gradients, 1, False)])
def test_a_step_takes_the_bytes_that_are_predicted(gradients, accumulated, vf):
    """Within 2 %, states and activations alike, with the GAN at work however late it starts; frozen networks without memory of their own."""
    s = state(gradients=gradients, vf=vf)
    batches = [batch(4, 4 * number) for number in range(accumulated)]
    tokenizer_step(s, 1, batches)  # makes the optimizers' moments
    held, peak = measured(s, batches)
    pretended = state(gradients=gradients, vf=vf, disc_start=10**6)
    for network in (pretended.foundation, pretended.perceptual):
        if network is not None:
            network.to("meta")
    cost = step_cost(pretended, 16, 4, accumulated > 1)
    assert cost.peak_bytes == pytest.approx(held + peak, rel=0.02) and peak > held
    with Flops() as counted:
        tokenizer_step(s, 3, batches)
    assert cost.flops == pytest.approx(counted.total / accumulated, rel=0.001)


def test_memory_and_operations_grow_with_the_batch():
    small, large = (step_cost(state(gradients=one_pass_gradients), 16, count, False) for count in (2, 8))
    assert small.peak_bytes < large.peak_bytes < 4 * small.peak_bytes and large.flops == 4 * small.flops
