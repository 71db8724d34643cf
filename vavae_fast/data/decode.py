"""One encoded image -> RGB pixels, by Pillow.

EXIF orientation is ignored, as by the reference. Refused from the header: animations, more than 8 bits a channel, more than 64
million pixels. Grey, palette, CMYK and alpha become RGB.
"""

import struct
import zlib
from io import BytesIO

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
    return load(read_header(data, name), name)


def load(image: Image.Image, name: str) -> Image.Image:
    """The pixels of an image of `read_header`, as RGB."""
    try:
        image.load()
    except _DAMAGE as error:
        raise BadInput(f"{name}: damaged image ({_reason(error)}); remove it, or fetch it again") from None
    image.info.pop("transparency", None)  # alpha is dropped; with the key Pillow would warn about palettes
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
