"""Between uint8 pixels and the range [-1, 1] of the models, as the reference rounds; and many images as one."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_unit(pixels: Tensor) -> Tensor:
    """uint8, any shape -> float32 in [-1, 1]: x / 127.5 - 1."""
    return pixels.float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1], any shape -> uint8: trunc(clamp(127.5 x + 128, 0, 255))."""
    return (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)


def image_grid(images: np.ndarray, columns: int | None = None, border: int = 2) -> Any:
    """(N, H, W, 3) uint8 -> one PIL image, row by row."""
    from PIL import Image

    n, h, w, _ = images.shape
    columns = columns or round(n**0.5) or 1
    rows = -(-n // columns)
    canvas = np.full((rows * (h + border) + border, columns * (w + border) + border, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = border + i // columns * (h + border), border + i % columns * (w + border)
        canvas[y : y + h, x : x + w] = image
    return Image.fromarray(canvas)
