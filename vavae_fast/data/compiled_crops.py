"""The squares of `crops.py`, cut by csrc/resample.cpp: the same bits in a fraction of the time, without Python's lock."""

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from PIL import Image

from vavae_fast.data.crops import Cut, Resize, bilinear_square, center_crop, square
from vavae_kernels._extension import BuildError, library

_BOX, _BICUBIC = 0, 1  # enum Filter of resample.cpp
_FILTERS = {Image.Resampling.BOX: _BOX, Image.Resampling.BICUBIC: _BICUBIC}

PassOrder = Callable[[int, int, int, int], bool]
# Whether a resize from (w, h) to (W, H) goes down the columns first. Pillow rounds to 8 bits between its passes, so their order shows.
PASS_ORDERS: dict[str, PassOrder] = {
    "up to 12.1": lambda w, h, W, H: False,
    "12.2 and 12.3": lambda w, h, W, H: h > 100 * w and H < h,
    "13": lambda w, h, W, H: H < h and h - H > 2 * max(0, w - W),
}
_PROBES = (  # sizes in which those differ, then halvings and an enlargement
    (30, 3010, Resize(20, 2007, Image.Resampling.BICUBIC)),
    (40, 90, Resize(32, 72, Image.Resampling.BICUBIC)),
    (61, 47, Resize(30, 23, Image.Resampling.BOX)),
    (97, 64, Resize(48, 32, Image.Resampling.BICUBIC)),
    (20, 17, Resize(38, 32, Image.Resampling.BICUBIC)),
)


class NotExact(RuntimeError):
    """The compiled crops cannot be had, or do not give the bits of the Pillow that is installed: one line with the cause."""


class CompiledCrops:
    """Squares of decoded images. Safe from several threads."""

    def __init__(self, lib: ctypes.CDLL, down_first: PassOrder, plain: bool = False):
        """plain: without the processor's wide vectors."""
        self._resized, self._bilinear = lib.resized_crop, lib.bilinear_crop
        self.down_first, self._plain = down_first, plain
        pointer, integer, stride = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        self._resized.argtypes = [pointer, stride, *[integer] * 3, pointer, *[integer] * 5, pointer]
        self._bilinear.argtypes = [pointer, stride, *[integer] * 9, pointer]
        self._resized.restype = self._bilinear.restype = None

    def write(self, image: Image.Image, cut: Cut, out: np.ndarray) -> None:
        """The square of an RGB image -> out (3, size, size) uint8, contiguous."""
        if cut.crop == "bilinear":  # floats, which csrc has no part in
            out[:] = square(image, cut).transpose(2, 0, 1)
            return
        address, owner = _memory(image)
        self._cut(cut, address, 4, image.size, out)
        del owner

    def write_array(self, pixels: np.ndarray, cut: Cut, out: np.ndarray) -> None:
        """The same of pixels (H, W, 3) uint8, contiguous."""
        if cut.crop == "bilinear":
            out[:] = bilinear_square(torch.from_numpy(pixels), cut).permute(2, 0, 1).numpy()
            return
        height, width, channels = pixels.shape
        self._cut(cut, pixels.ctypes.data, channels, (width, height), out)

    def _cut(self, cut: Cut, address: int, channels: int, image_size: tuple[int, int], out: np.ndarray) -> None:
        assert out.shape == (3, cut.size, cut.size) and out.dtype == np.uint8 and out.flags.c_contiguous
        width, height = image_size
        where = (cut.left, cut.top, cut.size, self._plain, out.ctypes.data)
        source = (address, channels * width, channels, width, height)
        if cut.crop == "random":
            self._bilinear(*source, cut.resizes[0].width, cut.resizes[0].height, *where)
            return
        steps = []
        for resize in cut.resizes:
            steps += [resize.width, resize.height, _FILTERS[resize.filter], self.down_first(width, height, resize.width, resize.height)]
            width, height = resize.width, resize.height
        self._resized(*source, (ctypes.c_int32 * len(steps))(*steps), len(cut.resizes), *where)


@cache
def compiled_crops() -> CompiledCrops:
    """The crops in the pass order of the installed Pillow, held against it on a few small images. `NotExact` where they cannot be."""
    try:
        lib = library("resample", torch.device("cpu"))
    except BuildError as error:
        raise NotExact(str(error)) from error
    for order in PASS_ORDERS.values():
        crops = CompiledCrops(lib, order)
        if all(_agrees(crops, *probe) for probe in _PROBES):
            return crops
    raise NotExact("Pillow's resize gives other pixels than any version known here")


def _agrees(crops: CompiledCrops, width: int, height: int, resize: Resize) -> bool:
    """Whether the top left square of one resize of noise is Pillow's."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    cut = Cut("center", (resize,), 0, 0, min(resize.width, resize.height))
    found = np.empty((3, cut.size, cut.size), np.uint8)
    crops._cut(cut, noise.ctypes.data, 3, (width, height), found)
    return np.array_equal(found, center_crop(Image.fromarray(noise), cut).transpose(2, 0, 1))


def _memory(image: Image.Image) -> tuple[int, object]:
    """(address, what keeps the memory alive) of an RGB image: 4 bytes a pixel.

    Pillow's own memory through the Arrow C data interface; a copy where it has none (before 11.2) or lies in several blocks (large images).
    """
    try:
        owner = image.__arrow_c_array__()
    except (AttributeError, ValueError):
        owner = image.tobytes("raw", "RGBX")
        return ctypes.cast(owner, ctypes.c_void_p).value, owner
    pixels = _ArrowArray.from_address(_pointer(owner[1], b"arrow_array")).children[0].contents
    assert pixels.length == 4 * image.width * image.height and pixels.offset == 0
    return pixels.buffers[1], owner


class _ArrowArray(ctypes.Structure):
    """https://arrow.apache.org/docs/format/CDataInterface.html"""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64), ("null_count", ctypes.c_int64), ("offset", ctypes.c_int64), ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64), ("buffers", ctypes.POINTER(ctypes.c_void_p)), ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]  # fmt: skip
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
