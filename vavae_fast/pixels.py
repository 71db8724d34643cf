"""Between uint8 pixels and the range [-1, 1] of the models, as the reference rounds."""

import torch
from torch import Tensor


def to_unit(pixels: Tensor) -> Tensor:
    """uint8, any shape -> float32 in [-1, 1]: x / 127.5 - 1."""
    return pixels.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1], any shape -> uint8: trunc(clamp(127.5 x + 128, 0, 255))."""
    return (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)
