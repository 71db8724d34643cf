"""Guards that mean something on any machine: what operators launch, touch and allocate, what the compiler makes of them, csrc, the loader."""

import ctypes
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks import optimizers
from vavae_fast.data import LatentWriter, open_latents
from vavae_fast.data.streams import LatentStream, Share
from vavae_kernels._compat import INTERPRETED, TRITON_VERSION
from vavae_kernels._extension import BuildError, library
from vavae_kernels.ops._adamw_ema_compiled import CompiledStep, Slot
from vavae_kernels.testing import offline
from vavae_kernels.testing.spec import DTYPES, specs
from vavae_kernels.testing.traffic import forward_and_backward

SPECS = specs()
each_operator = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
CPU = torch.device("cpu")
BATCH = 256


@each_operator
def test_counts(spec, guards, record_property):
    """Launches, bytes and allocations of the published model's call, at its real size on fake tensors."""
    guard = guards.counted[spec.name]
    shape, dtypes, variant = next(iter(spec.real)), spec.dtypes[0], spec.variants[0]
    model = spec.bytes(spec.real[shape], DTYPES[dtypes], variant)
    faults = []
    for pass_, traffic, least, launches, megabytes in zip(
        ("forward", "backward"), forward_and_backward(spec, shape, dtypes, variant), model, guard.launches, guard.allocated
    ):
        found = dict(
            launches=(len(traffic.launches) + len(traffic.operations), launches),
            bytes=(traffic.bytes / least if least else 0.0, guard.bytes),
            allocated=(traffic.allocated / spec.real[shape]["B"] / 1e6, megabytes),
        )
        record_property(pass_, {what: value for what, (value, _) in found.items()})
        faults += [f"{spec.name} {pass_}: {what} {value:.4g}, the guard is {most:g}" for what, (value, most) in found.items() if value > most]
    assert not faults, "\n".join(faults)


@pytest.mark.skipif(TRITON_VERSION is None or INTERPRETED, reason="needs Triton, and TRITON_INTERPRET unset")
@each_operator
def test_kernels_compile(spec):
    """Every kernel that the published model launches compiles for sm_90 within its registers, without stack and spills."""
    kernels = list(offline.compiled(spec, (90,), cases="first"))
    faults = [fault for kernel in kernels for fault in kernel.faults(spec.registers)]
    assert kernels, f"{spec.name} launches no kernel"
    assert not faults, "\n".join(faults)


@pytest.mark.benchmark(group="host")
def test_csrc_host_build(benchmark, guards):
    """Compiles, steps as torch's fused AdamW and a foreach EMA do, and moves the bytes of the model."""
    try:
        step = CompiledStep(CPU)
    except BuildError as reason:
        pytest.skip(f"needs a C++ compiler: {reason}")
    parameters = optimizers.draw([(257, 1024), (1024,), (7, 3), (1,)], CPU)
    twins = [p.detach().clone().requires_grad_() for p in parameters]
    for twin, p in zip(twins, parameters):
        twin.grad = p.grad
    zeros = lambda p: torch.zeros_like(p, requires_grad=False)
    slots = [Slot(p.detach(), p.grad, zeros(p), zeros(p), torch.tensor(0.0), p.detach().clone(), None) for p in parameters]
    group = dict(optimizers.HYPER, eps=1e-8, ema_decay=optimizers.DECAY)
    theirs = optimizers.fused_and_foreach(twins)
    _traffic()
    step(slots, group, None, None)
    theirs()
    moved = _traffic() / sum(p.numel() for p in parameters)
    assert moved <= guards.host.adamw_bytes, f"{moved:.3f} bytes a parameter, the guard is {guards.host.adamw_bytes:g}"
    for p, twin in zip(parameters, twins):
        torch.testing.assert_close(p.detach(), twin.detach(), rtol=1e-6, atol=1e-8)
    benchmark.pedantic(lambda: step(slots, group, None, None), rounds=10)


def _traffic() -> int:
    """Bytes that the host build has read and written since the last call."""
    counts = (ctypes.c_int64 * 4)()  # read, written, vectors, misaligned
    library("adamw_ema", CPU).vavae_traffic(ctypes.byref(counts))
    return counts[0] + counts[1]


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """4,096 latents of 32 x 16 x 16 in four shards, with their mirror images."""
    folder = tmp_path_factory.mktemp("latents")
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((4096, 32, 16, 16), np.float32))
    writer = LatentWriter(folder, (32, 16, 16), len(rows), shard_size=1024)
    writer.append(rows, rows.flip(-1), torch.arange(len(rows)) % 1000)
    writer.close()
    return open_latents(folder)


@pytest.mark.benchmark(group="host")
def test_latent_stream(benchmark, latents, guards):
    """Batches of 256 latents, shuffled, mirrored and normalised, from warm files: against one read a sample, as the public data set does."""
    stream = LatentStream(latents, 0, Share(BATCH)).batches()
    plain = _plain_batches(latents)
    try:
        ratios = [_seconds(plain) / _seconds(stream) for _ in range(5)]
        benchmark.extra_info.update(samples=BATCH, over_plain=ratios)
        benchmark.pedantic(lambda: next(stream), rounds=20, warmup_rounds=6)
    finally:
        stream.close()
    ratio = sorted(ratios)[len(ratios) // 2]
    assert ratio >= guards.host.latents_over_plain, f"{ratio:.2f} x plain reading, the guard is {guards.host.latents_over_plain:g}"


def _seconds(batches) -> float:
    """Of eight batches, once those are gone that were read ahead while something else was timed."""
    for _ in range(6):
        next(batches)
    began = time.perf_counter()
    for _ in range(8):
        next(batches)
    return time.perf_counter() - began


def _plain_batches(latents):
    """The same batches in the plain way: files kept open, a slice a sample, stacked and normalised."""
    files = [safe_open(path, framework="pt") for path in sorted(latents.folder.glob("*.safetensors"))]
    both = [(file.get_slice("latents"), file.get_slice("latents_flip")) for file in files]
    generator = torch.Generator().manual_seed(0)

    def sample(i: int) -> Tensor:
        mirrored = int(torch.rand((), generator=generator) < 0.5)
        return (both[i // 1024][mirrored][i % 1024 : i % 1024 + 1] - latents.mean) / latents.std

    while True:
        order = torch.randperm(len(latents), generator=generator)
        for batch in order.split(BATCH):
            yield torch.cat([sample(i) for i in batch.tolist()]), latents.labels[batch]
