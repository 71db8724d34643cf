"""Throughput of what a run spends its time on: the LightningDiT block, plain, fused and compiled, and the latent stream.

pytest benchmarks/ prints the times; --benchmark-compare guards them against a saved run on the same machine.
"""

import numpy as np
import pytest
import torch

from vavae_fast.data import LatentWriter, open_latents
from vavae_fast.data.streams import LatentStream, Share
from vavae_fast.models import create_lightningdit

BATCH = 16


def step_of(model, device):
    x = torch.randn(BATCH, 32, 16, 16, device=device)
    t, y = torch.rand(BATCH, device=device), torch.randint(1000, (BATCH,), device=device)

    def step():
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            model(x, t, y).square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


@pytest.mark.parametrize("path", ["plain", "fused", "compiled"])
def test_lightningdit_forward_backward(benchmark, device, path):
    """Two blocks of S/1 on 16 x 16 latents. The compiled one is the baseline that a fused operator has to beat."""
    model = create_lightningdit("custom", hidden_size=384, depth=2, num_heads=6, patch_size=1, input_size=16, in_channels=32, use_swiglu=True,
                                use_rope=True, use_rmsnorm=True, fused=path == "fused").to(device)  # fmt: skip
    step = step_of(torch.compile(model, dynamic=False) if path == "compiled" else model, device)
    benchmark.extra_info.update(batch=BATCH, device=str(device))
    benchmark.pedantic(step, rounds=5, iterations=1, warmup_rounds=2)


def test_latent_stream(benchmark, tmp_path):
    """Batches of 256 latents of 32 x 16 x 16, shuffled, mirrored and normalised, from warm files."""
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((4096, 32, 16, 16), np.float32))
    writer = LatentWriter(tmp_path / "latents", (32, 16, 16), len(rows), shard_size=1024)
    writer.append(rows, rows.flip(-1), torch.arange(len(rows)) % 1000)
    writer.close()
    batches = LatentStream(open_latents(tmp_path / "latents"), 0, Share(256)).batches()
    benchmark.extra_info.update(samples=256)
    benchmark.pedantic(lambda: next(batches), rounds=40, iterations=1, warmup_rounds=5)
    batches.close()
