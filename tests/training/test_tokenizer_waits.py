"""A tokenizer's step never waits for the device, nor does what brings it its images."""

from contextlib import nullcontext

import pytest
import torch
from tokenizer_states import SEED, batch, state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vavae_fast.data.images import ImageBatch, open_images
from vavae_fast.data.streams import ImageStream, Share
from vavae_fast.distributed import World
from vavae_fast.training.guard import Guard
from vavae_fast.training.one_pass import one_pass_gradients
from vavae_fast.training.tokenizer import plain_gradients, tokenizer_step

BOTH = pytest.mark.parametrize("formulation", [plain_gradients, one_pass_gradients])


class NoHostSync(TorchDispatchMode):
    """No value is asked for, and nothing is copied from one device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert func.name().split(".")[0] not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"), func.name()
        devices = {t.device for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        assert len(devices) == 1 or "copy" not in func.name(), func.name()
        return result


@BOTH
def test_a_step_never_waits_for_the_device(formulation):
    s = state(max_grad_norm=1.0, gradients=formulation)
    tokenizer_step(s, 0, [batch()])
    with NoHostSync():
        values = tokenizer_step(s, 1, [batch(2, 4), batch(2, 6)])
    assert all(v.shape == () and not v.requires_grad for v in values.values())


@BOTH
def test_nothing_is_copied_to_another_device(formulation, monkeypatch):
    """Which would wait for it. The device has no values: where things are made is all that counts. With the discriminator's first step."""
    meta = torch.device("meta")
    s = state(disc_start=3, gradients=formulation, world=World(0, 1, meta), guard=Guard(meta, 10))
    for network in (s.autoencoder, s.projection, s.discriminator, s.foundation, s.perceptual):
        network.to(meta)
    for optimizer in (s.optimizer, s.optimizer_disc):
        monkeypatch.setattr(optimizer, "step", lambda: None)  # Adam has no form for this device, nor has autocast
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())
    b = batch()
    there = ImageBatch(b.pixels.to(meta), b.labels, b.index.to(meta))
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: pytest.fail("torch.tensor copies from the CPU, unseen by PyTorch's dispatch"))
    with NoHostSync():
        tokenizer_step(s, 1, [there])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BOTH
def test_on_a_gpu_a_step_never_waits_for_the_device_either(formulation, tmp_path):
    """PyTorch itself raises at whatever synchronises, in making a batch of what a stream has read too."""
    gpu = torch.device("cuda", 0)
    s = state(disc_start=3, gradients=formulation, world=World(0, 1, gpu), guard=Guard(gpu, 10), max_grad_norm=1.0, bf16=True)
    for network in (s.autoencoder, s.projection, s.discriminator, s.foundation, s.perceptual):
        network.to(gpu)
    images = open_images("builtin:digits", size=16)
    images.device = gpu
    batches = ImageStream(images, SEED, Share(8, micro_batch=4)).batches()
    tokenizer_step(s, 0, [next(batches), next(batches)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2):
            tokenizer_step(s, step, [next(batches), next(batches)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
        batches.close()
