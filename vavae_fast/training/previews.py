"""Grids of samples while a run trains: image k of every grid starts from the same noise and has the same label, or shows the same image."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vavae_fast import artifacts
from vavae_fast.pixels import image_grid, to_uint8

_RANGE = 3.0  # standard deviations of a normalised latent that black to white spans


def preview_labels(count: int, classes: int) -> Tensor:
    """(count,) int64: classes evenly spread over all; each in turn where there are fewer classes than images."""
    k = torch.arange(count)
    return k % classes if classes < count else k * classes // count


def latent_pixels(latents: Tensor, enlarge: int) -> Tensor:
    """(N, C, h, w) normalised latents -> (N, 3, h · enlarge, w · enlarge) uint8: the first three channels as red, green and blue.

    What stands in for a decoder: layout shows, colours mean nothing.
    """
    channels = latents[:, [0, 1, 2]] if latents.shape[1] >= 3 else latents[:, :1].expand(-1, 3, -1, -1)
    return to_uint8(channels / _RANGE).repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)


def write_preview(folder: Path, step: int, latents: Tensor, pixels: Callable[[Tensor], Tensor], batch: int) -> Path:
    """samples/step_XXXXXXXX.png of normalised latents (N, C, h, w); pixels(batch of them) -> (n, 3, H, W) uint8."""
    with torch.no_grad():
        images = torch.cat([pixels(part).cpu() for part in latents.split(batch)])
    return write_grid(folder / "samples" / f"step_{step:08d}.png", images)


def write_grid(path: Path, images: Tensor, columns: int | None = None) -> Path:
    """images (N, 3, H, W) uint8, row by row, as one PNG: whole or not at all."""
    with artifacts.replacing(path) as temporary:
        image_grid(np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy()), columns).save(temporary, format="PNG")
    return path
