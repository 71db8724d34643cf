"""Extraction's output: latent shards that are whole or absent, the same bytes however often it was interrupted.

Shard k holds the images [k * shard_size, (k + 1) * shard_size) and nothing else, whoever writes it: of w processes, r
writes shards r, r + w, …, and the folder does not depend on w. The reference's name has two numbers, `rank` and `shard`;
ours count thousands and units of k, so that sorted names are image order.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vavae_fast.artifacts import manifest as new_manifest
from vavae_fast.artifacts import replacing, require_space, require_writable, sha256, write_json
from vavae_fast.data.latents import MANIFEST, write_statistics
from vavae_fast.data.shards import NAMES, STATISTICS, Moments, Shard, read_shard, write_shard
from vavae_fast.errors import BadInput, require

_ROWS_AT_ONCE = 256  # of the fp64 pass over a shard


class LatentWriter:
    """Writes `count` latents of `shape` (C, H, W) into `folder`; what is there already from the same plan is kept.

    done: how many of this process's images are on disk, from the first on: continue from there. indices: the images this
    process writes, in order; all of them when world is 1. facts: what made the latents (tokenizer and its hash, images and
    their fingerprint, seed, precision), as JSON; a folder made from other facts is refused. Nothing is written before the
    first `append`. A batch should not reach over a multiple of shard_size: `Images.batches(border=writer.shard_size)`.
    """

    def __init__(
        self,
        folder: str | Path,
        shape: Sequence[int],
        count: int,
        shard_size: int = 10_000,
        dtype: torch.dtype = torch.float32,
        facts: Mapping[str, Any] | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        require(len(shape) == 3 and min(shape) >= 1, "latent shape", tuple(shape), "(C, H, W), each above 0")
        require(count >= 1, "count", count, "above 0")
        require(1 <= shard_size and -(-count // shard_size) <= 100_000, "shard_size", shard_size, "above 0, for at most 100,000 shards")
        require(dtype in NAMES, "latent dtype", dtype, "float32, float16 or bfloat16")
        require(0 <= rank < world, "rank", rank, f"in [0, {world})")
        self.folder, self.shape, self.count, self.shard_size, self.dtype = Path(folder), tuple(shape), count, shard_size, dtype
        self.rank, self.world = rank, world
        self.plan = {"count": count, "shape": list(shape), "dtype": NAMES[dtype], "shard_size": shard_size, "facts": dict(facts or {})}
        self.plan = json.loads(json.dumps(self.plan, allow_nan=False))  # as it will read back: tuples are lists, keys are strings
        self._shards = range(rank, -(-count // shard_size), world)
        self._hashes: dict[int, str] = {}
        self._refuse_strangers()
        complete = [self._complete(k) for k in self._shards]
        self._next = complete.index(False) if False in complete else len(complete)
        self.done = sum(self._rows(k) for k in self._shards[: self._next])
        self._buffer: tuple[Tensor, Tensor, Tensor] | None = None
        self._filled = 0
        require_writable(self.folder)
        missing = sum(self._rows(k) for k, there in zip(self._shards, complete) if not there)
        require_space(self.folder, int(1.05 * missing * (2 * int(np.prod(shape)) * dtype.itemsize + 8)))

    @cached_property
    def indices(self) -> np.ndarray:
        """(M,) int64: the images that this process writes, in the order that `append` expects."""
        return np.concatenate([np.arange(k * self.shard_size, k * self.shard_size + self._rows(k)) for k in self._shards] or [np.arange(0)])

    def append(self, latents: Tensor, latents_flip: Tensor, labels: Tensor) -> None:
        """The next images' latents and mirrored latents (B, C, H, W) and labels (B,), on any device; full shards go to disk."""
        if tuple(latents.shape[1:]) != self.shape or latents_flip.shape != latents.shape or tuple(labels.shape) != latents.shape[:1]:
            raise ValueError(
                f"append: expected twice (B, {', '.join(map(str, self.shape))}) and (B,), got {tuple(latents.shape)}, "
                f"{tuple(latents_flip.shape)} and {tuple(labels.shape)}"
            )
        if self.done + self._filled + len(labels) > len(self.indices):
            raise ValueError(f"append: more than the {len(self.indices)} images of this process")
        rows = [t.detach().to("cpu", d) for t, d in ((latents, self.dtype), (latents_flip, self.dtype), (labels, torch.int64))]
        self._check_values(*rows)
        while len(rows[2]):
            taken = self._fill(rows)
            rows = [t[taken:] for t in rows]

    def _check_values(self, latents: Tensor, latents_flip: Tensor, labels: Tensor) -> None:
        bad = ~(torch.isfinite(latents) & torch.isfinite(latents_flip)).flatten(1).all(dim=1)
        if bad.any():
            image = int(self.indices[self.done + self._filled + int(bad.nonzero()[0])])
            raise BadInput(f"{self.folder}: the latent of image {image} has a NaN or an infinity as {self.dtype}; check the tokenizer")
        if len(labels) and labels.min() < 0:
            raise BadInput(
                f"{self.folder}: label {int(labels.min())}; labels must be 0 or more: put images in class folders, or label all 0"
            )

    def _fill(self, rows: list[Tensor]) -> int:
        """Move as many rows as the current shard has room for; write it when it is full. Returns their number."""
        number = self._shards[self._next]
        room = self._rows(number) - self._filled
        if self._buffer is None:
            latents = torch.empty(self._rows(number), *self.shape, dtype=self.dtype)
            self._buffer = (latents, torch.empty_like(latents), torch.empty(self._rows(number), dtype=torch.int64))
        taken = min(room, len(rows[2]))
        for kept, new in zip(self._buffer, rows):
            kept[self._filled : self._filled + taken] = new[:taken]
        self._filled += taken
        if taken == room:
            self._write(number, *self._buffer)
            self._buffer, self._filled, self._next = None, 0, self._next + 1
            self.done += self._rows(number)
        return taken

    def _write(self, number: int, latents: Tensor, latents_flip: Tensor, labels: Tensor) -> None:
        moments = Moments.none(self.shape[0])
        for rows in latents.split(_ROWS_AT_ONCE):  # by rows of the shard, not of a batch: the same sums whatever the batches
            moments = moments + Moments.of(rows)
        path = self._path(number)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write_shard(temporary, latents, latents_flip, labels, {"plan": self.plan, "shard": number, "moments": moments.to_json()})
            self._hashes[number] = sha256(temporary)

    def close(self) -> Path:
        """Statistics, then the manifest: with it the folder is complete. Rank 0 calls it after all ranks wrote their shards.

        The other ranks' call only checks that their own part is whole. `BadInput` names a shard that is missing.
        """
        if self.done < len(self.indices):
            raise ValueError(f"close: {self.done + self._filled} of the {len(self.indices)} images of this process were appended")
        finished_before = not self._hashes and (self.folder / MANIFEST).exists() and (self.folder / STATISTICS).exists()
        if self.rank != 0 or finished_before:
            return self.folder
        total, entries = Moments.none(self.shape[0]), []
        for number in range(-(-self.count // self.shard_size)):
            shard = self._open(number)
            if shard is None:
                raise BadInput(f"{self._path(number)}: missing or not whole; run the extraction again, it continues where it stopped")
            total = total + Moments.from_json(shard.ours["moments"])
            digest = self._hashes.get(number) or sha256(shard.path)
            entries.append({"file": shard.path.name, "rows": shard.rows, "bytes": shard.identity[0], "sha256": digest})
        write_statistics(self.folder, total.statistics())
        write_json(self.folder / MANIFEST, new_manifest("latents", **self.plan, shards=entries))
        return self.folder

    def _rows(self, number: int) -> int:
        return min(self.shard_size, self.count - number * self.shard_size)

    def _path(self, number: int) -> Path:
        return self.folder / f"latents_rank{number // 1000:02d}_shard{number % 1000:03d}.safetensors"

    def _complete(self, number: int) -> bool:
        return self._open(number) is not None

    def _open(self, number: int) -> Shard | None:
        """The shard of this plan, or None when it is missing or not whole and is to be written again; another plan's is an error."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with open(path, "rb") as file:
                shard = read_shard(path, file)
        except BadInput:
            return None
        self._check_plan(shard)
        if (shard.rows, shard.ours.get("shard")) != (self._rows(number), number):
            raise BadInput(
                f"{path}: holds shard {shard.ours.get('shard')} with {shard.rows} rows under a wrong name; remove it and run again"
            )
        return shard

    def _check_plan(self, shard: Shard) -> None:
        theirs = (shard.ours or {}).get("plan")
        if theirs is None:
            raise BadInput(f"{shard.path}: not from this program; choose another --out, or remove the folder")
        for key in sorted(self.plan.keys() | theirs.keys()):
            if self.plan.get(key) != theirs.get(key):
                was, now = _difference(key, theirs.get(key), self.plan.get(key))
                raise BadInput(f"{self.folder}: was begun with {was}, now {now}; choose another --out, or remove the folder")

    def _refuse_strangers(self) -> None:
        """Shards that this plan would not write stand for other images: a reader would take them for part of it."""
        expected = {self._path(k).name for k in range(-(-self.count // self.shard_size))}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in expected:
                with open(path, "rb") as file:
                    self._check_plan(read_shard(path, file))
                raise BadInput(f"{path}: not a shard of this extraction; choose another --out, or remove it")


def _difference(key: str, was: Any, now: Any) -> tuple[str, str]:
    """The first place where two plans differ, as `facts.seed=0` and `1`."""
    if isinstance(was, dict) and isinstance(now, dict):
        inner = next(name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name))
        return _difference(f"{key}.{inner}", was.get(inner), now.get(inner))
    return f"{key}={was}", f"{now}"
