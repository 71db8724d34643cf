"""One encoded image -> (size, size, 3) uint8, by Pillow, as the reference does it.

`center`: the centre crop of ADM (Dhariwal & Nichol 2021): halve with a box filter while the short side is at least
2 x size, resize the short side to size (bicubic), cut the middle. For extraction and reconstruction scores.
`random`: short side to size (bilinear without antialiasing, as taming-transformers does it with OpenCV), then a crop
at a random place. For training the tokenizer.
`bilinear`: short side to size (bilinear with antialiasing, torchvision's Resize of a float tensor), cut the middle. For
the scores of the reference's evaluate_tokenizer.py.

EXIF orientation is ignored, like there. Refused from the header: animations, more than 8 bits a channel, more than 64
million pixels. Grey, palette, CMYK and alpha become RGB. Small images are enlarged.
"""

import struct
import zlib
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, PpmImagePlugin, TiffImagePlugin, WebPImagePlugin

from vavae_fast.errors import BadInput

MAX_PIXELS = 64_000_000

# Told by content, not by name; constructors rather than Image.open, whose warning at 89 million pixels precedes our error.
_FORMATS = (
    (b"\xff\xd8\xff", JpegImagePlugin.jpeg_factory),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
)
_EIGHT_BIT_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
# What Pillow's readers raise on damaged bytes.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError, OverflowError)
_DAMAGE += (Image.DecompressionBombError,)


def read_header(data: bytes, name: str) -> Image.Image:
    """An image whose pixels are not decoded yet; `BadInput` names the file and the reason."""
    factory = _factory(data)
    if factory is None:
        raise BadInput(f"{name}: not an image (it starts with {data[:12]!r}); remove it, or fetch it again")
    try:
        image = factory(BytesIO(data))
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a photo with a preview, not a film
    except _DAMAGE as error:
        raise BadInput(f"{name}: damaged image header ({_reason(error)}); remove it, or fetch it again") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadInput(f"{name}: {width} x {height} pixels, at most {MAX_PIXELS // 10**6} million are read; shrink it, or remove it")
    if frames > 1:
        raise BadInput(f"{name}: {frames} frames, expected one image; save one frame, or remove it")
    if image.mode not in _EIGHT_BIT_MODES or _deep(image):
        raise BadInput(f"{name}: more than 8 bits a channel (Pillow mode {image.mode}); convert it to 8 bits")
    return image


def _factory(data: bytes):
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if data[:1] == b"P" and data[1:2].isdigit() and data[2:3].isspace():
        return PpmImagePlugin.PpmImageFile
    return next((factory for magic, factory in _FORMATS if data.startswith(magic)), None)


def _deep(image: Image.Image) -> bool:
    """Whether an image that Pillow would cut to 8 bits a channel has more: 16-bit RGB in PNG, PPM or TIFF."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8
    if isinstance(image, PpmImagePlugin.PpmImageFile):
        return any(isinstance(tile.args, tuple) and tile.args[-1] > 255 for tile in image.tile)
    return any(";16" in str(tile.args) for tile in image.tile)


def decode(data: bytes, name: str) -> Image.Image:
    """Encoded bytes -> RGB image at its own size; `BadInput` names the file and the reason."""
    image = read_header(data, name)
    try:
        image.load()
    except _DAMAGE as error:
        raise BadInput(f"{name}: damaged image ({_reason(error)}); remove it, or fetch it again") from None
    image.info.pop("transparency", None)  # alpha is dropped; with the key Pillow would warn about palettes
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def center_crop(image: Image.Image, size: int, name: str, place: tuple[float, float]) -> np.ndarray:
    """ADM's centre crop, to the bit: (size, size, 3) uint8. `place` has no say."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    width, height = _scaled(image, size, name)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def random_crop(image: Image.Image, size: int, name: str, place: tuple[float, float]) -> np.ndarray:
    """Short side to `size`, then the crop at `place` = (y, x), fractions in [0, 1) of the free room: (size, size, 3) uint8."""
    width, height = _scaled(image, size, name)
    top, left = int(place[0] * (height - size + 1)), int(place[1] * (width - size + 1))
    pixels = np.asarray(image)
    upper, lower, y = _neighbours(top, size, image.height / height, image.height)
    before, after, x = _neighbours(left, size, image.width / width, image.width)
    rows = _between(pixels[upper], pixels[lower], y[:, None, None])
    return np.rint(_between(rows[:, before], rows[:, after], x[:, None])).astype(np.uint8)


def bilinear_crop(image: Image.Image, size: int, name: str, place: tuple[float, float]) -> np.ndarray:
    """Short side to `size`, the long one rounded down, then the middle: (size, size, 3) uint8, rounded once. `place` has no say."""
    _scaled(image, size, name)
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    if (width, height) != image.size:
        pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    left, top = round((width - size) / 2), round((height - size) / 2)
    middle = pixels[0, :, top : top + size, left : left + size]
    return (middle + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def _neighbours(first: int, count: int, scale: float, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For output pixels first .. first + count: the two source pixels around each and the weight of the second."""
    centre = np.clip((np.arange(first, first + count) + 0.5) * scale - 0.5, 0, length - 1)
    low = np.floor(centre).astype(np.int64)
    return low, np.minimum(low + 1, length - 1), (centre - low).astype(np.float32)


def _between(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    a = a.astype(np.float32, copy=False)
    return a + (b - a) * weight


def _scaled(image: Image.Image, size: int, name: str) -> tuple[int, int]:
    """(width, height) with the short side at `size`; Python's round, halves to even, is the reference's."""
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if width * height > MAX_PIXELS:
        raise BadInput(f"{name}: {image.width} x {image.height} pixels is too narrow: {width} x {height} at short side {size}; remove it")
    return width, height


CROPS = {"center": center_crop, "random": random_crop, "bilinear": bilinear_crop}
