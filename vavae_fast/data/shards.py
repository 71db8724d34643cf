"""Latent shards on disk: safetensors files with `latents`, `latents_flip` (N, C, H, W) and `labels` (N,).

Where `latents` are means of posteriors, `latents_std` and `latents_flip_std` may lie beside them; readers that do not know
them, the reference's among them, read the means.

The header is read and written by hand: reading 8 bytes and a little JSON opens ImageNet's shards in milliseconds, and our
own data begin on a 4 KiB border (padding with spaces is part of the format). Payloads are never touched here, except
labels. Ours carry, in `__metadata__`, what made them, the exact sums that the statistics are made of, and a checksum of every row,
which whoever reads the row compares: to hash ImageNet's shards whole, before a run begins, would take minutes.
"""

import base64
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vavae_fast.artifacts import SEAL, seal_is_whole, sealed
from vavae_fast.errors import BadInput

KEYS = ("latents", "latents_flip", "labels")
STD_KEYS = ("latents_std", "latents_flip_std")
STATISTICS = "latents_stats.pt"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
OURS = "vavae_fast"  # the key of our JSON in __metadata__
_SUMS, _LABEL_SUM = "row_sums", "label_sum"  # in our JSON: base64 of (tensors, rows) uint32; zlib.crc32
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
    std_offsets: tuple[int, int] | None = None  # of latents_std and latents_flip_std, where the shard has them
    sums: np.ndarray | None = None  # (tensors, rows) uint32: the `row_sums` of latents, latents_flip and their stds
    label_sum: int | None = None  # zlib.crc32 of the labels

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_shard(path: Path, file: BinaryIO) -> Shard:
    """Header and size of an open file, checked; `BadInput` names the file and what is wrong with it."""
    status = os.fstat(file.fileno())
    header, start = _header(path, file, status.st_size)
    metadata = header.pop("__metadata__", {})
    has_std = sorted(header) == sorted(KEYS + STD_KEYS)
    if not has_std and sorted(header) != sorted(KEYS):
        raise BadInput(f"{path}: holds {', '.join(sorted(header)) or 'nothing'}; expected {', '.join(KEYS)}: not a latent shard")
    spans = {key: _span(path, key, header[key]) for key in header}
    _check_spans(path, spans.values(), status.st_size - start)
    (name, shape), (label_name, label_shape) = ((header[key]["dtype"], tuple(header[key]["shape"])) for key in ("latents", "labels"))
    for key in KEYS[1:2] + (STD_KEYS if has_std else ()):
        other_name, other_shape = header[key]["dtype"], tuple(header[key]["shape"])
        if name not in DTYPES or other_name != name:
            raise BadInput(f"{path}: latents are {name}, {key} {other_name}; expected both F32, both F16 or both BF16; extract again")
        if len(shape) != 4 or other_shape != shape:
            raise BadInput(f"{path}: latents {shape}, {key} {other_shape}; expected twice the same (N, C, H, W); extract again")
    if label_name not in _LABELS or label_shape != shape[:1]:
        raise BadInput(f"{path}: labels {label_shape} {label_name} beside {shape[0]} latents; expected ({shape[0]},) I64; extract again")
    if 0 in shape:
        raise BadInput(f"{path}: latents of shape {shape} are empty; remove the shard, or extract again")
    begins = {key: start + span[0] for key, span in spans.items()}
    ours = _ours(path, metadata)
    return Shard(
        path, shape[0], shape[1:], DTYPES[name], (begins["latents"], begins["latents_flip"]), begins["labels"], _LABELS[label_name],
        (status.st_size, status.st_mtime_ns), ours, (begins[STD_KEYS[0]], begins[STD_KEYS[1]]) if has_std else None,
        *_checksums(path, ours, 4 if has_std else 2, shape[0]),
    )  # fmt: skip


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
        ours = dict(json.loads(metadata[OURS]))
    except (ValueError, TypeError, RecursionError):
        raise BadInput(f"{path}: damaged vavae_fast metadata; extract it again") from None
    if (SEAL in ours or _SUMS in ours) and not seal_is_whole(ours):  # shards of earlier versions have neither
        raise BadInput(f"{path}: damaged vavae_fast metadata: its seal is not that of its content; extract it again")
    return ours


def _checksums(path: Path, ours: dict[str, Any] | None, tensors: int, rows: int) -> tuple[np.ndarray | None, int | None]:
    """`Shard.sums` and `Shard.label_sum`; None for a shard that has none: the reference's, or an earlier version's."""
    if ours is None or _SUMS not in ours:
        return None, None
    try:
        return np.frombuffer(base64.b64decode(ours.pop(_SUMS)), "<u4").reshape(tensors, rows), int(ours[_LABEL_SUM])
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: its checksums are not those of {tensors} x {rows} rows; extract it again") from None


def row_sums(values: Tensor) -> Tensor:
    """(N, ...) of 2 or 4 bytes a value -> (N,) int64 in [0, 2**32): the sum of a row's values as integers, modulo 2**32.

    One flipped bit moves it by a power of two. csrc/latent_rows.cpp adds up the same while the row is in the cache.
    """
    words = values.contiguous().view(torch.int32 if values.dtype.itemsize == 4 else torch.int16)
    return words.flatten(1).sum(dim=1, dtype=torch.int64) & 0xFFFFFFFF


def read_labels(shard: Shard, file: BinaryIO) -> np.ndarray:
    """(rows,) int64, 0 or more."""
    data = os.pread(file.fileno(), shard.rows * shard.label_dtype.itemsize, shard.label_offset)
    if len(data) != shard.rows * shard.label_dtype.itemsize:
        raise BadInput(f"{shard.path}: cut short inside its labels; fetch or extract it again")
    if shard.label_sum is not None and zlib.crc32(data) != shard.label_sum:
        raise BadInput(f"{shard.path}: damaged: its labels have another checksum than was written; fetch or extract it again")
    labels = np.frombuffer(data, shard.label_dtype).astype(np.int64)
    if labels.min() < 0:
        row = int(labels.argmin())
        raise BadInput(f"{shard.path}: label {labels[row]} in row {row}; labels must be 0 or more; extract again with classes")
    return labels


class ShardWriter:
    """One shard in the reference's layout, written block by block to `path` itself: the caller gives a temporary name.

    The header comes last, into the room kept for it, because it holds the sums over all rows. ours: further JSON for the header.
    """

    def __init__(self, path: Path, rows: int, shape: tuple[int, int, int], dtype: torch.dtype, std: bool, ours: dict[str, Any]):
        self.path, self.rows, self.done, self.moments = path, rows, 0, Moments.none(shape[0])
        self._ours, self._label_sum = ours, 0
        row = {key: (NAMES[dtype], shape, dtype.itemsize * math.prod(shape)) for key in KEYS[:2] + (STD_KEYS if std else ())}
        row["labels"] = ("I64", (), 8)
        self._header, self._offsets, self._row_bytes, end = {"__metadata__": {"total_size": str(rows), "dtype": str(dtype)}}, {}, {}, 0
        for key, (name, tail, row_bytes) in row.items():
            begin, end = end, end + rows * row_bytes
            self._header[key] = {"dtype": name, "shape": [rows, *tail], "data_offsets": [begin, end]}
            self._offsets[key], self._row_bytes[key] = begin, row_bytes
        self._sums = {key: np.zeros(rows, "<u4") for key in self._offsets if key != "labels"}
        self._start = 8 + len(self._text(Moments.longest(shape[0]), 1 << 32))
        self._start += -self._start % _PAGE
        self._file = open(path, "wb", buffering=0)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, block: Mapping[str, Tensor]) -> None:
        """The next rows of every tensor, contiguous, on the CPU, in their dtype. The sums are merged once a block."""
        self.moments = self.moments + Moments.of(block["latents"], block.get("latents_std"))
        self._label_sum = zlib.crc32(block["labels"].numpy(), self._label_sum)
        for key, sums in self._sums.items():
            sums[self.done : self.done + len(block[key])] = row_sums(block[key]).numpy()
        for key, offset in self._offsets.items():
            data = memoryview(block[key].view(torch.uint8).numpy()).cast("B")
            self._write(data, self._start + offset + self.done * self._row_bytes[key])
        self.done += len(block["labels"])
        os.fsync(self._file.fileno())  # a little at a time: all at the end, the disk would be busy for seconds

    def finish(self) -> None:
        """The header, once all rows are there."""
        text = self._text(self.moments, self._label_sum)
        self._write(memoryview(struct.pack("<Q", self._start - 8) + text.ljust(self._start - 8)), 0)

    def _text(self, moments: "Moments", label_sum: int) -> bytes:
        sums = base64.b64encode(np.stack(list(self._sums.values())).tobytes()).decode("ascii")
        ours = sealed(self._ours | {"moments": moments.to_json(), _SUMS: sums, _LABEL_SUM: label_sum})
        metadata = self._header["__metadata__"] | {OURS: json.dumps(ours, sort_keys=True)}
        return json.dumps(self._header | {"__metadata__": metadata}).encode()

    def _write(self, data: memoryview, offset: int) -> None:
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None  # the system does not say which file


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations per channel, fp64: what exact statistics are merged from.

    Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    count: int  # values a channel: rows * H * W
    mean: Tensor  # (C,)
    squares: Tensor  # (C,)
    noise: Tensor  # (C,) sum of the posteriors' variances, of values that are means to which noise will be added; else 0

    @staticmethod
    def of(latents: Tensor, std: Tensor | None = None) -> "Moments":
        """latents (N, C, H, W), and the standard deviation of the noise to be added to each, of the same shape."""
        values = latents.to(torch.float64, copy=True).flatten(2)
        mean = values.mean(dim=2).mean(dim=0)
        noise = torch.zeros_like(mean) if std is None else _sums_of_squares(std.to(torch.float64).flatten(2))
        return Moments(len(values) * values.shape[2], mean, _sums_of_squares(values.sub_(mean[:, None])), noise)

    @staticmethod
    def none(channels: int) -> "Moments":
        return Moments(0, *torch.zeros(3, channels, dtype=torch.float64))

    @staticmethod
    def longest(channels: int) -> "Moments":
        """Those whose JSON is as long as any."""
        return Moments(sys.maxsize, *torch.full((3, channels), -sys.float_info.max, dtype=torch.float64))

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        squares = self.squares + other.squares + delta.square() * (self.count * other.count / count)
        return Moments(count, mean, squares, self.noise + other.noise)

    def statistics(self) -> dict[str, Tensor]:
        """{"mean", "std"}, each (1, C, 1, 1) float32; std is unbiased, as in the reference. Noise is counted by its expectation."""
        std = (self.squares / max(self.count - 1, 1) + self.noise / self.count).sqrt()
        return {"mean": self.mean.float().view(1, -1, 1, 1), "std": std.float().view(1, -1, 1, 1)}

    def to_json(self) -> dict[str, Any]:
        """JSON keeps every bit: Python writes the shortest decimal that reads back as the same double."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist(), "noise": self.noise.tolist()}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Moments":
        return Moments(int(value["count"]), *(torch.tensor(value[key], dtype=torch.float64) for key in ("mean", "squares", "noise")))


def _sums_of_squares(values: Tensor) -> Tensor:
    """(N, C, M) fp64 -> (C,). PyTorch takes norms on a CPU at three times the speed of squares and their sum."""
    return torch.linalg.vector_norm(values, dim=2).square_().sum(dim=0)
