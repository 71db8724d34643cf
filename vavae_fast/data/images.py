"""Images, decoded and cropped to squares: what the tokenizer is trained on and what it encodes.

Decoding runs in threads (Pillow and csrc release the GIL), so there are no worker processes to lose or to hang.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vavae_fast import rng
from vavae_fast.data.builtin import BUILTIN, digit_pixels, digits
from vavae_fast.data.compiled_crops import CompiledCrops, NotExact, compiled_crops
from vavae_fast.data.crops import CROPS, Cut, PillowCrops, cut_of
from vavae_fast.data.dali import DaliDecoder, require_dali, takes
from vavae_fast.data.decode import decode, load, read_header
from vavae_fast.data.device_crops import device_square
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
    """What `Images.check` found: how many images there are, are below the crop size, become RGB from something else, cannot be read."""

    images: int
    enlarged: int
    converted: int
    bad: int


BACKENDS = ("auto", "pil", "fast", "dali")


def open_images(path: str | Path, size: int = 256, crop: str = "center", backend: str = "auto", threads: int | None = None) -> "Images":
    """Folder, class folders (ILSVRC layout too), .zip, .tar, .parquet, a folder or a pattern of such shards, a data set of Hugging Face's
    save_to_disk, or "builtin:digits".

    crop: "center", ADM's for extraction and scores; "random", the tokenizer's training crop; "bilinear", of the
    reference's tokenizer scores. backend: "pil" decodes and cuts by
    Pillow, the readable reference; "fast" cuts by csrc, the same bits; "dali" decodes by NVIDIA DALI, the same bits on a CPU; "auto" is
    "fast" where it can be had, else "pil". threads: for decoding; default one a core of the machine. `BadInput` names what is
    wrong, before any pixel is decoded.
    """
    require(isinstance(size, int) and size >= 1, "size", size, "an integer above 0")
    require(crop in CROPS, "crop", crop, " or ".join(repr(name) for name in CROPS))
    require(backend in BACKENDS, "backend", backend, "'auto', 'pil', 'fast' or 'dali'")
    if backend == "dali":
        require_dali()
    threads = threads or os.cpu_count() or 1
    if str(path).startswith("builtin:"):
        return _open_builtin(str(path), size, threads)
    source = open_source(Path(path))
    return Images(str(path), source, size, crop, threads, backend)


def _crops(backend: str) -> tuple[PillowCrops | CompiledCrops, str]:
    """What cuts squares, and the words that say which it is."""
    if backend == "pil":
        return PillowCrops(), "pil"
    try:
        return compiled_crops(), "dali" if backend == "dali" else "fast"
    except NotExact as error:
        if backend != "auto":
            raise BadInput(f"backend {backend!r}: {error}; use backend 'pil'") from error
        return PillowCrops(), f"pil, at half the speed: {error}"


class Images:
    """`len`, `labels` (N,) int64 (-1: no class), `classes` (sorted names), `names`, `read`, `batches`, `check`.

    backend: the words for what decodes and cuts. device: where "dali" decodes and leaves the pixels; may be set before the first read.
    """

    def __init__(self, path: str, source: Source, size: int, crop: str, threads: int, backend: str = "auto"):
        self.path, self.size, self.crop, self.threads = path, size, crop, threads
        self.names, self.labels, self.classes = source.names, source.labels, source.classes
        self.device = torch.device("cpu")
        self._source, self._by_dali = source, backend == "dali"
        self._cutter, self.backend = _crops(backend)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    @cached_property
    def _dali(self) -> DaliDecoder:
        return DaliDecoder(self.device, self.threads)

    def read(self, indices: Sequence[int] | np.ndarray | Tensor, seed: int = 0, counters: Tensor | None = None) -> Tensor:
        """(n,) indices -> (n, 3, size, size) uint8, in the order asked.

        For crop "random" the place of crop k is a function of (seed, counters[k]); counters (n,) default to the indices.
        `IndexError` outside [0, len); `BadInput` names an image that cannot be decoded. Safe from several threads.
        """
        pixels, faults = self.try_read(indices, seed, counters)
        if faults:
            raise faults[min(faults)]
        return pixels

    def try_read(
        self, indices: Sequence[int] | np.ndarray | Tensor, seed: int = 0, counters: Tensor | None = None
    ) -> tuple[Tensor, dict[int, BadInput]]:
        """As `read`, with what is wrong with row k instead of an error; the pixels of such a row are undefined."""
        indices = checked_indices(indices, len(self), self.path)
        places = self._places(indices, seed, counters)
        if self._by_dali:
            return self._read_by_dali(indices, places)
        pixels = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        rows = pixels.numpy()

        def fill(k: int) -> None:
            name, data = self._encoded(int(indices[k]))
            image = decode(data, name)
            self._cutter.write(image, self._cut(image.size, name, places[k]), rows[k])

        return pixels, _faults(self._pool.map(_caught(fill), range(len(indices))))

    def _cut(self, image_size: tuple[int, int], name: str, place: tuple[float, float]) -> Cut:
        return cut_of(self.crop, image_size, self.size, name, place)

    def _encoded(self, i: int) -> tuple[str, bytes]:
        """Image i: its name for messages, its bytes."""
        return f"{self.path}/{self.names[i]}", self._source.read(i)

    def _read_by_dali(self, indices: np.ndarray, places: list[tuple[float, float]]) -> tuple[Tensor, dict[int, BadInput]]:
        beside = self._dali.stream
        with torch.cuda.stream(beside):
            pixels = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8, device=self.device)
        found: dict[int, Tensor | None] = {}

        def header(k: int) -> tuple[str, bytes, bool]:
            name, data = self._encoded(int(indices[k]))
            return name, data, takes(read_header(data, name))

        def cut(k: int) -> None:
            name, data, _ = headers[k]
            image = found.get(k)
            if image is None:  # not for DALI, or it failed: Pillow has the last word
                image = torch.from_numpy(np.array(load(read_header(data, name), name)))
            where = self._cut((image.shape[1], image.shape[0]), name, places[k])
            if pixels.is_cuda:
                with torch.cuda.stream(beside):  # each thread has a present stream of its own
                    pixels[k] = device_square(image.to(self.device), where, self._cutter.down_first)
            else:
                self._cutter.write_array(image.numpy(), where, pixels[k].numpy())

        headers = list(self._pool.map(_caught(header), range(len(indices))))
        faults = _faults(headers)
        good = [k for k in range(len(indices)) if k not in faults]
        given = [k for k in good if headers[k][2]]
        found.update(zip(given, self._dali.decode([headers[k][1] for k in given])))
        faults |= {good[k]: fault for k, fault in _faults(self._pool.map(_caught(cut), good)).items()}
        if pixels.is_cuda:
            beside.synchronize()
            pixels.record_stream(torch.cuda.current_stream(self.device))  # where they are used: their memory is not for the next read before
        return pixels, faults

    def _places(self, indices: np.ndarray, seed: int, counters: Tensor | None) -> list[tuple[float, float]]:
        if self.crop != "random":
            require(counters is None, "counters", counters, f'left out: crop "{self.crop}" has one place')
            return [(0.5, 0.5)] * len(indices)
        counters = torch.from_numpy(indices) if counters is None else torch.as_tensor(counters, dtype=torch.int64)
        both = torch.stack((2 * counters, 2 * counters + 1), dim=1).flatten()
        return list(map(tuple, rng.uniform(seed, both, rng.Stream.CROP).view(-1, 2).tolist()))

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

    def check(self, decode_all: bool = False, allowed: int = 0) -> ImageCheck:
        """Look at every header, or decode every image; `BadInput` counts the bad ones, where there are more than `allowed`, and names the first."""

        def look(i: int) -> tuple[bool, bool]:
            name, data = self._encoded(i)
            image = read_header(data, name)
            facts = min(image.size) < self.size, image.mode != "RGB"
            if decode_all:
                load(image, name)
            return facts

        found = list(self._pool.map(_caught(look), range(len(self))))
        bad = _faults(found)
        if len(bad) > allowed:
            others = f" ({len(bad)} of {len(self)} images are bad; this is the first)" if len(bad) > 1 else ""
            raise BadInput(str(bad[min(bad)]) + others)
        good = [facts for i, facts in enumerate(found) if i not in bad]
        return ImageCheck(len(self), sum(small for small, _ in good), sum(other for _, other in good), len(bad))

    def fingerprint(self) -> str:
        """sha256 of names and labels, for manifests: the same images in the same order under the same labels."""
        digest = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogateescape"))
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


class DigitImages(Images):
    """The bundled digits: no bytes to decode, only pixels to enlarge."""

    def __init__(self, path: str, pixels: Tensor, labels: Tensor, size: int, threads: int):
        names = [f"{k:04d}" for k in range(len(labels))]
        super().__init__(path, Source(names, labels, [str(c) for c in range(10)], lambda i: b""), size, "center", threads, "pil")
        self._digits = pixels

    def try_read(
        self, indices: Sequence[int] | np.ndarray | Tensor, seed: int = 0, counters: Tensor | None = None
    ) -> tuple[Tensor, dict[int, BadInput]]:
        """(n,) indices -> (n, 3, size, size) uint8; every crop of a square at its own size is the square."""
        return digit_pixels(self._digits[checked_indices(indices, len(self), self.path)], self.size), {}

    def check(self, decode_all: bool = False, allowed: int = 0) -> ImageCheck:
        """Nothing can be wrong with them; all are enlarged grey images."""
        return ImageCheck(len(self), len(self), len(self), 0)


def _open_builtin(path: str, size: int, threads: int) -> DigitImages:
    if path not in BUILTIN:
        raise BadInput(f"{path}: no such builtin; expected one of {', '.join(BUILTIN)}")
    pixels, labels = digits(BUILTIN[path])
    digit_pixels(pixels[:1], size)  # refuses an impossible size here rather than at the first read
    return DigitImages(path, pixels, labels, size, threads)


def _caught(work: Callable[[int], Any]) -> Callable[[int], Any]:
    """`work`, with a `BadInput` as its result where it would have been raised."""

    def attempt(k: int) -> Any:
        try:
            return work(k)
        except BadInput as error:
            return error

    return attempt


def _faults(results: Iterable[Any]) -> dict[int, BadInput]:
    return {k: result for k, result in enumerate(results) if isinstance(result, BadInput)}


def _spans(start: int, stop: int, length: int, border: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut into pieces of `length`, and at every multiple of `border`."""
    while start < stop:
        end = min(start + length, stop, (start // border + 1) * border)
        yield start, end
        start = end
