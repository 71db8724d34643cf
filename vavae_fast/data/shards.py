"""Latent shards on disk: safetensors files with `latents`, `latents_flip` (N, C, H, W) and `labels` (N,).

The header is read and written by hand: reading 8 bytes and a little JSON opens ImageNet's shards in milliseconds, and our
own data begin on a 4 KiB border (padding with spaces is part of the format). Payloads are never touched here, except
labels. Ours carry, in `__metadata__`, what made them and the exact sums that the statistics are made of.
"""

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vavae_fast.errors import BadInput

KEYS = ("latents", "latents_flip", "labels")
STATISTICS = "latents_stats.pt"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
OURS = "vavae_fast"  # the key of our JSON in __metadata__
_LABELS = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4")}
_ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
_PAGE = 4096
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Shard:
    """One checked file: where its tensors begin, and its facts. `identity` tells whether the file was changed since."""

    path: Path
    rows: int
    shape: tuple[int, int, int]
    dtype: torch.dtype
    offsets: tuple[int, int]  # of latents and latents_flip, from the start of the file
    label_offset: int
    label_dtype: np.dtype
    identity: tuple[int, int]  # size, mtime in ns
    ours: dict[str, Any] | None

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_shard(path: Path, file: BinaryIO) -> Shard:
    """Header and size of an open file, checked; `BadInput` names the file and what is wrong with it."""
    status = os.fstat(file.fileno())
    header, start = _header(path, file, status.st_size)
    metadata = header.pop("__metadata__", {})
    if sorted(header) != sorted(KEYS):
        raise BadInput(f"{path}: holds {', '.join(sorted(header)) or 'nothing'}; expected {', '.join(KEYS)}: not a latent shard")
    spans = {key: _span(path, key, header[key]) for key in KEYS}
    _check_spans(path, spans.values(), status.st_size - start)
    (name, shape), (flip_name, flip_shape), (label_name, label_shape) = ((header[k]["dtype"], tuple(header[k]["shape"])) for k in KEYS)
    if name not in DTYPES or flip_name != name:
        raise BadInput(f"{path}: latents are {name}, latents_flip {flip_name}; expected both F32, both F16 or both BF16; extract again")
    if len(shape) != 4 or flip_shape != shape:
        raise BadInput(f"{path}: latents {shape}, latents_flip {flip_shape}; expected twice the same (N, C, H, W); extract again")
    if label_name not in _LABELS or label_shape != shape[:1]:
        raise BadInput(f"{path}: labels {label_shape} {label_name} beside {shape[0]} latents; expected ({shape[0]},) I64; extract again")
    if 0 in shape:
        raise BadInput(f"{path}: latents of shape {shape} are empty; remove the shard, or extract again")
    identity = (status.st_size, status.st_mtime_ns)
    offsets = (start + spans["latents"][0], start + spans["latents_flip"][0])
    return Shard(
        path, shape[0], shape[1:], DTYPES[name], offsets, start + spans["labels"][0], _LABELS[label_name], identity, _ours(path, metadata)
    )


def _header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The JSON object and where the data begin."""
    prefix = os.pread(file.fileno(), 8, 0)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(_MAX_HEADER, size - 8):
        raise BadInput(f"{path}: {size} bytes cannot hold its header: cut short, or not safetensors; fetch or extract it again")
    try:
        header = json.loads(os.pread(file.fileno(), length, 8).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: damaged safetensors header ({' '.join(str(error).split())}); fetch or extract it again") from None
    if not isinstance(header, dict):
        raise BadInput(f"{path}: its safetensors header is not an object; fetch or extract it again")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """safetensors readers let the last of two equal keys win; which one was meant nobody knows."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _span(path: Path, key: str, entry: Any) -> tuple[int, int]:
    """The bytes [begin, end) of one tensor after the header, consistent with its dtype and shape."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    well_formed = set(fields) == {"dtype", "shape", "data_offsets"} and isinstance(dtype, str) and _naturals(shape) and _naturals(offsets)
    if not well_formed or len(offsets) != 2:
        raise BadInput(f"{path}: damaged safetensors header at {key!r}; fetch or extract it again")
    if dtype not in _ITEM_SIZES:
        raise BadInput(f"{path}: {key} has dtype {dtype}; expected F32, F16 or BF16 latents and I64 labels; extract again")
    if offsets[1] - offsets[0] != math.prod(shape) * _ITEM_SIZES[dtype]:
        raise BadInput(f"{path}: {key} {tuple(shape)} {dtype} does not fill its {offsets[1] - offsets[0]} bytes; fetch or extract it again")
    return offsets[0], offsets[1]


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_spans(path: Path, spans: Iterable[tuple[int, int]], size: int) -> None:
    """The tensors follow each other without hole or overlap and end where the file ends."""
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise BadInput(f"{path}: its tensors overlap or leave a hole; fetch or extract it again")
        end = stop
    if end != size:
        raise BadInput(f"{path}: {size} bytes of data, its header promises {end}: cut short or damaged; fetch or extract it again")


def _ours(path: Path, metadata: Any) -> dict[str, Any] | None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadInput(f"{path}: damaged safetensors metadata; fetch or extract it again")
    if OURS not in metadata:
        return None
    try:
        return dict(json.loads(metadata[OURS]))
    except (ValueError, TypeError, RecursionError):
        raise BadInput(f"{path}: damaged vavae_fast metadata; extract it again") from None


def read_labels(shard: Shard, file: BinaryIO) -> np.ndarray:
    """(rows,) int64, 0 or more."""
    data = os.pread(file.fileno(), shard.rows * shard.label_dtype.itemsize, shard.label_offset)
    if len(data) != shard.rows * shard.label_dtype.itemsize:
        raise BadInput(f"{shard.path}: cut short inside its labels; fetch or extract it again")
    labels = np.frombuffer(data, shard.label_dtype).astype(np.int64)
    if labels.min() < 0:
        row = int(labels.argmin())
        raise BadInput(f"{shard.path}: label {labels[row]} in row {row}; labels must be 0 or more; extract again with classes")
    return labels


def write_shard(path: Path, latents: Tensor, latents_flip: Tensor, labels: Tensor, ours: dict[str, Any]) -> None:
    """One shard in the reference's layout, at `path` itself: the caller gives a temporary name."""
    tensors = dict(zip(KEYS, (latents, latents_flip, labels)))
    header = {"__metadata__": {"total_size": str(len(labels)), "dtype": str(latents.dtype), OURS: json.dumps(ours, sort_keys=True)}}
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": NAMES.get(tensor.dtype, "I64"), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B"))


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations per channel, fp64: what exact statistics are merged from.

    Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    count: int  # values a channel: rows * H * W
    mean: Tensor  # (C,)
    squares: Tensor  # (C,)

    @staticmethod
    def of(latents: Tensor) -> "Moments":
        """latents (N, C, H, W)."""
        values = latents.to(torch.float64).transpose(0, 1).flatten(1)
        mean = values.mean(dim=1)
        return Moments(values.shape[1], mean, (values - mean[:, None]).square_().sum(dim=1))

    @staticmethod
    def none(channels: int) -> "Moments":
        return Moments(0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Moments(count, mean, self.squares + other.squares + delta.square() * (self.count * other.count / count))

    def statistics(self) -> dict[str, Tensor]:
        """{"mean", "std"}, each (1, C, 1, 1) float32; std is unbiased, as in the reference."""
        std = (self.squares / max(self.count - 1, 1)).sqrt()
        return {"mean": self.mean.float().view(1, -1, 1, 1), "std": std.float().view(1, -1, 1, 1)}

    def to_json(self) -> dict[str, Any]:
        """JSON keeps every bit: Python writes the shortest decimal that reads back as the same double."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Moments":
        mean, squares = (torch.tensor(value[key], dtype=torch.float64) for key in ("mean", "squares"))
        return Moments(int(value["count"]), mean, squares)
