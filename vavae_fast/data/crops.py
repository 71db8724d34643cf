"""Which square of an image is used, and how it is cut: by Pillow and NumPy, as the reference does it.

`center`: the centre crop of ADM (Dhariwal & Nichol 2021): halve with a box filter while the short side is at least
2 x size, resize the short side to size (bicubic), cut the middle. For extraction and reconstruction scores.
`random`: short side to size (bilinear without antialiasing, as taming-transformers does it with OpenCV), then a crop
at a random place. For training the tokenizer.
`bilinear`: short side to size (bilinear with antialiasing, torchvision's Resize of a float tensor), cut the middle. For
the scores of the reference's evaluate_tokenizer.py.

Small images are enlarged.

`compiled_crops.py` cuts the first two in less time, `device_crops.py` all on a GPU, where `bilinear` may round elsewhere.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vavae_fast.data.decode import MAX_PIXELS
from vavae_fast.errors import BadInput

CROPS = ("center", "random", "bilinear")


class Resize(NamedTuple):
    """One resize of an image to width x height."""

    width: int
    height: int
    filter: Image.Resampling


class Cut(NamedTuple):
    """What becomes of an image: resizes, one after the other, then the square of `size` whose corner is (left, top)."""

    crop: str
    resizes: tuple[Resize, ...]
    left: int
    top: int
    size: int


def cut_of(crop: str, image_size: tuple[int, int], size: int, name: str, place: tuple[float, float]) -> Cut:
    """Where the square lies in an image of (width, height). place = (y, x): fractions in [0, 1) of the free room, for "random".

    `BadInput` for an image so narrow that scaling it would take too much memory.
    """
    width, height = image_size
    resizes = []
    while crop == "center" and min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        resizes.append(Resize(width, height, Image.Resampling.BOX))
    short = min(width, height)
    if crop == "bilinear":
        wide, high = (size if side == short else int(size * side / short) for side in (width, height))
    else:
        wide, high = (round(side * (size / short)) for side in (width, height))  # halves to even, as the reference's
    if wide * high > MAX_PIXELS:
        raise BadInput(f"{name}: {width} x {height} pixels is too narrow: {wide} x {high} at short side {size}; remove it")
    resizes.append(Resize(wide, high, Image.Resampling.BICUBIC if crop == "center" else Image.Resampling.BILINEAR))
    if crop == "random":
        top, left = int(place[0] * (high - size + 1)), int(place[1] * (wide - size + 1))
    elif crop == "center":
        top, left = (high - size) // 2, (wide - size) // 2
    else:
        top, left = round((high - size) / 2), round((wide - size) / 2)
    return Cut(crop, tuple(resizes), left, top, size)


def center_crop(image: Image.Image, cut: Cut) -> np.ndarray:
    """ADM's centre crop, to the bit: (size, size, 3) uint8."""
    for width, height, resampling in cut.resizes:
        image = image.resize((width, height), resampling)
    return np.asarray(image)[cut.top : cut.top + cut.size, cut.left : cut.left + cut.size]


def random_crop(image: Image.Image, cut: Cut) -> np.ndarray:
    """Bilinear interpolation at the pixels of the square alone, in float32: (size, size, 3) uint8."""
    (resize,) = cut.resizes
    pixels = np.asarray(image)
    upper, lower, y = neighbours(cut.top, cut.size, image.height / resize.height, image.height)
    before, after, x = neighbours(cut.left, cut.size, image.width / resize.width, image.width)
    rows = _between(pixels[upper], pixels[lower], y[:, None, None])
    return np.rint(_between(rows[:, before], rows[:, after], x[:, None])).astype(np.uint8)


def neighbours(first: int, count: int, scale: float, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For output pixels first .. first + count: the two source pixels around each and the weight of the second."""
    centre = np.clip((np.arange(first, first + count) + 0.5) * scale - 0.5, 0, length - 1)
    low = np.floor(centre).astype(np.int64)
    return low, np.minimum(low + 1, length - 1), (centre - low).astype(np.float32)


def _between(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    a = a.astype(np.float32, copy=False)
    return a + (b - a) * weight


def bilinear_crop(image: Image.Image, cut: Cut) -> np.ndarray:
    """Antialiased bilinear in float32, rounded once: (size, size, 3) uint8."""
    return bilinear_square(torch.from_numpy(np.array(image)), cut).numpy()


def bilinear_square(pixels: Tensor, cut: Cut) -> Tensor:
    """The same of pixels (H, W, 3) uint8, on their device."""
    (resize,) = cut.resizes
    planes = pixels.permute(2, 0, 1)[None].float()
    if planes.shape[2:] != (resize.height, resize.width):
        planes = F.interpolate(planes, size=(resize.height, resize.width), mode="bilinear", align_corners=False, antialias=True)
    middle = planes[0, :, cut.top : cut.top + cut.size, cut.left : cut.left + cut.size]
    return (middle + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


_BY_PILLOW = {"center": center_crop, "random": random_crop, "bilinear": bilinear_crop}


def square(image: Image.Image, cut: Cut) -> np.ndarray:
    """(size, size, 3) uint8 of an RGB image."""
    return _BY_PILLOW[cut.crop](image, cut)


class PillowCrops:
    """Squares of decoded images, by the functions above."""

    def write(self, image: Image.Image, cut: Cut, out: np.ndarray) -> None:
        """The square of an RGB image -> out (3, size, size) uint8."""
        out[:] = square(image, cut).transpose(2, 0, 1)
