"""What samples are compared with, and the `.npz` layouts of ADM's evaluator (Dhariwal & Nichol 2021) for it and for samples.

Reference: mu, sigma of pool_3, mu_s, sigma_s of the spatial features, arr_0 images for precision and recall, as in
`VIRTUAL_imagenet256_labeled.npz`. Samples: arr_0, uint8 (N, H, W, 3). Nothing here unpickles.
"""

import io
import math
import tokenize
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vavae_fast import artifacts
from vavae_fast.artifacts import ZIP_FAULTS
from vavae_fast.errors import BadInput
from vavae_fast.evaluation.inputs import Array

_MOMENTS = (("mu", "sigma"), ("mu_s", "sigma_s"))
_MAX_FEATURES = 4096  # of moments; their covariance is 128 MB
_MAX_PIXELS = 64_000_000  # of an image, as of image files
_MAX_BATCH = 1 << 28  # bytes of images that are read together


@dataclass(frozen=True)
class ReferenceStatistics:
    """Moments of the reference's features, its images, or both; what is missing is computed from `images` when needed."""

    name: str  # stands in the result, with the hash
    sha256: str | None = None
    mu: np.ndarray | None = None  # (2048,)
    sigma: np.ndarray | None = None  # (2048, 2048)
    mu_s: np.ndarray | None = None  # (2023,)
    sigma_s: np.ndarray | None = None  # (2023, 2023)
    images: Iterable[Array] | None = None  # uint8 batches (n, 3, H, W)


def load_reference(path: Path | str, batch_size: int = 64) -> ReferenceStatistics:
    """Read moments now and open images lazily from `path`, an `.npz` with mu and sigma, with arr_0, or with both.

    `BadInput` names the file when it is missing, damaged, holds neither, or holds moments of wrong shape or with NaN.
    """
    path = Path(path)
    moments: dict[str, np.ndarray] = {}
    with _reading(path), zipfile.ZipFile(_npz(path)) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        for mu, sigma in _MOMENTS:
            if (mu in names) != (sigma in names):
                raise BadInput(f"{path}: holds only one of {mu} and {sigma}; make the statistics again")
            if mu in names:
                _require_shapes(path, mu, _header(archive, mu), sigma, _header(archive, sigma))
                moments |= {name: _read_array(archive, name) for name in (mu, sigma)}
    for name, values in moments.items():
        if not np.isfinite(values).all():
            raise BadInput(f"{path}: {name} holds NaN or infinity; make the statistics again")
    if "mu" not in names and "arr_0" not in names:
        raise BadInput(f"{path}: holds {', '.join(sorted(names)) or 'nothing'}; a reference needs mu and sigma, or arr_0 with images")
    images = NpzImages(path, batch_size) if "arr_0" in names else None
    return ReferenceStatistics(path.name, artifacts.sha256(path), **moments, images=images)


def save_reference(path: Path | str, mu: Array, sigma: Array, mu_s: Array | None = None, sigma_s: Array | None = None) -> None:
    """Write moments to `path` in ADM's layout, whole or not at all."""
    moments = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    with artifacts.replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        np.savez(file, **{name: np.asarray(value) for name, value in moments.items() if value is not None})


class NpzImages:
    """The images `arr_0`, uint8 (N, H, W, 3), of an `.npz`, as uint8 batches (n, 3, H, W) in file order.

    Opening reads the header alone; iterating streams from the archive, so that 50,000 images never stand in memory.
    """

    def __init__(self, path: Path | str, batch_size: int = 64):
        self.path, self.batch_size = Path(path), batch_size
        with _reading(self.path), zipfile.ZipFile(_npz(self.path)) as archive:
            shape, fortran, dtype = _header(archive, "arr_0")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise BadInput(f"{self.path}: arr_0 is {dtype} {shape}{' in Fortran order' * fortran}; images are uint8 (N, H, W, 3)")
        if 0 in shape:
            raise BadInput(f"{self.path}: arr_0 has shape {shape}, it holds no images")
        if shape[1] * shape[2] > _MAX_PIXELS:
            raise BadInput(f"{self.path}: images of {shape[1]} x {shape[2]} pixels, at most {_MAX_PIXELS // 10**6} million are read; shrink them")
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        count, height, width, channels = self.shape
        image_bytes = height * width * channels
        together = max(1, min(self.batch_size, _MAX_BATCH // image_bytes))
        with _reading(self.path), zipfile.ZipFile(_npz(self.path)) as archive, archive.open("arr_0.npy") as file:
            _read_header(file)
            for start in range(0, count, together):
                n = min(together, count - start)
                data = file.read(n * image_bytes)
                if len(data) != n * image_bytes:
                    raise EOFError
                yield torch.frombuffer(bytearray(data), dtype=torch.uint8).view(n, height, width, channels).permute(0, 3, 1, 2)


def read_samples(path: Path | str, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `most` images (n, 3, H, W) uint8 and labels (n,) int64 of an .npz as `vavae-fast sample` writes it; None: all.

    The others are read too, to the checksum at their end.
    """
    images = NpzImages(path)
    with _reading(images.path), zipfile.ZipFile(images.path) as archive:
        _header(archive, "arr_1")
        labels = _read_array(archive, "arr_1")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise BadInput(f"{path}: arr_1 is {labels.dtype} {labels.shape}, labels are integers ({len(images)},)")
    kept, count = [], 0
    for batch in images:
        if most is None or count < most:
            kept.append(batch)
            count += len(batch)
    return torch.cat(kept)[:most], torch.from_numpy(labels.astype(np.int64))[:most]


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an array; unless it is a pickle, it fills its file: of less the checksum at the end is never met."""
    size = archive.getinfo(f"{name}.npy").file_size
    with archive.open(f"{name}.npy") as file:
        shape, fortran, dtype = _read_header(file)
        if not dtype.hasobject and (min(shape, default=0) < 0 or file.tell() + math.prod(shape) * dtype.itemsize != size):
            raise ValueError(f"{name} of shape {shape} does not fill its {size} bytes")
    return shape, fortran, dtype


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        return read(file)
    except (tokenize.TokenError, SyntaxError, TypeError, RecursionError, MemoryError) as error:  # it reads the header as Python's literals
        raise ValueError(f"no array's header ({type(error).__name__})") from None


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """The whole array, its checksum met; no more of the archive is unfolded than its directory says."""
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(io.BytesIO(file.read(archive.getinfo(f"{name}.npy").file_size)), allow_pickle=False)


def _npz(path: Path) -> Path:
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    with open(path, "rb") as file:
        is_archive = file.read(2) == b"PK" and zipfile.is_zipfile(path)
    if not is_archive:
        raise BadInput(f"{path}: not an .npz file, or cut short; copy it again")
    return path


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what the zip and npy readers raise on damaged files into one line about `path`."""
    try:
        yield
    except BadInput:
        raise
    except KeyError:
        raise BadInput(f"{path}: holds no arr_0 or arr_1; under these names lie images, uint8 (N, H, W, 3), and their labels") from None
    except ZIP_FAULTS as error:
        reason = (str(error).splitlines() or [""])[0] if type(error) is ValueError else type(error).__name__
        raise BadInput(f"{path}: cannot be read ({reason}); if it is damaged or cut short, copy it again") from None


def _require_shapes(path: Path, mu_name: str, mu: tuple, sigma_name: str, sigma: tuple) -> None:
    """mu, sigma: what `_header` says of them."""
    (mu_shape, _, mu_dtype), (sigma_shape, _, sigma_dtype) = mu, sigma
    if len(mu_shape) != 1 or sigma_shape != mu_shape * 2 or mu_dtype.kind != "f" or sigma_dtype.kind != "f" or mu_shape[0] > _MAX_FEATURES:
        found = f"{mu_name} {mu_dtype} {mu_shape} and {sigma_name} {sigma_dtype} {sigma_shape}"
        raise BadInput(f"{path}: holds {found}; expected float (D,) and (D, D), D at most {_MAX_FEATURES:,}")
