"""Images, decoded and cropped to squares: what the tokenizer is trained on and what it encodes.

Decoding runs in threads (Pillow releases the GIL), so there are no worker processes to lose or to hang.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vavae_fast import rng
from vavae_fast.data.builtin import BUILTIN, digit_pixels, digits
from vavae_fast.data.decode import CROPS, decode, read_header
from vavae_fast.data.listing import Source
from vavae_fast.data.order import checked_indices
from vavae_fast.data.prefetch import ahead
from vavae_fast.data.sources import open_source
from vavae_fast.errors import BadInput, require


@dataclass(frozen=True)
class ImageBatch:
    """pixels (B, 3, size, size) uint8, labels (B,) int64, index (B,) int64: the image's place in its order of reading."""

    pixels: Tensor
    labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class ImageCheck:
    """What `Images.check` found: how many images there are, are below the crop size, become RGB from something else."""

    images: int
    enlarged: int
    converted: int


def open_images(path: str | Path, size: int = 256, crop: str = "center", backend: str = "auto", threads: int | None = None) -> "Images":
    """Folder, class folders (ILSVRC layout too), .zip, .tar, .parquet, a folder of such shards, or "builtin:digits".

    crop: "center", ADM's for extraction and scores; "random", the tokenizer's training crop. backend: "pil"; "auto"
    takes the best there is. threads: for decoding; default one a core of the machine. `BadInput` names what is wrong, before any
    pixel is decoded.
    """
    require(isinstance(size, int) and size >= 1, "size", size, "an integer above 0")
    require(crop in CROPS, "crop", crop, " or ".join(repr(name) for name in CROPS))
    _check_backend(backend)
    threads = threads or os.cpu_count() or 1
    if str(path).startswith("builtin:"):
        return _open_builtin(str(path), size, threads)
    source = open_source(Path(path))
    return Images(str(path), source, size, crop, threads)


def _check_backend(backend: str) -> None:
    require(backend in ("auto", "pil", "dali"), "backend", backend, "'auto', 'pil' or 'dali'")
    if backend != "dali":
        return
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        raise BadInput("backend 'dali': nvidia-dali is not installed; pip install 'vavae-fast[dali]', or use backend 'pil'")
    raise BadInput("backend 'dali': this version decodes with Pillow only; use backend 'pil' or 'auto'")


class Images:
    """`len`, `labels` (N,) int64 (-1: no class), `classes` (sorted names), `names`, `read`, `batches`, `check`."""

    def __init__(self, path: str, source: Source, size: int, crop: str, threads: int):
        self.path, self.size, self.crop, self.threads = path, size, crop, threads
        self.names, self.labels, self.classes = source.names, source.labels, source.classes
        self._source = source

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    def read(self, indices: Sequence[int] | np.ndarray | Tensor, seed: int = 0, counters: Tensor | None = None) -> Tensor:
        """(n,) indices -> (n, 3, size, size) uint8, in the order asked.

        For crop "random" the place of crop k is a function of (seed, counters[k]); counters (n,) default to the indices.
        `IndexError` outside [0, len); `BadInput` names an image that cannot be decoded. Safe from several threads.
        """
        indices = checked_indices(indices, len(self), self.path)
        places = self._places(indices, seed, counters)
        pixels = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        rows = pixels.numpy()

        def fill(k: int) -> None:
            rows[k] = self._square(int(indices[k]), places[k]).transpose(2, 0, 1)

        for _ in self._pool.map(fill, range(len(indices))):
            pass
        return pixels

    def _places(self, indices: np.ndarray, seed: int, counters: Tensor | None) -> list[tuple[float, float]]:
        if self.crop == "center":
            require(counters is None, "counters", counters, 'left out: crop "center" has one place')
            return [(0.5, 0.5)] * len(indices)
        counters = torch.from_numpy(indices) if counters is None else torch.as_tensor(counters, dtype=torch.int64)
        both = torch.stack((2 * counters, 2 * counters + 1), dim=1).flatten()
        return list(map(tuple, rng.uniform(seed, both, rng.Stream.CROP).view(-1, 2).tolist()))

    def _square(self, i: int, place: tuple[float, float]) -> np.ndarray:
        name = f"{self.path}/{self.names[i]}"
        return CROPS[self.crop](decode(self._source.read(i), name), self.size, name, place)

    def batches(
        self, batch_size: int, start: int = 0, indices: Sequence[int] | np.ndarray | Tensor | None = None, border: int | None = None
    ) -> Iterator[ImageBatch]:
        """Images in order, `batch_size` at a time, from place `start` on; the next batch is decoded meanwhile.

        indices: this order instead of 0, 1, 2, … border: no batch reaches over a multiple of it, so that a writer of
        shards that starts again at a shard sees the batches that it would have seen.
        """
        require(batch_size >= 1, "batch_size", batch_size, "above 0")
        order = np.arange(len(self)) if indices is None else checked_indices(indices, len(self), self.path)

        def make(span: tuple[int, int]) -> ImageBatch:
            chosen = order[slice(*span)]
            return ImageBatch(self.read(chosen), self.labels[chosen], torch.from_numpy(chosen.copy()))

        return ahead(make, _spans(start, len(order), batch_size, border or max(len(order), 1)), depth=1)

    def check(self, decode_all: bool = False) -> ImageCheck:
        """Look at every header, or decode every image; `BadInput` counts the bad ones and names the first."""

        def look(i: int) -> tuple[str, bool, bool]:
            try:
                return ("", *self._header(i, decode_all))
            except BadInput as error:
                return str(error), False, False

        found = list(self._pool.map(look, range(len(self))))
        bad = [reason for reason, _, _ in found if reason]
        if bad:
            others = f" ({len(bad)} of {len(self)} images are bad; this is the first)" if len(bad) > 1 else ""
            raise BadInput(bad[0] + others)
        return ImageCheck(len(self), sum(small for _, small, _ in found), sum(other for _, _, other in found))

    def _header(self, i: int, decode_all: bool) -> tuple[bool, bool]:
        """(below the crop size, not RGB) of image i."""
        name, data = f"{self.path}/{self.names[i]}", self._source.read(i)
        image = read_header(data, name)
        if decode_all:
            decode(data, name)
        return min(image.size) < self.size, image.mode != "RGB"

    def fingerprint(self) -> str:
        """sha256 of names and labels, for manifests: the same images in the same order under the same labels."""
        digest = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape"))
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


class DigitImages(Images):
    """The bundled digits: no bytes to decode, only pixels to enlarge."""

    def __init__(self, path: str, pixels: Tensor, labels: Tensor, size: int, threads: int):
        names = [f"{k:04d}" for k in range(len(labels))]
        super().__init__(path, Source(names, labels, [str(c) for c in range(10)], lambda i: b""), size, "center", threads)
        self._digits = pixels

    def read(self, indices: Sequence[int] | np.ndarray | Tensor, seed: int = 0, counters: Tensor | None = None) -> Tensor:
        """(n,) indices -> (n, 3, size, size) uint8; every crop of a square at its own size is the square."""
        return digit_pixels(self._digits[checked_indices(indices, len(self), self.path)], self.size)

    def check(self, decode_all: bool = False) -> ImageCheck:
        """Nothing can be wrong with them; all are enlarged grey images."""
        return ImageCheck(len(self), len(self), len(self))


def _open_builtin(path: str, size: int, threads: int) -> DigitImages:
    if path not in BUILTIN:
        raise BadInput(f"{path}: no such builtin; expected one of {', '.join(BUILTIN)}")
    pixels, labels = digits(BUILTIN[path])
    digit_pixels(pixels[:1], size)  # refuses an impossible size here rather than at the first read
    return DigitImages(path, pixels, labels, size, threads)


def _spans(start: int, stop: int, length: int, border: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut into pieces of `length`, and at every multiple of `border`."""
    while start < stop:
        end = min(start + length, stop, (start // border + 1) * border)
        yield start, end
        start = end
