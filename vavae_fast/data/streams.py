"""Training input without end: batches of images or latents in the order of `order.py`, made ahead in threads.

Every batch says where its samples stand in the run (`index`), which is what all randomness is counted by: noise, times,
label drops, flips, crops. Starting at step s is a seek; any number of processes sees the same global batches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from vavae_fast import rng
from vavae_fast.data.images import ImageBatch, Images
from vavae_fast.data.latents import Latents
from vavae_fast.data.order import RunOrder, check_shares, micro_batches
from vavae_fast.data.prefetch import Buffers, ahead
from vavae_fast.data.resident import ResidentLatents
from vavae_fast.errors import BadInput

_ATTEMPTS = 8  # substitutes tried in the place of an unreadable image
_NAMED = 20  # unreadable images that are named one by one


@dataclass(frozen=True)
class LatentBatch:
    """latents (B, C, H, W) float32 normalised, labels (B,) int64, index (B,) int64: positions in the whole run."""

    latents: Tensor
    labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class _Rows:
    """As read: latents and, of means, their std (B, C, H, W) float32, labels (B,) int64, index (B,) int64."""

    latents: Tensor
    std: Tensor | None
    labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class Share:
    """What one process takes of each step: `global_batch / world` samples, `micro_batch` at a time (None: all at once), neighbouring ones
    or every `in_turn`-th micro-batch, see `order.micro_batches`."""

    global_batch: int
    rank: int = 0
    world: int = 1
    micro_batch: int | None = None
    in_turn: int = 1

    def __post_init__(self):
        check_shares(self.global_batch, self.world, self.micro)

    @property
    def micro(self) -> int:
        return self.micro_batch or max(self.global_batch // self.world, 1)

    @property
    def batches_per_step(self) -> int:
        return self.global_batch // (self.world * self.micro)

    def positions(self, start: int) -> Iterator[np.ndarray]:
        """(micro,) int64 positions, for ever, from step `start`."""
        return micro_batches(start, self.global_batch, self.rank, self.world, self.micro, self.in_turn)


class LatentStream:
    """Latents for LightningDiT: `share.batches_per_step` LatentBatches a step, on `device`.

    Each sample is mirrored with probability 1/2 (as the reference does it: `latents_flip` instead of `latents`); where the latents are
    means with standard deviations, drawn anew, by noise that is a function of (seed, position); normalised to (x - mean) / std when
    latent_norm, then multiplied by multiplier. threads read ahead; on a GPU the copy and the arithmetic run there. resident ("cpu" or a
    device): all latents are read into its memory first, by every process for itself.
    """

    def __init__(
        self,
        latents: Latents,
        seed: int,
        share: Share,
        latent_norm: bool = True,
        multiplier: float = 1.0,
        flip: bool = True,
        device: torch.device | str = "cpu",
        threads: int = 2,
        resident: torch.device | str | None = None,
    ):
        self.latents, self.seed, self.share, self.flip, self.threads = latents, seed, share, flip, threads
        self.device, self.multiplier = torch.device(device), multiplier
        self._order = RunOrder(seed, len(latents))
        self._buffers = Buffers((share.micro, *latents.shape))
        self._mean = latents.mean.to(self.device) if latent_norm else None
        self._std = latents.std.to(self.device) if latent_norm else None
        self._resident = ResidentLatents(latents, flip, torch.device(resident)) if resident is not None else None

    def batches(self, start: int = 0) -> Iterator[LatentBatch]:
        """From step `start` on, without end; close the iterator to end its threads."""
        on_cpu = self.device.type == "cpu"
        for batch in ahead(self._read, self.share.positions(start), depth=2 * self.threads, threads=self.threads):
            yield batch if on_cpu else self._normalised(batch)

    def _read(self, positions: np.ndarray) -> "_Rows | LatentBatch":
        """Finished on a CPU; for another device as read, in pinned memory or there already."""
        indices, mirrored = self._order(positions)
        mirrored &= self.flip
        latents, std = self._resident.read(indices, mirrored) if self._resident is not None else self._from_disk(indices, mirrored)
        rows = _Rows(latents, std, self.latents.labels[indices], torch.from_numpy(positions))
        if self.device.type == "cuda":
            return _Rows(*(t if t is None or t.is_cuda else t.pin_memory() for t in vars(rows).values()))
        return self._normalised(rows) if self.device.type == "cpu" else rows

    def _from_disk(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[Tensor, Tensor | None]:
        latents = self.latents.read(indices, mirrored, self._buffer())
        return latents, self.latents.read_std(indices, mirrored, self._buffer()) if self.latents.has_std else None

    def _buffer(self) -> Tensor:
        return torch.empty(self._buffers.shape, pin_memory=True) if self.device.type == "cuda" else self._buffers.take()

    def _normalised(self, rows: _Rows) -> LatentBatch:
        latents, labels, index = (t.to(self.device, non_blocking=True) for t in (rows.latents, rows.labels, rows.index))
        if rows.std is not None:
            std = rows.std.to(self.device, non_blocking=True)
            latents.addcmul_(std, rng.normal(self.seed, index, like=latents, stream=rng.Stream.POSTERIOR))
        if self._mean is not None:
            latents.sub_(self._mean).div_(self._std)
        if self.multiplier != 1.0:
            latents.mul_(self.multiplier)
        return LatentBatch(latents, labels, index)


class ImageStream:
    """Images for the tokenizer: `share.batches_per_step` ImageBatches a step; `index` = positions in the run.

    pixels and index are on `images.device`, copied from pinned memory: a pageable copy would wait for the steps before it.
    images: opened with crop="random"; the place of each crop is a function of (seed, position). flip: mirror with
    probability 1/2; the reference does not.

    An image that cannot be read is named through `say` and replaced by another, which is a function of (seed, position) as well. When
    more than `max_corrupt`, a share of all images, have turned out so, `BadInput`; each process counts those that it met.
    """

    def __init__(
        self,
        images: Images,
        seed: int,
        share: Share,
        flip: bool = False,
        max_corrupt: float = 0.0,
        say: Callable[[str], None] = print,
    ):
        self.images, self.seed, self.share, self.flip = images, seed, share, flip
        self.corrupt: set[int] = set()  # indices of images that could not be read
        self._allowed, self._say = int(max_corrupt * len(images)), say
        self._order, self._one_notes = RunOrder(seed, len(images)), Lock()

    def batches(self, start: int = 0) -> Iterator[ImageBatch]:
        """From step `start` on, without end; close the iterator to end its threads.

        A whole step is read ahead, for one's micro-batches are asked for at once; two at a time, as one may have fewer images than there are cores.
        """
        device = self.images.device
        for batch in ahead(self._read, self.share.positions(start), depth=max(2, self.share.batches_per_step), threads=2):
            yield replace(batch, pixels=batch.pixels.to(device, non_blocking=True), index=batch.index.to(device, non_blocking=True))

    def _read(self, positions: np.ndarray) -> ImageBatch:
        indices, mirrored = self._order(positions)
        counters = torch.from_numpy(positions)
        pixels, faults = self._pixels(indices, counters)
        for attempt in range(_ATTEMPTS):
            if not faults:
                break
            with self._one_notes:
                self._note({int(indices[row]): fault for row, fault in faults.items()})
            rows = np.fromiter(sorted(faults), np.int64)
            turns = _ATTEMPTS * counters[rows] + attempt
            indices[rows] = rng.integers(self.seed, turns, len(self.images), rng.Stream.SUBSTITUTE).numpy()
            others, again = self._pixels(indices[rows], counters[rows])
            pixels[rows] = others
            faults = {int(rows[row]): fault for row, fault in again.items()}
        if faults:
            raise BadInput(f"{faults[min(faults)]} ({_ATTEMPTS} others in its place were unreadable too)")
        if self.flip:
            for row in np.flatnonzero(mirrored).tolist():  # one by one: a mask would be asked of a GPU, behind all steps before it
                pixels[row] = pixels[row].flip(-1)
        if self.images.device.type == "cuda":
            pixels, counters = (t if t.is_cuda else t.pin_memory() for t in (pixels, counters))
        return ImageBatch(pixels, self.images.labels[indices], counters)

    def _pixels(self, indices: np.ndarray, counters: Tensor) -> tuple[Tensor, dict[int, BadInput]]:
        return self.images.try_read(indices, self.seed, counters if self.images.crop == "random" else None)

    def _note(self, faults: dict[int, BadInput]) -> None:
        """Count and name the images that failed for the first time."""
        for i, fault in faults.items():
            if i in self.corrupt:
                continue
            self.corrupt.add(i)
            if len(self.corrupt) > self._allowed:
                found = f"{len(self.corrupt)} of {len(self.images)} images cannot be read, {self._allowed} may be; the last: {fault}"
                raise BadInput(f"{self.images.path}: {found}; repair the data, or raise data.max_corrupt")
            if len(self.corrupt) <= _NAMED:
                self._say(f"left out and replaced: {fault}" + (" (those that follow are counted, not named)" if len(self.corrupt) == _NAMED else ""))
