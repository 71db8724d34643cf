"""Latents that stay in memory: all rows of a folder, read once, gathered from then on."""

import numpy as np
import torch
from torch import Tensor

from vavae_fast import artifacts
from vavae_fast.data.latents import Latents
from vavae_fast.errors import BadInput

_ROWS_AT_ONCE = 4096
_FREE = 0.9  # part of the free memory that may be filled


class ResidentLatents:
    """Every latent, and with `flip` every mirrored one, on `device` in the dtype of the shards: the same bits as read from disk.

    ImageNet in fp16 with 32 channels of 16 x 16: 21 GB, 42 GB with `flip`; twice that with standard deviations. `BadInput` when
    they do not fit.
    """

    def __init__(self, latents: Latents, flip: bool, device: torch.device):
        count, sides = len(latents), 2 if flip else 1
        shape = (sides * count, *latents.shape)
        needed, free = (1 + latents.has_std) * torch.Size(shape).numel() * latents.dtype.itemsize, _free_bytes(device)
        if needed > _FREE * free:
            found = f"{artifacts.readable_bytes(needed)} of latents do not fit into {artifacts.readable_bytes(free)} of free {device.type} memory"
            raise BadInput(f"{latents.folder}: {found}; set data.latents_in=stream, data.flip=false, or extract in fp16")
        self.rows, self.count = torch.empty(shape, dtype=latents.dtype, device=device), count
        self.std = torch.empty_like(self.rows) if latents.has_std else None
        for first in range(0, len(self.rows), _ROWS_AT_ONCE):
            place = np.arange(first, min(first + _ROWS_AT_ONCE, len(self.rows)))
            self.rows[first : first + len(place)] = latents.read(place % count, place >= count)
            if self.std is not None:
                self.std[first : first + len(place)] = latents.read_std(place % count, place >= count)

    def read(self, indices: np.ndarray, mirrored: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """(n,) int64, (n,) bool -> (n, C, H, W) float32 on the device, not normalised; and their standard deviations, or None."""
        place = torch.from_numpy(indices + self.count * mirrored)
        if self.rows.is_cuda:
            place = place.pin_memory().to(self.rows.device, non_blocking=True)
        rows = self.rows.index_select(0, place).to(torch.float32)
        return rows, None if self.std is None else self.std.index_select(0, place).to(torch.float32)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
