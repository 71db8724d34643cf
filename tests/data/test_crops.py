"""Squares cut by csrc and by PyTorch against Pillow and NumPy: the same bits, for every size, pass order and way into the memory."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vavae_fast.data import compiled_crops as module
from vavae_fast.data import open_images
from vavae_fast.data.compiled_crops import PASS_ORDERS, CompiledCrops, NotExact, compiled_crops
from vavae_fast.data.crops import Cut, Resize, cut_of, square
from vavae_fast.data.device_crops import device_square
from vavae_fast.data.images import Images
from vavae_fast.errors import BadInput
from vavae_kernels._extension import BuildError, command, library

PHOTOS = Path(os.environ.get("VAVAE_PHOTOS", Path(__file__).parents[3] / "shared" / "data" / "imagenet_photos.tar"))
# Wide and tall, odd and even, halved up to three times, enlarged, one pixel, thin, the square itself.
SIZES = [(32, 32), (33, 47), (47, 33), (64, 64), (127, 65), (63, 200), (200, 63), (300, 257), (301, 129), (20, 9), (1, 1), (2, 1), (3, 100), (100, 3),
         (35, 33), (33, 35), (48, 72), (40, 97), (31, 32)]  # fmt: skip


def compiler() -> bool:
    try:
        command("resample", "cpu")
    except BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not compiler(), reason="needs a C++ compiler")


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def written(crops, image, cut):
    out = np.full((3, cut.size, cut.size), 7, np.uint8)
    crops.write(image, cut, out)
    return out


@pytest.fixture(params=["vectors", "plain"])
def crops(request):
    """In the order of the installed Pillow."""
    if not compiler():
        pytest.skip("needs a C++ compiler")
    return CompiledCrops(library("resample", torch.device("cpu")), compiled_crops().down_first, plain=request.param == "plain")


LAST = 1 - 2**-24  # the largest that is drawn


@pytest.mark.parametrize("crop, place", [("center", (0.5, 0.5)), ("random", (0.0, 0.0)), ("random", (0.3, 0.8)), ("random", (LAST, LAST))])
@pytest.mark.parametrize("size", [8, 31, 32])
def test_compiled_squares_are_pillows(crops, crop, place, size):
    for width, height in SIZES:
        image = noise(width, height)
        cut = cut_of(crop, image.size, size, "x", place)
        expected = square(image, cut).transpose(2, 0, 1)
        assert np.array_equal(written(crops, image, cut), expected), (width, height)
        out = np.empty_like(expected, order="C")
        crops.write_array(np.array(image), cut, out)  # 3 bytes a pixel
        assert np.array_equal(out, expected), (width, height)


def test_hard_edges_overshoot_alike(crops):
    """Black on white: bicubic weights below 0 push sums out of [0, 255] on both sides."""
    pixels = np.zeros((90, 70, 3), np.uint8)
    pixels[:, ::7], pixels[::5] = 255, 255
    image = Image.fromarray(pixels)
    for size in (40, 69, 120):
        cut = cut_of("center", image.size, size, "x", (0, 0))
        assert np.array_equal(written(crops, image, cut), square(image, cut).transpose(2, 0, 1))


@needs_compiler
def test_sizes_drawn_at_random():
    draw = np.random.default_rng(1)
    for k in range(300):
        width, height, size = draw.integers(1, 90), draw.integers(1, 90), draw.integers(1, 50)
        image, crop = noise(width, height, k), ("center", "random")[k % 2]
        cut = cut_of(crop, image.size, int(size), "x", tuple(draw.random(2)))
        assert np.array_equal(written(compiled_crops(), image, cut), square(image, cut).transpose(2, 0, 1)), (crop, width, height, size)


@pytest.mark.parametrize("version", PASS_ORDERS)
@needs_compiler
def test_two_writings_of_pillows_arithmetic_agree_in_every_order(version):
    """csrc and PyTorch, also in the orders of the versions of Pillow that are not installed."""
    order = PASS_ORDERS[version]
    crops = CompiledCrops(library("resample", torch.device("cpu")), order)
    for width, height in [*SIZES, (3, 320)]:
        image = noise(width, height)
        for crop in ("center", "random"):
            cut = cut_of(crop, image.size, 24, "x", (0.4, 0.6))
            ours = device_square(torch.from_numpy(np.array(image)), cut, order)
            assert np.array_equal(written(crops, image, cut), ours.numpy()), (crop, width, height)


def test_antialiased_bilinear_is_one_function_everywhere():
    image = noise(61, 47)
    cut = cut_of("bilinear", image.size, 24, "x", (0, 0))
    expected = square(image, cut).transpose(2, 0, 1)
    assert np.array_equal(device_square(torch.from_numpy(np.array(image)), cut, PASS_ORDERS["13"]).numpy(), expected)
    if compiler():
        assert np.array_equal(written(compiled_crops(), image, cut), expected)


@needs_compiler
def test_the_probes_tell_the_pass_orders_apart():
    """Each order gives other pixels than each other one on some probe, or compiled_crops could take the wrong one."""
    lib = library("resample", torch.device("cpu"))
    found = {}
    for version, order in PASS_ORDERS.items():
        squares = []
        for width, height, resize in module._PROBES:
            image = noise(width, height)
            squares.append(written(CompiledCrops(lib, order), image, Cut("center", (resize,), 0, 0, min(resize.width, resize.height))).tobytes())
        found[version] = b"".join(squares)
    assert len(set(found.values())) == len(PASS_ORDERS)


@needs_compiler
def test_memory_in_several_blocks_and_memory_without_arrow(monkeypatch):
    """Pillow splits images above 16 MB; before 11.2 it did not show its memory."""
    large = Image.effect_noise((2300, 2100), 60).convert("RGB")
    with pytest.raises(ValueError):
        large.__arrow_c_array__()
    cut = cut_of("random", large.size, 64, "x", (0.5, 0.5))
    assert np.array_equal(written(compiled_crops(), large, cut), square(large, cut).transpose(2, 0, 1))
    small = noise(50, 40)
    cut = cut_of("center", small.size, 24, "x", (0, 0))
    monkeypatch.delattr(Image.Image, "__arrow_c_array__")
    assert np.array_equal(written(compiled_crops(), small, cut), square(small, cut).transpose(2, 0, 1))


@pytest.fixture
def forgotten():
    """compiled_crops looks anew, before the test and after it."""
    compiled_crops.cache_clear()
    yield
    compiled_crops.cache_clear()


@needs_compiler
def test_a_pillow_of_unknown_pixels_is_not_imitated(monkeypatch, forgotten, tmp_path):
    noise(20, 17).save(tmp_path / "1.png")
    monkeypatch.setattr(module, "PASS_ORDERS", {"of the future": lambda w, h, W, H: True})
    with pytest.raises(NotExact, match="other pixels than any version known"):
        compiled_crops()
    images = open_images(tmp_path, size=8)
    assert images.backend.startswith("pil, at half the speed: Pillow's resize gives other pixels")
    assert torch.equal(images.read([0]), open_images(tmp_path, size=8, backend="pil").read([0]))
    with pytest.raises(BadInput, match="backend 'fast': Pillow's resize"):
        open_images(tmp_path, size=8, backend="fast")


def test_without_a_compiler_auto_says_so_and_fast_is_refused(monkeypatch, forgotten, tmp_path):
    def none(name, device):
        raise BuildError("no C++ compiler: install g++")

    noise(20, 17).save(tmp_path / "1.png")
    monkeypatch.setattr(module, "library", none)
    assert open_images(tmp_path, size=8).backend == "pil, at half the speed: no C++ compiler: install g++"
    with pytest.raises(BadInput, match="backend 'fast': no C\\+\\+ compiler: install g\\+\\+; use backend 'pil'"):
        open_images(tmp_path, size=8, backend="fast")


@pytest.mark.skipif(not PHOTOS.is_file(), reason="no photos: set VAVAE_PHOTOS to a folder or .tar of them")
@pytest.mark.parametrize("crop", ["center", "random"])
@needs_compiler
def test_photos_at_full_size(crop):
    readable, fast = (open_images(PHOTOS, size=256, crop=crop, backend=backend) for backend in ("pil", "fast"))
    some = range(0, len(readable), 5)
    assert torch.equal(fast.read(some), readable.read(some))


def test_cut_geometry_is_adms():
    assert cut_of("center", (500, 375), 256, "x", (0, 0)) == Cut("center", (Resize(341, 256, Image.Resampling.BICUBIC),), 42, 0, 256)
    halved = (Resize(1024, 768, Image.Resampling.BOX), Resize(512, 384, Image.Resampling.BOX), Resize(341, 256, Image.Resampling.BICUBIC))
    assert cut_of("center", (2048, 1536), 256, "x", (0, 0)).resizes == halved


def test_the_words_for_a_backend(tmp_path):
    noise(20, 17).save(tmp_path / "1.png")
    assert open_images(tmp_path, size=8, backend="pil").backend == "pil"
    if compiler():
        assert open_images(tmp_path, size=8).backend == open_images(tmp_path, size=8, backend="fast").backend == "fast"
    assert isinstance(open_images("builtin:digits", size=8), Images) and open_images("builtin:digits", size=8).backend == "pil"
