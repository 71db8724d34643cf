"""csrc: how it is built and found, what its host build computes and moves, and what nvcc makes of it.

The host build runs the code of the GPU's threads, index arithmetic and vectors included, and counts its traffic with memory.
"""

import ctypes
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vavae_kernels import AdamWEMA, _extension
from vavae_kernels._extension import BuildError, build, cache_folder, command, library, nvcc, sources
from vavae_kernels.ops import _adamw_ema_compiled
from vavae_kernels.ops._adamw_ema_compiled import CompiledStep, Slot
from vavae_kernels.ops.adamw_ema import adamw_ema_reference, ema_reference
from vavae_kernels.testing.numerics import Error

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
CHUNK, TENSORS = 1 << 14, 448  # kChunk, kTensors of adamw_ema.h; asserted below
GROUP = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, ema_decay=0.99)


class Traffic(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("read", "written", "vectors", "misaligned")]


def found(tool: str) -> bool:
    try:
        command("adamw_ema", tool)
    except BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not found("cpu"), reason="needs a C++ compiler")
needs_nvcc = pytest.mark.skipif(not found("sm_90"), reason="needs nvcc: put CUDA's compiler on PATH, or set CUDA_HOME")


def traffic() -> Traffic:
    """What the host build has moved since the last call."""
    moved = Traffic()
    library("adamw_ema", CPU).vavae_traffic(ctypes.byref(moved))
    return moved


def slot(n: int, dtype=torch.float32, grad=torch.float32, ema=True, bf16=False, offset: int = 0, seed: int = 0) -> Slot:
    """A parameter of `n` elements in the middle of training; every stream begins `offset` elements into its memory."""
    generator = torch.Generator().manual_seed(seed)

    def stream(kind: torch.dtype, scale: float = 1.0, positive: bool = False) -> Tensor:
        values = scale * torch.randn(n + offset, generator=generator, dtype=torch.float64)
        return (values.square() if positive else values).to(kind)[offset:]

    return Slot(
        param=stream(dtype),
        grad=None if grad is None else stream(grad, 0.1),
        exp_avg=stream(torch.float32, 0.1),
        exp_avg_sq=stream(torch.float32, 0.1, positive=True),
        step=torch.tensor(6.0),
        ema=stream(torch.float32) if ema else None,
        bf16=stream(torch.bfloat16) if bf16 else None,
    )


def clone(s: Slot, dtype: torch.dtype | None = None) -> Slot:
    return Slot(*(None if t is None else t.to(dtype or t.dtype, copy=True) for t in s))


def by_reference(slots: list[Slot]) -> None:
    """The same step by the reference, with the bf16 copy by hand."""
    moving = [s for s in slots if s.grad is not None]
    if moving:
        lists = [list(tensors) for tensors in list(zip(*moving))[:5]]
        adamw_ema_reference(*lists, **{name: GROUP[name] for name in ("lr", "betas", "eps", "weight_decay")})
    ema_reference([s.ema for s in slots if s.ema is not None], [s.param for s in slots if s.ema is not None], GROUP["ema_decay"])
    for s in slots:
        if s.bf16 is not None:
            s.bf16.copy_(s.param)


def assert_as_good_as_the_reference(before: list[Slot], after: list[Slot]) -> None:
    """After one step: every stream's error against fp64 is at most twice the reference's and one rounding band."""
    eager, exact = [clone(s) for s in before], [clone(s, torch.float64) for s in before]
    by_reference(eager)
    by_reference(exact)
    for ours, theirs, right in zip(after, eager, exact):
        for name, a, b, c in zip(Slot._fields, ours, theirs, right):
            if a is None or a.numel() == 0:
                continue
            band = torch.finfo(b.dtype).eps * c.abs().max().item()
            error = Error(name, (a.double() - c).abs().max().item(), (b.double() - c).abs().max().item(), band)
            assert error.within, str(error)


@needs_compiler
@pytest.mark.parametrize("grad", [*STORAGE, None])
@pytest.mark.parametrize("dtype", STORAGE)
def test_every_pair_of_dtypes(dtype, grad):
    sizes = (0, 1, 3, 4, 5, 1023, 1024, 2053)
    before = [slot(n, dtype, grad, ema=n != 5, bf16=n != 3, seed=n) for n in sizes]
    after = [clone(s) for s in before]
    CompiledStep(CPU)(after, GROUP, None, None)
    assert_as_good_as_the_reference(before, after)
    assert all(s.step == (6 if grad is None else 7) for s in after)


@needs_compiler
@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 6])
def test_chunks_of_a_tensor(n):
    before = [slot(n, seed=1), slot(3, seed=2), slot(n, grad=None, seed=3)]
    after = [clone(s) for s in before]
    CompiledStep(CPU)(after, GROUP, None, None)
    assert_as_good_as_the_reference(before, after)


@needs_compiler
@pytest.mark.parametrize("count", [1, TENSORS - 1, TENSORS, TENSORS + 1, 2 * TENSORS + 5])
def test_tables_of_many_tensors(count):
    """One table, one full table, and more than fit into one; some without elements, first and last among them."""
    before = [slot(i % 7, seed=i) for i in range(count)]
    after = [clone(s) for s in before]
    CompiledStep(CPU)(after, GROUP, None, None)
    assert_as_good_as_the_reference(before, after)
    assert all(s.step == 7 for s in after)


@needs_compiler
@pytest.mark.parametrize("dtype", STORAGE)
def test_unaligned_memory_gives_the_same_bits(dtype):
    """Views may begin anywhere: then elements go one by one, and nothing is ever read or written where it must not be."""
    n = 1029
    aligned = slot(n, dtype, bf16=True)
    shifted = Slot(*(t if t.ndim == 0 else torch.cat([t.new_full((1,), 7), t, t.new_full((3,), 7)])[1 : n + 1] for t in clone(aligned)))
    step, moved = CompiledStep(CPU), []
    for s in (aligned, shifted):
        traffic()
        step([s], GROUP, None, None)
        moved.append(traffic())
    assert all(torch.equal(a, b) for a, b in zip(aligned, shifted))
    assert moved[0].vectors > 0 and moved[1].vectors == 0 and moved[0].misaligned == moved[1].misaligned == 0
    for t in shifted:
        around = t if t.ndim == 0 else t.as_strided((n + 4,), (1,), 0)
        assert t.ndim == 0 or (around[:1] == 7).all() and (around[-3:] == 7).all()


@needs_compiler
@pytest.mark.parametrize("stream", ["param", "grad", "exp_avg", "exp_avg_sq", "ema", "bf16"])
def test_one_unaligned_stream_is_enough(stream):
    """Each pointer is looked at: a vector through any of them would be refused by a GPU."""
    s = slot(640, bf16=True)
    odd = getattr(s, stream)
    s = s._replace(**{stream: torch.cat([odd.new_zeros(1), odd])[1:]})
    before = clone(s)
    traffic()
    CompiledStep(CPU)([s], GROUP, None, None)
    moved = traffic()
    assert moved.vectors == 0 and moved.misaligned == 0
    assert_as_good_as_the_reference([before], [s])


@needs_compiler
@pytest.mark.parametrize(
    "kind, read, written",
    [
        (dict(), 20, 16),  # 36 bytes a parameter
        (dict(bf16=True), 20, 18),
        (dict(grad=torch.bfloat16, bf16=True), 18, 18),
        (dict(ema=False), 16, 12),
        (dict(dtype=torch.bfloat16, grad=torch.bfloat16), 16, 14),
        (dict(grad=None), 8, 4),
        (dict(grad=None, ema=False, bf16=True), 4, 2),
        (dict(grad=None, ema=False), 0, 0),
    ],
)
@pytest.mark.parametrize("n", [4096, CHUNK + 1024, 773])
def test_bytes_moved(kind, read, written, n):
    """Every stream once in and once out: the model is asserted against each access that the code makes, in vectors of four."""
    step = CompiledStep(CPU)
    traffic()
    step([slot(n, **kind)], GROUP, None, None)
    moved = traffic()
    assert (moved.read, moved.written, moved.misaligned) == (n * read, n * written, 0)
    streams = sum(present for present in (read > 0, kind.get("ema", True), kind.get("bf16", False)))
    assert moved.vectors >= streams * (n // 4)


@needs_compiler
def test_a_step_that_does_not_count_moves_nothing():
    step, s = CompiledStep(CPU), slot(100)
    before = clone(s)
    traffic()
    for value in (1.0, -1.0, float("nan"), float("inf")):
        step([s], GROUP, torch.tensor(value), None)
    assert all(a is None or torch.equal(a, b) for a, b in zip(s, before))
    assert (moved := traffic()).read == moved.written == 0


@needs_compiler
def test_rounding_is_pytorchs():
    """All bf16 and fp16 numbers come back; halfway cases, overflow, subnormals and NaN round as in PyTorch."""
    lib = library("adamw_ema", CPU)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    halves = [every.view(dtype).float() for dtype in (torch.bfloat16, torch.float16)]
    between = [torch.nextafter(h, torch.tensor(sign * torch.inf)) for h in halves for sign in (1, -1)]
    middles = [(h[:-1].double() + h[1:].double()).div(2).float() for h in halves]
    anything = torch.randint(-(2**31), 2**31, (1 << 18,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([*halves, *between, *middles, anything]).contiguous()
    for code, dtype in enumerate(STORAGE):
        y = torch.empty_like(x)
        assert lib.vavae_round(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel()), code) == 0
        expected = x.to(dtype).float()
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(0), expected.nan_to_num(0))
        assert torch.equal(y[~y.isnan()].signbit(), expected[~y.isnan()].signbit())
    assert lib.vavae_round(None, None, ctypes.c_int64(0), 3) == 1  # no such storage type


def test_the_sources_are_found_and_packaged():
    """A checkout uses csrc; a wheel carries it as vavae_kernels/csrc, where `sources` looks first."""
    assert sources() == ROOT / "csrc" or sources().parent.name == "vavae_kernels"
    tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "vavae_kernels.csrc" in settings["packages"] and settings["package-dir"]["vavae_kernels.csrc"] == "csrc"
    patterns = settings["package-data"]["vavae_kernels.csrc"]
    carried = {file for pattern in patterns for file in (ROOT / "csrc").glob(pattern)}
    assert carried == {file for file in (ROOT / "csrc").iterdir() if file.suffix != ".md"}
    header = (ROOT / "csrc" / "adamw_ema.h").read_text()
    assert f"kTensors = {TENSORS};" in header and "kChunk = 1 << 14;" in header and CHUNK == 1 << 14


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vavae_kernels"


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "vavae_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "vavae_kernels"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "t"))
    assert cache_folder() == tmp_path / "t" / "vavae_kernels"


@pytest.fixture
def tiny_sources(tmp_path, monkeypatch) -> Path:
    """A csrc that compiles in no time."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "answer.cpp").write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    monkeypatch.setattr(_extension, "sources", lambda: folder)
    return folder


@needs_compiler
def test_builds_once_and_again_when_a_source_changes(empty_cache, tiny_sources):
    first = build("answer", "cpu")
    written = first.stat().st_mtime_ns
    assert build("answer", "cpu") == first and first.stat().st_mtime_ns == written and ctypes.CDLL(str(first)).answer() == 42
    (tiny_sources / "answer.h").write_text("#define ANSWER 43\n")
    second = build("answer", "cpu")
    assert second != first and ctypes.CDLL(str(second)).answer() == 43
    assert sorted(empty_cache.iterdir()) == sorted([first, second])  # no scratch left behind


@needs_compiler
def test_many_may_build_at_once(empty_cache, tiny_sources, monkeypatch):
    """Ranks that start together: all get a whole library, one file stays."""
    together, answers = threading.Barrier(4), []
    original = _extension._run

    def run(arguments):
        if "-o" in arguments:
            together.wait(timeout=60)  # nobody has finished before all have begun
        return original(arguments)

    monkeypatch.setattr(_extension, "_run", run)
    threads = [threading.Thread(target=lambda: answers.append(build("answer", "cpu"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4 and set(answers) == set(empty_cache.iterdir()) and ctypes.CDLL(str(answers[0])).answer() == 42


@needs_compiler
def test_what_can_go_wrong_is_one_line(empty_cache, tiny_sources, monkeypatch, tmp_path):
    (tiny_sources / "broken.cpp").write_text("int f( {\n")
    with pytest.raises(BuildError, match=r"failed with exit code \d+: .*broken.cpp:1.*error") as error:
        build("broken", "cpu")
    assert "\n" not in str(error.value) and list(empty_cache.iterdir()) == []
    empty_cache.rmdir()
    empty_cache.write_text("a file in the way")
    with pytest.raises(BuildError, match="csrc/answer cannot be written to .*; set TORCH_EXTENSIONS_DIR"):
        build("answer", "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler -g")
    with pytest.raises(BuildError, match="no C.. compiler: CXX=no-such-compiler -g is not on PATH"):
        build("answer", "cpu")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C.. compiler: install g.. or clang.., or set CXX"):
        build("answer", "cpu")


@needs_compiler
def test_cxx_names_the_compiler_with_its_words(empty_cache, tiny_sources, monkeypatch):
    monkeypatch.setenv("CXX", f"{shutil.which('c++') or shutil.which('g++') or shutil.which('clang++')} -DANSWER_IS_TAKEN")
    assert "-DANSWER_IS_TAKEN" in command("answer", "cpu") and ctypes.CDLL(str(build("answer", "cpu"))).answer() == 42


def test_where_nvcc_is_looked_for(monkeypatch, tmp_path):
    for name in ("home", "path"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / name / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    for key in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(key, raising=False)
    assert nvcc() == str(tmp_path / "path" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert nvcc() == str(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(BuildError, match="no nvcc: put CUDA's compiler on PATH, or set CUDA_HOME"):
        nvcc()


REGISTERS = 85  # three thread blocks of 256 on a multiprocessor of 65,536


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Callable[[str], tuple[Path, str]]:
    """target -> csrc/adamw_ema.cu as its machine code, by the flags of the build, and what ptxas says of it."""
    folder = tmp_path_factory.mktemp("cubin")
    return cache(lambda target: cubin(target, folder))


def cubin(target: str, folder: Path) -> tuple[Path, str]:
    arguments = [word for word in command("adamw_ema", target) if word not in ("-shared", "-Xcompiler", "-fPIC")]
    file = folder / f"{target}.cubin"
    done = subprocess.run([*arguments, "-cubin", "-Xptxas", "-v", "-o", str(file)], capture_output=True, text=True, check=False)
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know {target}")
    assert done.returncode == 0, done.stderr
    return file, done.stderr


@needs_nvcc
@pytest.mark.parametrize("target", ["sm_90a", *(pytest.param(target, marks=pytest.mark.exhaustive) for target in ("sm_80", "sm_100", "sm_120"))])
def test_nvcc_compiles_without_stack_or_spills(target, compiled):
    _, report = compiled(target)
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(stacks) == len(registers) == 10  # nine pairs of storage types, and the count of steps
    assert set(stacks) == {("0", "0", "0")} and max(registers) <= REGISTERS, report
    assert "warning" not in report.lower(), report


@needs_nvcc
def test_fp32_moves_in_16_bytes(compiled):
    """The machine code of the fp32 kernel: five streams loaded by 128-bit instructions and nothing through generic or local memory."""
    triton = pytest.importorskip("triton", reason="needs the disassembler that Triton carries")
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not nvdisasm.is_file():
        pytest.skip("needs the disassembler that Triton carries")
    file, _ = compiled("sm_90a")
    code = subprocess.run([nvdisasm, "-c", file], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n\.text\.(\S+):\n", code)
    kernels = dict(zip(parts[1::2], parts[2::2]))
    fp32 = next(text for name, text in kernels.items() if "kernelIffE" in name)
    loads, stores = (re.findall(rf"\b{kind}G\.E(?:\.(\d+|U16))?\b", fp32) for kind in ("LD", "ST"))
    # A pair of vectors and a last one for rows with a gradient, the same for rows without: 3 (p g m v ema) + 3 (p ema).
    assert loads.count("128") >= 21 and "64" not in loads and "U16" not in loads
    assert stores.count("128") >= 15 and stores.count("64") >= 6  # p m v ema; the bf16 copy in 8 bytes
    for text in kernels.values():
        assert not re.search(r"\s(LDL|STL|LD|ST)(\.[A-Z0-9]+)* ", text)


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_the_device_library_loads_and_says_what_is_missing(empty_cache):
    """Compiled, linked and called through the interface that Python uses; the answer is CUDA's error, not a crash."""
    lib = ctypes.CDLL(str(build("adamw_ema", "sm_90")))
    lib.vavae_error.restype = ctypes.c_char_p
    assert b"driver" in lib.vavae_error(lib.vavae_adamw_ema_prepare(0)).lower()
    exported = {name for name in ("vavae_adamw_ema", "vavae_adamw_ema_prepare", "vavae_error") if hasattr(lib, name)}
    assert len(exported) == 3


# As much of CUDA as adamw_ema.cu uses, on the CPU: a launch runs the kernel for every thread, one after the other, and is written down.
CUDA_OF_THE_TESTS = """
#pragma once
#include <cstddef>
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInsufficientDriver = 35 };
using cudaStream_t = struct Stream*;
struct cudaFuncAttributes {};
struct dim3 { unsigned x, y, z; explicit dim3(unsigned x) : x(x), y(1), z(1) {} };
inline dim3 blockIdx(0), threadIdx(0);
inline int driver = 13000, device = -1, loaded = 0;
inline cudaError_t cudaDriverGetVersion(int* version) { *version = driver; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int index) { device = index; return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { loaded++; return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorInsufficientDriver ? "driver too old" : "some error"; }
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 threads, void** arguments, size_t, cudaStream_t stream);
"""
LAUNCHES = """
#include "adamw_ema.cu"
#include <vector>
static std::vector<long long> launches;
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 threads, void** arguments, size_t shared, cudaStream_t stream) {
  launches.insert(launches.end(), {grid.x, threads.x, device, (long long)stream});
  if (grid.y != 1 || grid.z != 1 || threads.y != 1 || threads.z != 1 || shared != 0) return cudaErrorInvalidValue;
  const auto run = reinterpret_cast<void (*)(AdamwTable)>(const_cast<void*>(kernel));
  for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < threads.x; threadIdx.x++) run(*static_cast<AdamwTable*>(arguments[0]));
  return cudaSuccess;
}
extern "C" long long* recorded(long long* count) { *count = launches.size() / 4; return launches.data(); }
extern "C" int set_driver(int version) { driver = version; return loaded; }
"""


@pytest.fixture(scope="module")
def cuda_of_the_tests(tmp_path_factory) -> Path:
    """csrc/adamw_ema.cu as a C++ program."""
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "cuda_runtime.h").write_text(CUDA_OF_THE_TESTS)
    (folder / "launches.cpp").write_text(LAUNCHES)
    arguments = [*command("adamw_ema", "cpu")[:-1], f"-I{folder}", f"-I{sources()}", str(folder / "launches.cpp"), "-o", str(folder / "cuda.so")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "cuda.so"


@needs_compiler
def test_the_device_source_as_it_launches(cuda_of_the_tests, monkeypatch, tmp_path):
    """Device 3, the current stream, one launch a table and one that counts: the same bits as the host build."""
    lib = ctypes.CDLL(str(shutil.copy(cuda_of_the_tests, tmp_path)))
    monkeypatch.setattr(_adamw_ema_compiled, "library", lambda name, device: lib if device.type == "cuda" else library(name, device))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0x1234))
    step = CompiledStep(torch.device("cuda", 3))
    assert lib.set_driver(13000) == 10  # every kernel was loaded

    kinds = [(p, g) for p in STORAGE for g in (*STORAGE, None)]
    some = [slot(n, p, g, seed=n) for n, (p, g) in enumerate(kinds)] + [slot(CHUNK + 5), slot(0)]
    many = [slot(i % 3, seed=i) for i in range(TENSORS + 1)]
    for slots in (some, many, [slot(0)]):
        twins = [clone(s) for s in slots]
        step(slots, GROUP, None, torch.tensor(3.0))
        CompiledStep(CPU)(twins, GROUP, None, torch.tensor(3.0))
        assert all(a is None or torch.equal(a, b) for s, t in zip(slots, twins) for a, b in zip(s, t))

    count = ctypes.c_longlong()
    lib.recorded.restype = ctypes.POINTER(ctypes.c_longlong)
    record = lib.recorded(ctypes.byref(count))
    launches = [tuple(record[4 * i : 4 * i + 4]) for i in range(count.value)]
    assert all(launch[1:] == (256, 3, 0x1234) for launch in launches)
    blocks = [launch[0] for launch in launches]
    # Nine pairs of dtypes. fp32, fp32 comes first, with rows of 0 and 3 elements (the latter without gradient), CHUNK + 5 and 0.
    assert blocks[:2] == [0 + 1 + 2 + 0, 1] and len(blocks[:18]) == 18
    # Two tables: as many blocks as rows with elements, then 448 steps in two blocks; one row and its step. Then a step alone.
    assert blocks[18:] == [sum(i % 3 > 0 for i in range(TENSORS)), 2, 1, 1, 1]


@needs_compiler
def test_a_driver_that_is_too_old_is_no_kernel(cuda_of_the_tests, monkeypatch, tmp_path):
    lib = ctypes.CDLL(str(shutil.copy(cuda_of_the_tests, tmp_path)))
    monkeypatch.setattr(_adamw_ema_compiled, "library", lambda name, device: lib)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    lib.set_driver(12000)
    with pytest.raises(BuildError, match="the kernel cannot be loaded on cuda:0: driver too old"):
        CompiledStep(torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@needs_compiler
@pytest.mark.parametrize("grad", [*STORAGE, None])
@pytest.mark.parametrize("dtype", STORAGE)
def test_the_gpu_gives_the_bits_of_the_host_build(dtype, grad):
    gpu = torch.device("cuda", torch.cuda.current_device())
    sizes = (0, 1, 5, 4096, 3 * CHUNK + 7)
    host = [slot(n, dtype, grad, bf16=n % 2 == 0, seed=n) for n in sizes]

    def on_gpu(t: Tensor | None, offset: int) -> Tensor | None:
        return t if t is None else torch.cat([t.new_zeros(offset), t.flatten()]).to(gpu)[offset:].view(t.shape)

    device = [Slot(*(on_gpu(t, offset=n % 3) for t in s)) for n, s in zip(sizes, host)]
    for value in (0.0, 1.0, 0.0):
        CompiledStep(CPU)(host, GROUP, torch.tensor(value), torch.tensor(3.0))
        CompiledStep(gpu)(device, GROUP, torch.tensor(value, device=gpu), torch.tensor(3.0, device=gpu))
    for a, b in zip(host, device):
        assert all(x is None or torch.equal(x, y.cpu()) for x, y in zip(a, b))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_in_a_cuda_graph():
    """Replays follow found_inf, lr and gradients in place; tables need no memory that could be freed. No step waits for the host."""
    results = []
    for captured in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator).cuda()) for n in (5, 4096, 70000)]
        lr, found_inf = torch.full((), 1e-2, device="cuda"), torch.zeros((), device="cuda")
        optimizer = AdamWEMA(params, lr=lr, impl="triton")
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(found_inf=found_inf)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step(found_inf=found_inf)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(6):
                for i, p in enumerate(params):
                    p.grad.fill_(0.1 * step + i)
                lr.fill_(1e-2 / (step + 1))
                found_inf.fill_(float(step == 3))
                graph.replay() if captured else optimizer.step(found_inf=found_inf)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([t.cpu() for p in params for t in (p.detach(), *optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert results[0][1].item() == 6  # 1 before, 6 in the loop, one of them skipped
