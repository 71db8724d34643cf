"""One set of files through every backend: the same pixels, and the same line for each that is bad."""

import importlib.util
import io

import numpy as np
import pytest
import torch
from PIL import Image

from vavae_fast.data import open_images
from vavae_fast.errors import BadInput
from vavae_kernels._extension import BuildError, command


def installed(backend: str) -> str:
    """Why a backend cannot be had here; empty where it can."""
    if backend == "pil":
        return ""
    try:
        command("resample", "cpu")
    except BuildError as error:
        return str(error)
    if backend == "dali" and (importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None):
        return "needs NVIDIA DALI: pip install 'vavae-fast[dali]'"
    return ""


@pytest.fixture(params=["pil", "fast", "dali"])
def backend(request):
    if reason := installed(request.param):
        pytest.skip(reason)
    return request.param


def noise(width, height, mode="RGB"):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned(image):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn, which the reference does not make
    return encoded(image, "JPEG", exif=exif)


def film(format):
    return encoded(noise(8, 8), format, save_all=True, append_images=[noise(9, 9).resize((8, 8))])


GOOD = {
    "baseline.jpg": encoded(noise(50, 40), "JPEG", quality=90),
    "chroma halved.jpg": encoded(noise(51, 41), "JPEG", quality=75, subsampling=2),
    "progressive.jpg": encoded(noise(52, 42), "JPEG", progressive=True, subsampling=1),
    "grey.jpg": encoded(noise(53, 43, "L"), "JPEG"),
    "cmyk.jpg": encoded(noise(54, 44, "CMYK"), "JPEG"),
    "turned.jpg": turned(noise(55, 45)),
    "one pixel.png": encoded(noise(1, 1), "PNG"),
    "one pixel.jpg": encoded(noise(1, 1), "JPEG"),
    "thin.png": encoded(noise(200, 3), "PNG"),
    "tall.jpg": encoded(noise(20, 130), "JPEG"),
    "palette.gif": encoded(noise(30, 20, "P"), "GIF"),
    "alpha.png": encoded(noise(31, 21, "RGBA"), "PNG"),
    "lossy.webp": encoded(noise(32, 22), "WEBP"),
    "photo with a preview.jpg": film("MPO"),
    "junk after the end.jpg": encoded(noise(50, 40), "JPEG") + bytes(100),
}
JPEG = encoded(noise(64, 64), "JPEG")
BAD = {
    "cut.jpg": JPEG[: len(JPEG) // 2],
    "header only.jpg": JPEG[:100],
    "text.jpg": b"<html>404</html>",
    "empty.png": b"",
    "cut.png": encoded(noise(64, 64), "PNG")[:3000],
    "deep.png": encoded(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG"),
    "film.gif": film("GIF"),
    "bomb.ppm": b"P6 9000 9000 255\n",
}


def write(folder, files):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("crop, counters", [("center", None), ("random", torch.arange(len(GOOD)) + 5), ("bilinear", None)])
def test_pixels_do_not_depend_on_the_backend(tmp_path, backend, crop, counters):
    write(tmp_path, GOOD)
    expected = open_images(tmp_path, size=24, crop=crop, backend="pil").read(range(len(GOOD)), seed=3, counters=counters)
    found = open_images(tmp_path, size=24, crop=crop, backend=backend, threads=2).read(range(len(GOOD)), seed=3, counters=counters)
    assert torch.equal(found, expected)
    assert len({row.numpy().tobytes() for row in expected}) == len(GOOD)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_the_same_line_in_every_backend(tmp_path, backend, name):
    write(tmp_path, {"0.jpg": JPEG, name: BAD[name]})
    with pytest.raises(BadInput) as readable:
        open_images(tmp_path, size=24, backend="pil").read([0, 1])
    with pytest.raises(BadInput) as caught:
        open_images(tmp_path, size=24, backend=backend).read([0, 1])
    assert str(caught.value) == str(readable.value) and str(caught.value).startswith(f"{tmp_path / name}: ")


def test_bad_files_do_not_disturb_their_neighbours(tmp_path, backend):
    images = open_images(write(tmp_path, GOOD | BAD), size=24, backend=backend)
    pixels, faults = images.try_read(range(len(images)))
    bad = {k for k, name in enumerate(images.names) if name in BAD}
    assert set(faults) == bad and len(bad) == len(BAD)
    good = [k for k in range(len(images)) if k not in bad]
    assert torch.equal(pixels[good], open_images(tmp_path, size=24, backend="pil").read(good))


def test_more_images_than_go_through_dali_at_once(tmp_path, backend):
    write(tmp_path, {f"{k:03d}.jpg": encoded(noise(20 + k, 30), "JPEG") for k in range(70)})
    order = [*range(69, -1, -1), 3, 3]
    found = open_images(tmp_path, size=16, backend=backend, threads=2).read(order)
    assert torch.equal(found, open_images(tmp_path, size=16, backend="pil").read(order))
    assert open_images(tmp_path, size=16, backend=backend).read([]).shape == (0, 3, 16, 16)


@pytest.mark.gpu
def test_decoded_on_a_gpu_within_the_bound(tmp_path):
    """nvJPEG's transform rounds elsewhere: a level or two, and less than 1 on the mean. The rest of the way is to the bit."""
    if not torch.cuda.is_available() or (reason := installed("dali")):
        pytest.skip("needs a GPU" if not torch.cuda.is_available() else reason)
    write(tmp_path, GOOD)
    images = open_images(tmp_path, size=24, backend="dali")
    images.device = torch.device("cuda")
    found, expected = images.read(range(len(GOOD))), open_images(tmp_path, size=24, backend="pil").read(range(len(GOOD)))
    difference = (found.cpu().int() - expected.int()).abs()
    assert found.is_cuda and difference.float().mean() < 1 and difference.max() <= 8


@pytest.mark.gpu
def test_reading_on_a_gpu_does_not_wait_for_the_training(tmp_path):
    if not torch.cuda.is_available() or (reason := installed("dali")):
        pytest.skip("needs a GPU" if not torch.cuda.is_available() else reason)
    write(tmp_path, {f"{k}.jpg": JPEG for k in range(70)})  # more than go through at once
    images = open_images(tmp_path, size=24, backend="dali")
    images.device = torch.device("cuda")
    alone = images.read(range(70))  # with all that is built once
    torch.cuda._sleep(10**10)  # cycles, some seconds: steps in the queue of this stream
    steps = torch.cuda.current_stream().record_event()
    beside = images.read(range(70))
    assert not steps.query()
    assert torch.equal(beside, alone)
