"""Latents read back: the training input of LightningDiT. Ours and the reference's shards are the same format.

No memory map: a file that is cut short under a map kills the process, under `pread` it is a named error.
"""

import io
import os
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from vavae_fast.artifacts import read_json, replacing
from vavae_fast.data.order import checked_indices, to_array
from vavae_fast.data.rows import DAMAGED, END_OF_FILE, NOT_FINITE, gather_rows
from vavae_fast.data.shards import STATISTICS, Moments, Shard, read_labels, read_shard
from vavae_fast.errors import BadInput
from vavae_fast.torch_files import read_torch

MANIFEST = "manifest.json"
_MAX_STATISTICS = 1 << 20  # bytes of latents_stats.pt; the reference's has about 2,000
_ROWS_AT_ONCE = 256  # of the statistics pass


def open_latents(folder: str | Path) -> "Latents":
    """A folder of shards, its labels and statistics, all checked: headers, sizes, counts; never payloads. Writes nothing.

    `BadInput` names the file at fault and the cure.
    """
    folder = Path(folder)
    store = open_store(folder)
    return Latents(store, *read_statistics(folder / STATISTICS, store.shape[0]))


def extraction_facts(folder: Path) -> dict[str, Any]:
    """What made the latents in `folder`, by its manifest: the tokenizer's digest, the images, their classes; empty where there is none."""
    content = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    facts = content.get("facts") if isinstance(content, dict) else None
    return facts if isinstance(facts, dict) else {}


class ShardStore:
    """The open shards of one folder as one array of rows; their statistics are not needed here.

    shape (C, H, W), labels (N,) int64, manifest (dict, or None: the reference writes none), has_std: whether the rows are means with a
    standard deviation each. Safe from several threads.
    """

    def __init__(self, folder: Path, shards: list[Shard], files: list[BinaryIO], manifest: dict[str, Any] | None):
        self.folder, self.shards, self.manifest = folder, shards, manifest
        self.shape, self.dtype = shards[0].shape, shards[0].dtype
        self._files, self._descriptors = files, np.array([file.fileno() for file in files], np.int32)
        self._ends = np.cumsum([shard.rows for shard in shards])
        self._starts = self._ends - [shard.rows for shard in shards]
        labels = np.empty(len(self), np.int64)  # filled in place: ImageNet's are 10 MB
        for shard, file, start, end in zip(shards, files, self._starts, self._ends):
            labels[start:end] = read_labels(shard, file)
        self.labels = torch.from_numpy(labels)
        self.has_std = shards[0].std_offsets is not None
        self._offsets = np.array([(*shard.offsets, *(shard.std_offsets or ())) for shard in shards], np.int64)
        self._sums = _sums(shards)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: np.ndarray, flip: np.ndarray, out: Tensor | None = None, std: bool = False) -> Tensor:
        """(n,) int64 in range, (n,) bool -> (n, C, H, W) float32, filling `out` when given. std: the standard deviations, where it has_std."""
        direct = out if out is not None and self.dtype == torch.float32 else torch.empty(len(indices), *self.shape, dtype=self.dtype)
        if len(indices):
            self._gather(indices, flip.astype(np.int64) + 2 * std, direct)
        return direct.to(torch.float32) if out is None or out is direct else out.copy_(direct)

    def _gather(self, indices: np.ndarray, tensor: np.ndarray, out: Tensor) -> None:
        """In the order of the disk, each row straight to its place in `out`. tensor (n,): column of `_offsets`."""
        shard_of = np.searchsorted(self._ends, indices, side="right")
        offsets = self._offsets[shard_of, tensor] + (indices - self._starts[shard_of]) * self.shards[0].row_bytes
        order = np.lexsort((offsets, shard_of))
        for number in np.unique(shard_of):
            self._check_unchanged(self.shards[number], self._files[number])
        sums = None if self._sums is None else self._sums[tensor, indices].astype(np.int64)[order]
        fault = gather_rows(self._descriptors[shard_of[order]], offsets[order], order, out, sums)
        if fault is not None:
            place = order[fault.row]
            self._refuse(fault.cause, self.shards[shard_of[place]].path, int(indices[place] - self._starts[shard_of[place]]))

    def _check_unchanged(self, shard: Shard, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != shard.identity:
            raise BadInput(f"{shard.path}: changed while it was open; shards are immutable: extract to another folder and start again")

    def _refuse(self, cause: int, path: Path, row: int) -> None:
        if cause == NOT_FINITE:
            raise BadInput(f"{path}: NaN or infinity in row {row}; extract the shard again")
        if cause == DAMAGED:
            raise BadInput(f"{path}: damaged: row {row} has another checksum than was written; fetch the shard or extract it again")
        if cause == END_OF_FILE:
            raise BadInput(f"{path}: cut short while it was open; fetch or extract it again")
        raise BadInput(f"{path}: row {row} cannot be read ({os.strerror(cause)}); look after the disk, or fetch the shard again")

    def moments(self) -> Moments:
        """Of all unflipped latents, one pass over the disk."""
        total = Moments.none(self.shape[0])
        for start in range(0, len(self), _ROWS_AT_ONCE):
            indices = np.arange(start, min(start + _ROWS_AT_ONCE, len(self)))
            flip = np.zeros(len(indices), bool)
            total = total + Moments.of(self.read(indices, flip), self.read(indices, flip, std=True) if self.has_std else None)
        return total


class Latents:
    """`len`, `labels` (N,) int64, `mean` and `std` (1, C, 1, 1) float32, `shape` (C, H, W), `dtype` stored, `channels`, `manifest`, `read`.

    has_std: the latents are means of posteriors, to which the reader adds noise: `read_std` gives its standard deviations.
    """

    def __init__(self, store: ShardStore, mean: Tensor, std: Tensor):
        self.folder, self.shape, self.dtype, self.channels = store.folder, store.shape, store.dtype, store.shape[0]
        self.labels, self.manifest, self.mean, self.std, self.has_std = store.labels, store.manifest, mean, std, store.has_std
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def read(
        self,
        indices: Sequence[int] | np.ndarray | Tensor,
        flip: bool | Sequence[bool] | np.ndarray | Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """(n,) indices -> (n, C, H, W) float32, not normalised, a private copy, in the order asked.

        flip: one bool, or one an index, picks `latents_flip`. out: filled and returned when given (contiguous float32 on
        the CPU, say pinned). `IndexError` outside [0, len); `BadInput` names shard and row of a NaN or an infinity, and a
        shard that was changed or cut. Safe from several threads.
        """
        return self._read(indices, flip, out)

    def read_std(
        self,
        indices: Sequence[int] | np.ndarray | Tensor,
        flip: bool | Sequence[bool] | np.ndarray | Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `read`, the standard deviations of those means; `BadInput` unless has_std."""
        if not self.has_std:
            raise BadInput(f"{self.folder}: holds no standard deviations; extract with --posterior mean+std")
        return self._read(indices, flip, out, std=True)

    def _read(self, indices: Any, flip: Any, out: Tensor | None, std: bool = False) -> Tensor:
        indices = checked_indices(indices, len(self), str(self.folder))
        expected = f"{self.folder}: flip must be one bool or {len(indices)}"
        mirrored = to_array(False if flip is None else flip, expected)
        if mirrored.ndim == 1 and len(mirrored) != len(indices) or mirrored.ndim > 1 or (mirrored.size and mirrored.dtype != bool):
            raise BadInput(f"{expected}, got shape {mirrored.shape} of {mirrored.dtype}")
        if out is not None and (tuple(out.shape) != (len(indices), *self.shape) or out.dtype != torch.float32 or not out.is_contiguous()):
            raise BadInput(
                f"{self.folder}: out must be contiguous float32 {(len(indices), *self.shape)}, got {tuple(out.shape)} {out.dtype}"
            )
        return self._store.read(indices, np.broadcast_to(mirrored, indices.shape).astype(bool), out, std)


def open_store(folder: Path) -> ShardStore:
    """The shards alone, for those who compute statistics; everything else of `open_latents` is checked."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder of latents; set data.data_path, or run: vavae-fast extract --images DIR --out {folder}")
    paths = sorted(folder.glob("*.safetensors"), key=lambda path: path.name)
    if not paths:
        raise BadInput(f"{folder}: no .safetensors shards in it; run: vavae-fast extract --images DIR --out {folder}")
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else None
    files, shards = [], []
    with ExitStack() as stack:
        for path in paths:
            try:
                files.append(stack.enter_context(open(path, "rb", buffering=0)))
            except OSError as error:
                raise BadInput(f"{path}: cannot be opened ({error.strerror}); check its permissions, or `ulimit -n`") from None
            shards.append(read_shard(path, files[-1]))
        _check_together(folder, shards, manifest)
        store = ShardStore(folder, shards, files, manifest)
        weakref.finalize(store, stack.pop_all().close)  # all is well: the files stay open as long as the store lives
    return store


def _sums(shards: list[Shard]) -> np.ndarray | None:
    """(tensors, N): the rows' checksums, 10 MB of ImageNet's latents; -1 of shards that have none, None where no shard has any."""
    if all(shard.sums is None for shard in shards):
        return None
    tensors = 4 if shards[0].std_offsets else 2
    return np.concatenate([np.full((tensors, s.rows), -1, np.int64) if s.sums is None else s.sums for s in shards], axis=1)


def _check_together(folder: Path, shards: list[Shard], manifest: dict[str, Any] | None) -> None:
    first = shards[0]
    for shard in shards:
        if (shard.std_offsets is None) != (first.std_offsets is None):
            raise BadInput(f"{shard.path}: has other tensors than {first.path.name}; keep the shards of one extraction in a folder")
        if (shard.shape, shard.dtype) != (first.shape, first.dtype):
            raise BadInput(
                f"{shard.path}: latents {shard.shape} {shard.dtype}, but {first.path.name} has {first.shape} {first.dtype}; "
                "keep the shards of one extraction in a folder"
            )
    if first.ours is not None:
        rows, count = sum(shard.rows for shard in shards), first.ours.get("plan", {}).get("count")
        if rows != count:
            raise BadInput(f"{folder}: {rows} of {count} latents: the extraction was interrupted or shards are missing; run it again")
    if manifest is not None:
        _check_manifest(folder, shards, manifest)


def _check_manifest(folder: Path, shards: list[Shard], manifest: dict[str, Any]) -> None:
    try:
        promised = {entry["file"]: entry["bytes"] for entry in manifest["shards"]}
        well_formed = all(isinstance(name, str) for name in promised) and isinstance(manifest.get("facts", {}), dict)
    except (KeyError, TypeError):
        well_formed = False
    if not well_formed:
        raise BadInput(f"{folder / MANIFEST}: not the manifest of latents; remove it, or extract again")
    found = {shard.path.name: shard.identity[0] for shard in shards}
    for name in sorted(promised.keys() | found.keys()):
        if promised.get(name) != found.get(name):
            raise BadInput(
                f"{folder / name}: {found.get(name, 'no')} bytes, the manifest promises {promised.get(name, 'no such file')}; extract again"
            )


def read_statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """mean, std (1, C, 1, 1) float32; finite, std above 0."""
    if not path.exists():
        raise BadInput(
            f"no {STATISTICS} in {path.parent}: samples would decode blurred. Run: vavae-fast extract --stats-only --out {path.parent}"
        )
    cure = f"compute it again: vavae-fast extract --stats-only --out {path.parent}"
    if path.stat().st_size > _MAX_STATISTICS:
        raise BadInput(f"{path}: {path.stat().st_size} bytes are too many for two vectors; {cure}")
    value = read_torch(path, cure)
    pair = [value.get(key) if isinstance(value, dict) else None for key in ("mean", "std")]
    shape = (1, channels, 1, 1)
    if not all(isinstance(part, Tensor) and part.is_floating_point() and tuple(part.shape) == shape for part in pair):
        raise BadInput(f"{path}: expected mean and std of shape {shape}; it belongs to other latents: {cure}")
    mean, std = (part.to(torch.float32).contiguous() for part in pair)
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise BadInput(f"{path}: a channel has a std of 0, a NaN or an infinity: dead or damaged latents; {cure}")
    return mean, std


def latent_statistics(folder: str | Path) -> dict[str, Tensor]:
    """{"mean", "std"}, each (1, C, 1, 1) float32, exact over all unflipped latents; std is unbiased. Writes nothing."""
    return open_store(Path(folder)).moments().statistics()


def write_statistics(folder: str | Path, statistics: dict[str, Tensor]) -> Path:
    """`latents_stats.pt` as the reference reads it; whole or absent, the same bytes for the same values."""
    path = Path(folder) / STATISTICS
    buffer = io.BytesIO()  # torch.save puts a file's own name into its bytes; a buffer has none
    torch.save(statistics, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return path
