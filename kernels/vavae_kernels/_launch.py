"""The one way a Triton kernel starts: `launch`. What watches launches (tests, the bench, offline compilation) watches here.

A launcher asks `choose` for its launch configuration: the one tuned for this GPU (`configs/<device>.json`), else the
default that the operator derives from its shape.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Config:
    """tile: the operator's own tile sizes, named in its file; warps of 32 threads a program; stages of the load pipeline."""

    tile: tuple[int, ...]
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: `arguments` by name, constexprs apart."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constexprs: dict[str, Any]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def bytes(self) -> int:
        """Elements of every tensor given, once each, in bytes. A broadcast dimension (stride 0) is one element."""
        tensors = {(id(t.untyped_storage()), t.storage_offset(), tuple(t.shape), t.stride()): t for t in self.tensors()}
        return sum(t.element_size() * math.prod(n for n, s in zip(t.shape, t.stride()) if s != 0) for t in tensors.values())

    def tensors(self) -> list[Tensor]:
        return [t for t in self.arguments.values() if isinstance(t, Tensor)]


_watcher: Callable[[Launch], None] | None = None
_dry = False
_target = 90
_chosen: dict[str, Config] = {}
_asked: list[tuple[str, str]] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, **constexprs: Any) -> None:
    """Start `kernel` on the device of its first tensor, unless the grid is empty. FP fusion is on whatever Triton's default."""
    if 0 in grid:
        return
    if _watcher is not None:
        names = [name for name in kernel.arg_names if name not in constexprs]
        _watcher(Launch(kernel, grid, dict(zip(names, arguments, strict=True)), constexprs, config.warps, config.stages))
    if _dry:
        return
    first = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device_of(first):
        kernel[grid](*arguments, **constexprs, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True)


def recording() -> bool:
    """Whether launches are only recorded: then any device will do, and nothing is computed."""
    return _dry


@contextmanager
def watched(watcher: Callable[[Launch], None], run: bool = True) -> Iterator[None]:
    """Inside, every launch is told to `watcher` first; with run=False that is all that happens to it."""
    global _watcher, _dry
    before = _watcher, _dry
    _watcher, _dry = watcher, not run
    try:
        yield
    finally:
        _watcher, _dry = before


def choose(kernel: str, key: tuple[int | torch.dtype, ...], default: Config, device: torch.device) -> Config:
    """The launch configuration of `kernel` for a shape and dtype `key`: forced, tuned for this GPU, else `default`."""
    if _asked is not None:
        _asked.append((kernel, describe(key)))
    if kernel in _chosen:
        return _chosen[kernel]
    if device.type != "cuda":
        return default
    return _tuned(torch.cuda.get_device_name(device)).get(f"{kernel} {describe(key)}", default)


@contextmanager
def forced(configs: Mapping[str, Config]) -> Iterator[None]:
    """Inside, the kernels named run with these configurations: how the tuner tries them."""
    before = dict(_chosen)
    _chosen.update(configs)
    try:
        yield
    finally:
        _chosen.clear()
        _chosen.update(before)


@contextmanager
def questions() -> Iterator[list[tuple[str, str]]]:
    """Inside, every call of `choose` is noted: the kernel, and its key as the JSON files write it."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


def describe(key: tuple[int | torch.dtype, ...]) -> str:
    """The key as the JSON files write it: "1152 float32 bfloat16"."""
    return " ".join(str(part).removeprefix("torch.") for part in key)


@cache
def _tuned(device_name: str) -> dict[str, Config]:
    path = CONFIGS / f"{device_name.replace(' ', '_')}.json"
    if not path.is_file():
        return {}
    return {name: Config(tuple(c["tile"]), c["warps"], c["stages"]) for name, c in json.loads(path.read_text()).items()}


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 132, an H100's, where there is none to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(device: torch.device) -> int:
    """90 for sm_90. Where there is no GPU to ask, that of `compiling_for`, else 90."""
    return _capability(device) if device.type == "cuda" else _target


@contextmanager
def compiling_for(target: int) -> Iterator[None]:
    """Inside, launchers without a GPU choose as they would on sm_<target>: how offline compilation sees what ships there."""
    global _target
    before, _target = _target, target
    try:
        yield
    finally:
        _target = before


def row_parts(width: int) -> tuple[int, ...]:
    """`width` as tiles of powers of two, largest first: 1152 = 1024 + 128, 1792 = 1024 + 512 + 256, 72 = 64 + 8.

    Triton's tiles are powers of two; one tile of 2048 would leave 44 % of the lanes idle at 1152. What is left is rounded up,
    and masked, once that wastes at most an eighth of the row.
    """
    parts: list[int] = []
    left = width
    while left > 0:
        rounded_up = 1 << (left - 1).bit_length()
        fits = left <= 16 or 8 * (rounded_up - left) <= width
        parts.append(rounded_up if fits else rounded_up // 2)
        left -= parts[-1]
    return tuple(parts)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def inner_contiguous(x: Tensor) -> Tensor:
    """x itself where its last axis is dense, else a dense copy: kernels read rows through strides, not elements."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def power_of_two(x: float) -> int:
    """The power of two nearest to x, 1 or more."""
    return 1 << round(math.log2(max(x, 1.0)))
