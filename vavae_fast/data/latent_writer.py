"""Extraction's output: latent shards that are whole or absent, the same bytes however often it was interrupted.

Shard k holds the images [k * shard_size, (k + 1) * shard_size) and nothing else, whoever writes it: the folder does not
depend on the number of processes. The reference's name has two numbers, `rank` and `shard`; ours count thousands and units
of k, so that sorted names are image order. A thread of its own writes, so that whoever encodes does not wait for the disk.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vavae_fast.artifacts import manifest as new_manifest
from vavae_fast.artifacts import replacing, require_space, require_writable, sha256, write_json
from vavae_fast.data.latents import MANIFEST, write_statistics
from vavae_fast.data.shards import KEYS, NAMES, STATISTICS, STD_KEYS, Moments, Shard, ShardWriter, read_shard
from vavae_fast.errors import BadInput, require

_BLOCK_ROWS = 256  # that go to the disk together, and into the fp64 sums
WAITING_BYTES = 1 << 28  # of encoded latents, on their way to the disk: about what is encoded while a shard is synced and hashed


class LatentWriter:
    """Writes `count` latents of `shape` (C, H, W) into `folder`; what is there already from the same plan is kept.

    todo: the shards that are missing, all to be written here unless `take` leaves some to other processes. done: images in the
    others. facts: what made the latents (tokenizer and its hash, images and their fingerprint, seed, precision), as JSON; a
    folder made from other facts is refused. std: the latents are means, each with a standard deviation. names (count,) of
    the images, for messages. Nothing is written before the first `append`. As a context manager it lets go, on an error, of
    the shard that is not whole yet. A batch should not reach over a multiple of shard_size:
    `Images.batches(indices=writer.indices, border=writer.shard_size)`.
    """

    def __init__(
        self,
        folder: str | Path,
        shape: Sequence[int],
        count: int,
        shard_size: int = 10_000,
        dtype: torch.dtype = torch.float32,
        facts: Mapping[str, Any] | None = None,
        std: bool = False,
        names: Sequence[str] | None = None,
    ):
        require(len(shape) == 3 and min(shape) >= 1, "latent shape", tuple(shape), "(C, H, W), each above 0")
        require(count >= 1, "count", count, "above 0")
        require(1 <= shard_size and -(-count // shard_size) <= 100_000, "shard_size", shard_size, "above 0, for at most 100,000 shards")
        require(dtype in NAMES, "latent dtype", dtype, "float32, float16 or bfloat16")
        self.folder, self.shape, self.count, self.shard_size, self.dtype = Path(folder), tuple(shape), count, shard_size, dtype
        self.std, self.names = std, names
        self.plan = {"count": count, "shape": list(shape), "dtype": NAMES[dtype], "shard_size": shard_size, "std": std, "facts": dict(facts or {})}
        self.plan = json.loads(json.dumps(self.plan, allow_nan=False))  # as it will read back: tuples are lists, keys are strings
        self._dtypes = dict.fromkeys(KEYS[:2] + (STD_KEYS if std else ()), dtype) | {"labels": torch.int64}
        self._refuse_strangers()
        self.todo = [number for number in range(self.shards) if self._open(number) is None]
        self.done = count - sum(map(self.rows, self.todo))
        self._given = 0  # images appended
        self._block: dict[str, Tensor] = {}  # of the shard that is being filled
        self._filled = 0  # rows of the block
        self._disk: _Disk | None = None
        require_writable(self.folder)
        require_space(self.folder, int(1.05 * (count - self.done) * self.row_bytes))

    @property
    def shards(self) -> int:
        """How many the folder will have."""
        return -(-self.count // self.shard_size)

    @property
    def row_bytes(self) -> int:
        """What an image takes on the disk."""
        return sum(dtype.itemsize * (1 if key == "labels" else int(np.prod(self.shape))) for key, dtype in self._dtypes.items())

    def rows(self, number: int) -> int:
        """Of a shard: shard_size, or what is left for the last."""
        return min(self.shard_size, self.count - number * self.shard_size)

    def take(self, shards: Sequence[int]) -> None:
        """Write only these of `todo`, in this order, and leave the others to other processes."""
        assert self._disk is None and list(shards) == sorted(set(shards) & set(self.todo))
        self.todo = list(shards)
        self.__dict__.pop("indices", None)

    def sweep(self) -> None:
        """Remove what killed writers left. Only who holds the folder may."""
        for path in self.folder.glob("latents_rank*_shard*.safetensors.tmp"):
            path.unlink()

    @cached_property
    def indices(self) -> np.ndarray:
        """(M,) int64: the images of `todo`, in the order that `append` expects."""
        return np.concatenate([np.arange(k * self.shard_size, k * self.shard_size + self.rows(k)) for k in self.todo] or [np.arange(0)])

    def append(
        self,
        latents: Tensor,
        latents_flip: Tensor,
        labels: Tensor,
        latents_std: Tensor | None = None,
        latents_flip_std: Tensor | None = None,
    ) -> None:
        """The next images' latents and mirrored latents (B, C, H, W) and labels (B,), on any device; the same of their stds.

        Waits only while WAITING_BYTES wait for the disk. What the disk refused earlier is raised here.
        """
        given = dict(latents=latents, latents_flip=latents_flip, latents_std=latents_std, latents_flip_std=latents_flip_std, labels=labels)
        rows = {key: given[key].detach().to("cpu", dtype) for key, dtype in self._dtypes.items() if given[key] is not None}
        self._check_shapes(rows, [key for key, tensor in given.items() if tensor is not None])
        self._check_values(rows)
        if self._disk is None:
            self._disk = _Disk(self._write, max(2, WAITING_BYTES // (_BLOCK_ROWS * self.row_bytes)))
        while len(rows["labels"]):
            taken = self._fill(rows)
            rows = {key: tensor[taken:] for key, tensor in rows.items()}

    def _check_shapes(self, rows: dict[str, Tensor], given: list[str]) -> None:
        number = len(rows["labels"])
        shapes = {key: (number,) if key == "labels" else (number, *self.shape) for key in self._dtypes}
        found = {key: tuple(tensor.shape) for key, tensor in rows.items()}
        if found != shapes or set(given) != set(shapes):
            raise ValueError(f"append: expected {shapes}, got {found or given}")
        if self._given + number > len(self.indices):
            raise ValueError(f"append: more than the {len(self.indices)} images of this process")

    def _check_values(self, rows: dict[str, Tensor]) -> None:
        labels = rows["labels"]
        for key, tensor in rows.items():
            if key != "labels" and torch.isfinite(tensor.sum(dtype=torch.float32)):  # no NaN, no infinity leaves a sum finite
                continue
            bad = ~torch.isfinite(tensor).flatten(1).all(dim=1) if key != "labels" else labels < 0
            if not bad.any():  # or finite values overflowed the sum
                continue
            row = int(bad.nonzero()[0])
            image = int(self.indices[self._given + row])
            name = f"image {image}" if self.names is None else f"image {image}, {self.names[image]},"
            if key == "labels":
                found = f"{name} has the label {int(labels[row])}; labels must be 0 or more: put images in class folders, or label all 0"
                raise BadInput(f"{self.folder}: {found}")
            raise BadInput(f"{self.folder}: {key} of {name} has a NaN or an infinity as {self.dtype}; check the tokenizer, or the image")

    def _fill(self, rows: dict[str, Tensor]) -> int:
        """Move as many rows as the current block has room for, and hand it to the disk when it is full. Returns their number."""
        place = self._given % self.shard_size  # todo is in order: only its last shard can be short
        room = min(_BLOCK_ROWS - place % _BLOCK_ROWS, self.rows(self.todo[self._given // self.shard_size]) - place)
        if not self._block:
            self._block = {key: torch.empty(room, *tensor.shape[1:], dtype=tensor.dtype) for key, tensor in rows.items()}
        taken = min(room, len(rows["labels"]))
        for key, kept in self._block.items():
            kept[self._filled : self._filled + taken] = rows[key][:taken]
        self._filled += taken
        self._given += taken
        if taken == room:
            self._disk.put(self._block)
            self._block, self._filled = {}, 0
        return taken

    def finish(self) -> dict[int, str]:
        """Wait until this process's shards are on the disk; their numbers and hashes."""
        if self._given < len(self.indices):
            raise ValueError(f"close: {self._given} of the {len(self.indices)} images of this process were appended")
        if self._disk is None:
            return {}
        self._disk.end()
        self._disk.check()
        return self._disk.hashes

    def __enter__(self) -> "LatentWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._disk is not None:
            self._disk.end()

    def close(self, hashes: Mapping[int, str] | None = None) -> Path:
        """`finish`, statistics, then the manifest: with it the folder is complete. One process calls it, after all have finished.

        hashes: what the other processes' `finish` gave. `BadInput` names a shard that is missing.
        """
        known = self.finish() | dict(hashes or {})
        if not known and (self.folder / MANIFEST).exists() and (self.folder / STATISTICS).exists():
            return self.folder
        total, shards = Moments.none(self.shape[0]), []
        for number in range(self.shards):
            shard = self._open(number)
            if shard is None:
                raise BadInput(f"{self.path(number)}: missing or not whole; run the extraction again, it continues where it stopped")
            total = total + Moments.from_json(shard.ours["moments"])
            shards.append(shard)
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            digests = pool.map(lambda pair: known.get(pair[0]) or sha256(pair[1].path), enumerate(shards))
        entries = [dict(file=s.path.name, rows=s.rows, bytes=s.identity[0], sha256=digest) for s, digest in zip(shards, digests)]
        write_statistics(self.folder, total.statistics())
        write_json(self.folder / MANIFEST, new_manifest("latents", **self.plan, shards=entries))
        return self.folder

    def _write(self, next_block: Callable[[], dict[str, Tensor]], hashes: dict[int, str]) -> None:
        """`todo` to the disk. Runs in the thread."""
        for number in self.todo:
            ours = {"plan": self.plan, "shard": number}
            with replacing(self.path(number)) as temporary:
                with ShardWriter(temporary, self.rows(number), self.shape, self.dtype, self.std, ours) as shard:
                    while shard.done < shard.rows:
                        shard.append(next_block())
                    shard.finish()
                digest = sha256(temporary)
            hashes[number] = digest

    def path(self, number: int) -> Path:
        """Of a shard."""
        return self.folder / f"latents_rank{number // 1000:02d}_shard{number % 1000:03d}.safetensors"

    def _open(self, number: int) -> Shard | None:
        """The shard of this plan, or None when it is missing or not whole and is to be written again; another plan's is an error."""
        path = self.path(number)
        if not path.exists():
            return None
        try:
            with open(path, "rb") as file:
                shard = read_shard(path, file)
        except BadInput:
            return None
        self._check_plan(shard)
        if (shard.rows, shard.ours.get("shard")) != (self.rows(number), number):
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
        expected = {self.path(k).name for k in range(self.shards)}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in expected:
                with open(path, "rb") as file:
                    self._check_plan(read_shard(path, file))
                raise BadInput(f"{path}: not a shard of this extraction; choose another --out, or remove it")


class _Ended(Exception):
    """There are no more blocks, in the middle of a shard."""


class _Disk:
    """A thread in which `write(next_block, hashes)` runs. What it raises is raised by `put` and `check`; `waiting` blocks may wait for it."""

    def __init__(self, write: Callable[[Callable[[], dict[str, Tensor]], dict[int, str]], None], waiting: int):
        self.hashes: dict[int, str] = {}
        self._error: Exception | None = None
        self._blocks: Queue[dict[str, Tensor] | None] = Queue(maxsize=waiting)
        self._thread = threading.Thread(target=self._run, args=(write,), name="disk", daemon=True)
        self._thread.start()

    def put(self, block: dict[str, Tensor]) -> None:
        self.check()
        self._blocks.put(block)

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Wait for the blocks that were put; a shard that they leave unfinished is removed."""
        if self._thread.is_alive():
            self._blocks.put(None)
            self._thread.join()

    def _run(self, write: Callable[[Callable[[], dict[str, Tensor]], dict[int, str]], None]) -> None:
        try:
            write(self._next, self.hashes)
        except _Ended:
            return
        except Exception as error:  # of any kind: the thread that waits for this one raises it
            self._error = error
            while self._blocks.get() is not None:
                pass

    def _next(self) -> dict[str, Tensor]:
        block = self._blocks.get()
        if block is None:
            raise _Ended
        return block


def _difference(key: str, was: Any, now: Any) -> tuple[str, str]:
    """The first place where two plans differ, as `facts.seed=0` and `1`."""
    if isinstance(was, dict) and isinstance(now, dict):
        inner = next(name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name))
        return _difference(f"{key}.{inner}", was.get(inner), now.get(inner))
    return f"{key}={was}", f"{now}"
