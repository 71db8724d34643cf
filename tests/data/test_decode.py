"""Crops against their definitions, written out; and every kind of file that must be refused by name."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vavae_fast.data import crops
from vavae_fast.data.crops import CROPS, cut_of
from vavae_fast.data.decode import decode
from vavae_fast.errors import BadInput

PLACE = (0.0, 0.0)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def square(crop, image, size, place=PLACE):
    return crops.square(image, cut_of(crop, image.size, size, "x", place))


def adm_crop(image, size):
    """The definition of ADM, as one halving loop and one cut."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
    factor = size / min(image.size)
    array = np.array(image.resize(tuple(round(side * factor) for side in image.size), Image.BICUBIC))
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


@pytest.mark.parametrize("width, height", [(32, 32), (33, 47), (127, 65), (64, 64), (63, 200), (301, 129), (20, 9), (37, 1)])
def test_center_crop_is_adms_to_the_bit(width, height):
    image = noise(width, height)
    assert np.array_equal(square("center", image, 32), adm_crop(image, 32))


def triangle(count, length):
    """(count, length) float64: each of `count` outputs as a mean of `length` inputs, weighted by a triangle as wide as what it covers."""
    scale = length / count
    centre = (np.arange(count) + 0.5) * scale
    weight = np.maximum(0, 1 - np.abs((np.arange(length) + 0.5 - centre[:, None]) / max(scale, 1)))
    return weight / weight.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("width, height", [(32, 32), (33, 47), (127, 65), (64, 64), (63, 200), (301, 129), (20, 9)])
def test_bilinear_crop_averages_what_a_pixel_covers(width, height):
    """torchvision's Resize of a float tensor and CenterCrop: the long side rounded down, the middle by Python's round."""
    size, image, short = 32, noise(width, height), min(width, height)
    w, h = (size if side == short else size * side // short for side in (width, height))
    exact = np.einsum("yY,YXc,xX->yxc", triangle(h, height), np.array(image).astype(float), triangle(w, width))
    top, left = round((h - size) / 2), round((w - size) / 2)
    expected = exact[top : top + size, left : left + size]
    clear = np.abs(expected % 1 - 0.5) > 1e-3
    found = square("bilinear", image, size)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    assert np.array_equal(found[clear], np.floor(expected + 0.5)[clear]) and np.abs(found - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("width, height", [(32, 32), (33, 47), (127, 65), (200, 63), (20, 9)])
def test_random_crop_is_bilinear_interpolation_then_a_cut(width, height):
    """In float64 by torch; the two agree wherever the exact value is not within 1e-3 of a rounding border."""
    size, image = 32, noise(width, height)
    short = min(width, height)
    w, h = round(width * (size / short)), round(height * (size / short))
    exact = F.interpolate(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double(), (h, w), mode="bilinear")[0].permute(1, 2, 0)
    for place in ((0.0, 0.0), (0.5, 0.3), (1 - 2**-24, 1 - 2**-24)):
        top, left = math.floor(place[0] * (h - size + 1)), math.floor(place[1] * (w - size + 1))
        expected = exact[top : top + size, left : left + size].numpy()
        clear = np.abs(expected % 1 - 0.5) > 1e-3
        found = square("random", image, size, place)
        assert found.shape == (size, size, 3) and found.dtype == np.uint8
        assert np.array_equal(found[clear], np.rint(expected)[clear])
        assert np.abs(found - expected).max() <= 0.5 + 1e-3


def test_random_crop_reaches_both_borders():
    image = Image.fromarray(np.repeat(np.arange(40, dtype=np.uint8)[None, :, None], 8, 0).repeat(3, 2))
    assert square("random", image, 8)[0, 0, 0] == 0
    assert square("random", image, 8, (0.999, 0.999))[0, -1, 0] == 39


@pytest.mark.parametrize(
    "image, format",
    [
        (noise(9, 7).convert("L"), "PNG"),
        (noise(9, 7).convert("1"), "PNG"),
        (noise(9, 7).convert("P"), "GIF"),
        (noise(9, 7).convert("LA"), "PNG"),
        (noise(9, 7).convert("RGBA"), "WEBP"),
        (noise(9, 7).convert("CMYK"), "JPEG"),
        (noise(9, 7).convert("CMYK"), "TIFF"),
        (noise(9, 7), "BMP"),
        (noise(9, 7), "PPM"),
        (noise(9, 7).convert("L"), "PPM"),
        (noise(9, 7).convert("1"), "PPM"),
    ],
)
def test_eight_bit_images_of_any_kind_become_rgb(image, format, recwarn):
    data = encoded(image, format)
    found = decode(data, "x")
    assert found.mode == "RGB" and found.size == (9, 7)
    assert np.array_equal(np.array(found), np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    assert not recwarn.list


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert decode(encoded(noise(9, 7), "JPEG", exif=exif), "x").size == (9, 7)


def test_a_photo_with_an_embedded_preview_is_one_image():
    """Cameras write MPO: a JPEG whose second frame is a preview."""
    assert np.array_equal(np.array(decode(film("MPO"), "x")), np.array(Image.open(io.BytesIO(film("MPO"))).convert("RGB")))


def png(width, height, depth=8, color=2, body=b""):
    """A PNG written by hand: header, one data chunk, end."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def film(format):
    buffer = io.BytesIO()
    noise(8, 8).save(buffer, format, save_all=True, append_images=[noise(8, 8, 1), noise(8, 8, 2)])
    return buffer.getvalue()


JPEG = encoded(noise(64, 64), "JPEG")
BAD = {
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "damaged image"),
    "jpeg of a header": (JPEG[:100], "damaged image"),
    "truncated png": (encoded(noise(64, 64))[:4000], "damaged image"),
    "truncated webp": (encoded(noise(64, 64), "WEBP")[:500], "damaged image"),
    "png with a broken checksum": (encoded(noise(8, 8)).replace(b"IDAT", b"IDAT\xff", 1), "damaged image"),
    "empty": (b"", "not an image"),
    "html": (b"<html><body>404</body></html>", "not an image"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "not an image"),
    "audio in RIFF": (b"RIFF\x24\0\0\0WAVEfmt ", "not an image"),
    "tar called jpg": (b"Pictures/1.jpg" + bytes(500), "not an image"),
    "100 million pixels": (png(10_000, 10_000), "10000 x 10000 pixels"),
    "3.6 billion pixels": (png(60_000, 60_000), "60000 x 60000 pixels"),
    "zero width": (png(0, 8), "damaged image header"),
    "16-bit grey png": (png(2, 1, depth=16, color=0, body=bytes(5)), "8 bits"),
    "16-bit colour png": (png(2, 1, depth=16, color=2, body=bytes(13)), "8 bits"),
    "16-bit grey tiff": (encoded(Image.fromarray(np.zeros((4, 4), np.uint16)), "TIFF"), "8 bits"),
    "float tiff": (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "8 bits"),
    "16-bit ppm": (b"P6 1 1 65535\n" + bytes(6), "8 bits"),
    "16-bit pgm": (b"P5 1 1 65535\n" + bytes(2), "8 bits"),
    "animated gif": (film("GIF"), "3 frames"),
    "animated webp": (film("WEBP"), "3 frames"),
    "animated png": (film("PNG"), "3 frames"),
    "tiff of pages": (film("TIFF"), "3 frames"),
}


@pytest.mark.parametrize("data, reason", BAD.values(), ids=BAD.keys())
def test_bad_files_are_one_line_that_names_them(data, reason, recwarn):
    with pytest.raises(BadInput) as caught:
        decode(data, "photos/7.jpg")
    message = str(caught.value)
    assert message.startswith("photos/7.jpg: ") and reason in message and "\n" not in message
    assert not recwarn.list  # a warning would be a second line on the user's screen


def test_every_truncation_of_a_png_is_refused():
    data = encoded(noise(16, 16))
    for length in range(0, len(data) - 20, 7):
        with pytest.raises(BadInput):
            decode(data[:length], "x")


def test_a_thread_thin_image_does_not_blow_up():
    """1 x 1,000,000 at short side 64 would be 4 billion pixels."""
    thin = Image.new("RGB", (1, 1_000_000))
    for crop in CROPS:
        with pytest.raises(BadInput, match="x: 1 x 1000000 pixels is too narrow"):
            cut_of(crop, thin.size, 64, "x", PLACE)
