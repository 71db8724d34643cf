"""The 1,797 handwritten digits that travel with the package, for demos and tests.

From E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, CC BY 4.0: its test set, as scikit-learn's `load_digits` has it. 8 x 8 pixels, values 0..16.
Enlarged by exact replication: the area mean then gives the digits back, which bicubic enlargement would not.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vavae_fast.errors import BadInput, require

SIDE, WHITE = 8, 16
BUILTIN = {"builtin:digits": "all", "builtin:digits/train": "train", "builtin:digits/test": "test"}


@lru_cache(maxsize=1)
def _bundle() -> tuple[Tensor, Tensor, Tensor]:
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as bundle:
        return tuple(torch.from_numpy(bundle[key]) for key in ("images", "labels", "test"))


def digits(split: str = "all") -> tuple[Tensor, Tensor]:
    """(N, 8, 8) uint8 in 0..16 and (N,) int64, in the order of the source.

    split: "all" (1,797), "train" (1,437) or "test" (360: 36 of each class, drawn once and kept in the bundle).
    """
    images, labels, test = _bundle()
    chosen = {"all": torch.ones_like(test), "train": ~test, "test": test}
    require(split in chosen, "split", split, "'all', 'train' or 'test'")
    return images[chosen[split]], labels[chosen[split]].to(torch.int64)


def digit_pixels(images: Tensor, size: int) -> Tensor:
    """(N, 8, 8) uint8 in 0..16 -> (N, 3, size, size) uint8 in 0..255; size is a multiple of 8."""
    require(size >= SIDE and size % SIDE == 0, "size", size, f"a multiple of {SIDE} for the builtin digits")
    grey = torch.round(images * (255 / WHITE)).to(torch.uint8)
    large = grey.repeat_interleave(size // SIDE, dim=1).repeat_interleave(size // SIDE, dim=2)
    return large.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


def digits_from_images(images: Tensor | np.ndarray, rounded: bool = False) -> Tensor:
    """The way back: (N, 3, H, W) or (N, H, W, 3) uint8 -> (N, 8, 8) float32 in 0..16, the area mean over colours and pixels.

    rounded: to whole numbers, as the originals are; then it undoes `digit_pixels` exactly.
    """
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]):
        raise BadInput(f"digits_from_images: expected (N, 3, H, W) or (N, H, W, 3) uint8, got {tuple(images.shape)} {images.dtype}")
    planes = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    n, _, height, width = planes.shape
    if height % SIDE or width % SIDE or not height or not width:
        raise BadInput(f"digits_from_images: height and width must be multiples of {SIDE}, got {height} x {width}")
    blocks = planes.reshape(n, 3, SIDE, height // SIDE, SIDE, width // SIDE).to(torch.float32)
    values = blocks.mean(dim=(1, 3, 5)) * (WHITE / 255)
    return values.round() if rounded else values
