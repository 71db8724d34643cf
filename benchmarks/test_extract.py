"""Extraction's pipeline on any machine: reading, encoding and writing overlap, and the thread that encodes spends little on writing.

What the encoder itself does in a second is a matter of the GPU, and measured there.
"""

import time

import pytest
import torch
from torch import nn

from vavae_fast.commands.extract import ExtractPlan, run
from vavae_fast.data import LatentWriter, open_images, open_latents
from vavae_fast.data.shards import ShardWriter
from vavae_fast.models.autoencoder import DiagonalGaussian

BATCH, SECONDS = 64, 0.05  # what reading, encoding and writing a batch take, each
MOST = 0.67  # of the three one after the other: two of them at a time come to more, with what is not asleep; all three to 0.33 and more


class SlowTokenizer(nn.Module):
    """Sleeps, as a host does that waits for a GPU."""

    def encode(self, x: torch.Tensor) -> DiagonalGaussian:
        time.sleep(SECONDS / 2)  # and again for the mirror image
        return DiagonalGaussian(x.new_zeros(len(x), 8, 4, 4))


@pytest.mark.benchmark(group="host")
def test_reading_encoding_and_writing_overlap(benchmark, tmp_path, monkeypatch):
    images = open_images("builtin:digits", size=32)
    read, append = images.read, ShardWriter.append

    def slow_read(indices, *more):
        time.sleep(SECONDS * len(indices) / BATCH)
        return read(indices, *more)

    def slow_append(shard, block):
        time.sleep(SECONDS * len(block["labels"]) / BATCH)
        append(shard, block)

    monkeypatch.setattr(images, "read", slow_read)
    monkeypatch.setattr(ShardWriter, "append", slow_append)

    def extraction(folder):
        writer = LatentWriter(folder, (4, 4, 4), len(images), shard_size=1000)
        run(ExtractPlan(images, SlowTokenizer(), writer, "sample", seed=0, batch=BATCH, precision="fp32", processes=1))

    began = time.perf_counter()
    benchmark.pedantic(extraction, args=(tmp_path / "latents",), rounds=1)
    seconds, serial = time.perf_counter() - began, 3 * SECONDS * len(images) / BATCH
    benchmark.extra_info.update(over_serial=seconds / serial)
    assert len(open_latents(tmp_path / "latents")) == len(images)
    assert seconds < MOST * serial, f"{seconds:.2f} s, one after the other {serial:.2f} s"


@pytest.mark.benchmark(group="host")
def test_writer(benchmark, tmp_path):
    """2,048 latents of 32 x 16 x 16 in two shards: all of it, and what of it the thread that encodes waits for."""
    rows, labels = torch.randn(64, 32, 16, 16), torch.zeros(64)
    mirrored = rows.flip(-1).contiguous()
    waited = []

    def written(folder):
        writer = LatentWriter(folder, (32, 16, 16), 2048, shard_size=1024)
        began = time.perf_counter()
        for _ in range(32):
            writer.append(rows, mirrored, labels)
        waited.append(time.perf_counter() - began)
        writer.close()

    folders = iter(range(3))
    benchmark.pedantic(written, setup=lambda: ((tmp_path / str(next(folders)),), {}), rounds=3)
    benchmark.extra_info.update(samples=2048, megabytes=2048 * (2 * rows[0].nbytes + 8) / 1e6, appended_seconds=min(waited))
    assert min(waited) < benchmark.stats.stats.min, "appending is part of writing"
