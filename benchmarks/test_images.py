"""Images to squares on two cores: each backend against the plain loader in Pillow, which is written here.

    pytest benchmarks/test_images.py [VAVAE_PHOTOS=folder or .tar]

Without photos it draws some of the same sizes as ImageNet's.
"""

import io
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from vavae_fast.data import open_images
from vavae_fast.errors import BadInput

SIZE, THREADS, ROUNDS = 256, 2, 5
PHOTOS = Path(os.environ.get("VAVAE_PHOTOS", Path(__file__).parents[2] / "shared" / "data" / "imagenet_photos.tar"))
SIZES = [(500, 375)] * 10 + [(375, 500)] * 4 + [(500, 333)] * 4 + [(333, 500), (400, 300), (640, 480), (250, 200), (1024, 768), (300, 300)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    if PHOTOS.exists():
        return PHOTOS
    folder = tmp_path_factory.mktemp("photos")
    for k, size in enumerate(SIZES):
        grain = np.random.default_rng(k).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(grain).filter(ImageFilter.GaussianBlur(1)).save(folder / f"{k:02d}.jpg", quality=95)
    return folder


def adm_square(image: Image.Image) -> np.ndarray:
    """The centre crop as the public code has it."""
    while min(image.size) >= 2 * SIZE:
        image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
    scale = SIZE / min(image.size)
    pixels = np.array(image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC))
    top, left = (pixels.shape[0] - SIZE) // 2, (pixels.shape[1] - SIZE) // 2
    return pixels[top : top + SIZE, left : left + SIZE]


class PlainLoader:
    """What a data set of torchvision does, without its processes: open, convert, crop, to a tensor, stack."""

    def __init__(self, images):
        self.encoded = [images._source.read(i) for i in range(len(images))]
        self.pool = ThreadPoolExecutor(THREADS)

    def read(self, indices) -> torch.Tensor:
        return torch.stack(list(self.pool.map(self._square, indices)))

    def _square(self, i: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(self.encoded[i])).convert("RGB")
        return torch.from_numpy(adm_square(image)).permute(2, 0, 1).contiguous()


@pytest.mark.benchmark(group="host")
@pytest.mark.parametrize("backend", ["fast", "dali"])
def test_squares(benchmark, photos, guards, backend):
    """Decoded and cut by two threads, in turns with the plain loader; the guard is on the median of the ratios. The pixels are the same."""
    try:
        images = open_images(photos, size=SIZE, backend=backend, threads=THREADS)
    except BadInput as reason:
        pytest.skip(str(reason))
    plain, order = PlainLoader(images), range(len(images))
    assert torch.equal(images.read(order), plain.read(order))
    pairs = [(_seconds(plain, order), _seconds(images, order)) for _ in range(ROUNDS)]
    ratios = [slow / quick for slow, quick in pairs]
    benchmark.extra_info.update(images=len(order), over_plain=ratios, plain_per_second=len(order) / statistics.median(slow for slow, _ in pairs))
    benchmark.pedantic(lambda: images.read(order), rounds=3)
    ratio = statistics.median(ratios)
    print(f"\n{backend}: {len(order) / statistics.median(quick for _, quick in pairs):.0f} images a second, {ratio:.2f} x the plain loader")
    least = guards.host.images_over_plain
    assert ratio >= least, f"{backend}: {ratio:.2f} x the plain loader, the guard is {least:g}"


def _seconds(loader, order) -> float:
    began = time.perf_counter()
    loader.read(order)
    return time.perf_counter() - began
