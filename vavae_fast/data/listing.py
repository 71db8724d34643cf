"""What every kind of image source shares: names and a way to read one, which files count, how large one may be."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vavae_fast.errors import BadInput

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
LABEL_FILE, LABEL_SUFFIX = "dataset.json", ".cls"  # EDM2's and WebDataset's
_MAX_BYTES = 1 << 28  # of one encoded file: 64 million pixels as uncompressed TIFF fit


@dataclass(frozen=True)
class Listing:
    """The files of a folder or archive that matter here: names with "/" between components, and how to read the k-th."""

    names: list[str]
    read: Callable[[int], bytes]


@dataclass(frozen=True)
class Source:
    """names (N,) in sorted path order, labels (N,) int64, classes sorted; read(i) gives the encoded bytes of image i."""

    names: list[str]
    labels: Tensor
    classes: list[str]
    read: Callable[[int], bytes]


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def matters(name: str) -> bool:
    """Images and labels, but no hidden files (`._1.jpg` and `__MACOSX` are what macOS leaves in archives)."""
    return not is_hidden(name) and (is_image(name) or name.endswith(LABEL_SUFFIX) or name == LABEL_FILE)


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def check_size(name: str, size: int) -> None:
    if size > _MAX_BYTES:
        raise BadInput(f"{name}: {size} bytes, at most {_MAX_BYTES} are read; shrink or remove it")
