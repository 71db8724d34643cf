"""The squares of `crops.py` in PyTorch, for images that were decoded on a GPU: Pillow's integer arithmetic, to the bit.

Pillow resizes 8-bit pixels in two passes. Each output is a sum of inputs with weights of 22 bits after the point, rounded back to 8 bits.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vavae_fast.data.compiled_crops import PassOrder
from vavae_fast.data.crops import Cut, bilinear_square, neighbours

_PRECISION = 22
_SUPPORT = {Image.Resampling.BOX: 0.5, Image.Resampling.BICUBIC: 2.0}


def device_square(pixels: Tensor, cut: Cut, down_first: PassOrder) -> Tensor:
    """pixels (H, W, 3) uint8 -> (3, size, size) uint8, on their device."""
    if cut.crop == "bilinear":
        return bilinear_square(pixels, cut).permute(2, 0, 1).contiguous()
    if cut.crop == "random":
        return _random(pixels, cut)
    for step, (width, height, resampling) in enumerate(cut.resizes):
        last = step + 1 == len(cut.resizes)
        x = (cut.left, cut.size) if last else (0, width)
        y = (cut.top, cut.size) if last else (0, height)
        old_height, old_width = pixels.shape[:2]
        passes = [(1, old_width, width, x), (0, old_height, height, y)]
        for dim, old, new, (first, count) in reversed(passes) if down_first(old_width, old_height, width, height) else passes:
            pixels = _weighed(pixels, dim, *weights(old, new, resampling, first, count))
    return pixels.permute(2, 0, 1).contiguous()


def weights(old: int, new: int, resampling: Image.Resampling, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs first .. first + count of an axis resized from `old` to `new`: which inputs (count, taps) int64, with what weights, int32.

    Taps beyond the image have weight 0.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    support = _SUPPORT[resampling] * stretch
    centre = (np.arange(first, first + count) + 0.5) * scale
    begin = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), old)
    inputs = begin[:, None] + np.arange((end - begin).max())
    distance = (inputs - centre[:, None] + 0.5) * (1.0 / stretch)
    exact = np.where(inputs < end[:, None], _kernel(resampling, distance), 0.0)
    total = np.zeros(count)
    for tap in exact.T:  # in order: another order of summation rounds elsewhere
        total += tap
    fixed = exact / total[:, None] * (1 << _PRECISION)
    return np.minimum(inputs, old - 1), np.trunc(fixed + np.where(fixed < 0, -0.5, 0.5)).astype(np.int32)


def _kernel(resampling: Image.Resampling, x: np.ndarray) -> np.ndarray:
    if resampling == Image.Resampling.BOX:
        return ((x > -0.5) & (x <= 0.5)).astype(np.float64)
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _weighed(pixels: Tensor, dim: int, inputs: np.ndarray, weight: np.ndarray) -> Tensor:
    """One pass along `dim` of (H, W, 3)."""
    device = pixels.device
    taps = pixels.index_select(dim, torch.from_numpy(inputs.ravel()).to(device)).to(torch.int32).unflatten(dim, inputs.shape)
    shape = [1] * taps.ndim
    shape[dim : dim + 2] = inputs.shape
    total = (taps * torch.from_numpy(weight).to(device).view(shape)).sum(dim + 1, dtype=torch.int32)
    return ((total + (1 << (_PRECISION - 1))) >> _PRECISION).clamp_(0, 255).to(torch.uint8)


def _random(pixels: Tensor, cut: Cut) -> Tensor:
    (resize,) = cut.resizes
    height, width = pixels.shape[:2]
    axes = [(cut.top, height / resize.height, height), (cut.left, width / resize.width, width)]
    for dim, (first, scale, length) in enumerate(axes):
        low, high, weight = (torch.from_numpy(a).to(pixels.device) for a in neighbours(first, cut.size, scale, length))
        before, after = (pixels.index_select(dim, index).to(torch.float32) for index in (low, high))
        difference = (after - before) * weight.view(-1, *[1] * (2 - dim))  # a tensor of its own: the product is rounded
        pixels = before + difference
    return pixels.round().to(torch.uint8).permute(2, 0, 1).contiguous()
