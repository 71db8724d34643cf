"""Pictures of values, without a plotting library: arrays of numbers in, uint8 pixels out. `_html.py` draws what needs words."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vavae_fast.evaluation import similarity_map

# Colours at evenly spaced values. Signed: blue, white at 0, red. Rising: dark blue, green, yellow; as bright as the value is high.
SIGNED = ((33, 72, 160), (146, 180, 222), (247, 247, 247), (232, 150, 120), (165, 20, 40))
RISING = ((48, 18, 80), (49, 76, 138), (33, 130, 134), (84, 188, 96), (240, 228, 66))
_MARK = (255, 210, 0)
_INK, _PAPER = (59, 130, 208), (246, 247, 249)


def coloured(values: np.ndarray, low: float, high: float, colours: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """values, any shape -> (..., 3) uint8: `low` and below the first colour, `high` and above the last, between them in proportion."""
    place = np.clip((np.asarray(values, np.float64) - low) / (high - low), 0, 1) * (len(colours) - 1)
    stops = np.asarray(colours, np.float64)
    return np.stack([np.interp(place, np.arange(len(colours)), stops[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)


def similarity_rows(images: Tensor, maps: Sequence[Tensor], token: tuple[int, int] | None = None) -> Tensor:
    """Rows of a sheet: each image with the token's place framed, then the similarity map of each of `maps`, blue -1, white 0, red 1.

    images (B, 3, H, W) uint8, maps of (B, C, h, w), each on a grid of its own shape h x w -> (B * (1 + len(maps)), 3, H, W) uint8.
    """
    row, column = token or tuple(side // 2 for side in maps[0].shape[2:])
    columns = [framed(images.cpu(), (row, column), tuple(maps[0].shape[2:]))]
    for features in maps:
        cosines = similarity_map(features.cpu(), (row, column)).numpy()
        pixels = torch.from_numpy(coloured(cosines, -1.0, 1.0, SIGNED)).permute(0, 3, 1, 2)
        columns.append(F.interpolate(pixels, size=images.shape[2:], mode="nearest"))
    return torch.stack(columns, dim=1).flatten(0, 1)


def framed(images: Tensor, token: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """images (B, 3, H, W) uint8 with a yellow frame around what the token of a `grid` covers; the images given stay as they are."""
    top, bottom = (images.shape[2] * (token[0] + n) // grid[0] for n in (0, 1))
    left, right = (images.shape[3] * (token[1] + n) // grid[1] for n in (0, 1))
    colour = torch.tensor(_MARK, dtype=torch.uint8)[:, None, None]
    found = images.clone()
    thick = max(1, images.shape[2] // 128)
    inside = found[:, :, top + thick : bottom - thick, left + thick : right - thick].clone()
    found[:, :, top:bottom, left:right] = colour
    found[:, :, top + thick : bottom - thick, left + thick : right - thick] = inside
    return found


def differences(images: Tensor, others: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 twice -> the same: 128 where they agree, brighter where `others` is, in proportion; clipped beyond a quarter."""
    return (128 + 2 * (others.to(torch.int16) - images.to(torch.int16))).clamp(0, 255).to(torch.uint8)


def histograms(counts: np.ndarray, height: int = 64, bar: int = 3) -> np.ndarray:
    """counts (C, bins) -> (C, height, bins * bar, 3) uint8: a panel of bars each, the tallest bar of all panels as high as a panel."""
    counts = np.asarray(counts, np.float64)
    tops = np.rint(height * counts / max(counts.max(), 1)).astype(int)
    filled = np.arange(height)[::-1, None] < tops[:, None, :]
    return np.where(filled.repeat(bar, axis=2)[..., None], np.uint8(_INK), np.uint8(_PAPER))


def density_scatter(points: np.ndarray, density: np.ndarray, side: int = 720) -> np.ndarray:
    """points (N, 2) as dots, coloured by density (N,) from dark (none) to yellow (the most), the densest on top: (side, side, 3) uint8."""
    from PIL import Image, ImageDraw

    scale = 2  # drawn larger and shrunk, which smooths the dots' edges
    low, high = points.min(axis=0), points.max(axis=0)
    margin, radius = 12 * scale, (2.5 if len(points) <= 4000 else 1.6) * scale
    places = margin + (points - low) / np.maximum(high - low, 1e-12) * (side * scale - 2 * margin)
    colours = coloured(density, 0.0, max(float(density.max()), 1e-300), RISING)
    sheet = Image.new("RGB", (side * scale, side * scale), "white")
    draw = ImageDraw.Draw(sheet)
    for i in np.argsort(density, kind="stable"):
        x, y = places[i]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(int(c) for c in colours[i]))
    return np.asarray(sheet.resize((side, side), Image.Resampling.BOX))
