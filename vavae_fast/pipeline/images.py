"""Images as Python code has them, and as the networks do."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vavae_fast.errors import BadInput, require
from vavae_fast.pixels import to_unit

OUTPUTS = ("pil", "np", "pt")


def as_output(pixels: Tensor, output_type: str) -> Any:
    """(N, 3, H, W) uint8 -> "pil": a list of images; "np": (N, H, W, 3), "pt": (N, 3, H, W), float32 in [0, 1]."""
    if output_type == "pt":
        return pixels.float() / 255
    from PIL import Image

    rows = pixels.permute(0, 2, 3, 1).numpy()
    return rows.astype(np.float32) / 255 if output_type == "np" else [Image.fromarray(image) for image in rows]


def as_input(images: Any) -> Tensor:
    """A PIL image or a list of them; an array (N, H, W, 3) or tensor (N, 3, H, W), uint8 or float in [0, 1] -> (N, 3, H, W) in [-1, 1]."""
    from PIL import Image

    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, list | tuple) and images and all(isinstance(image, Image.Image) for image in images):
        sizes = {image.size for image in images}
        require(len(sizes) == 1, "images", sorted(sizes), "of one size; crop or resize them")
        images = np.stack([np.asarray(image.convert("RGB")) for image in images])
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        found = f"{type(images).__name__} {tuple(getattr(images, 'shape', ()))}"
        raise BadInput(f"images: {found}; give PIL images, an array (N, H, W, 3) or a tensor (N, 3, H, W)")
    if images.dtype == torch.uint8:
        return to_unit(images)
    inside = images.is_floating_point() and bool(((images >= 0) & (images <= 1)).all())
    require(inside, "images", f"{images.dtype} from {images.min()} to {images.max()}", "uint8, or float in [0, 1]")
    return images.float() * 2 - 1
