"""What samples are compared with, and the `.npz` layouts of ADM's evaluator (Dhariwal & Nichol 2021) for it and for samples.

Reference: mu, sigma of pool_3, mu_s, sigma_s of the spatial features, arr_0 images for precision and recall, as in
`VIRTUAL_imagenet256_labeled.npz`. Samples: arr_0, uint8 (N, H, W, 3). Nothing here unpickles.
"""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vavae_fast import artifacts
from vavae_fast.errors import BadInput
from vavae_fast.evaluation.inputs import Array

_MOMENTS = (("mu", "sigma"), ("mu_s", "sigma_s"))


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
    with _reading(path), np.load(_npz(path), allow_pickle=False) as file:
        names = set(file.files)
        moments = {name: file[name] for pair in _MOMENTS for name in pair if name in names}
    for mu, sigma in _MOMENTS:
        if (mu in names) != (sigma in names):
            raise BadInput(f"{path}: holds only one of {mu} and {sigma}; make the statistics again")
        if mu in names:
            _require_moments(path, mu, moments[mu], sigma, moments[sigma])
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
        with _reading(self.path), self._member() as (_, shape, fortran, dtype):
            pass
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise BadInput(f"{self.path}: arr_0 is {dtype} {shape}{' in Fortran order' * fortran}; images are uint8 (N, H, W, 3)")
        if 0 in shape:
            raise BadInput(f"{self.path}: arr_0 has shape {shape}, it holds no images")
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        count, height, width, channels = self.shape
        image_bytes = height * width * channels
        with _reading(self.path), self._member() as (file, *_):
            for start in range(0, count, self.batch_size):
                n = min(self.batch_size, count - start)
                data = file.read(n * image_bytes)
                if len(data) != n * image_bytes:
                    raise EOFError
                yield torch.frombuffer(bytearray(data), dtype=torch.uint8).view(n, height, width, channels).permute(0, 3, 1, 2)

    @contextmanager
    def _member(self):
        """The open array file behind its header, and the header: shape, Fortran order, dtype."""
        with zipfile.ZipFile(_npz(self.path)) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            yield file, *read(file)


def _npz(path: Path) -> Path:
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise BadInput(f"{path}: not an .npz file, or cut short; copy it again")
    return path


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what the zip and npy readers raise on damaged files into one line about `path`."""
    try:
        yield
    except KeyError:
        raise BadInput(f"{path}: holds no arr_0; images are stored under that name, uint8 (N, H, W, 3)") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise BadInput(f"{path}: cannot be read ({type(error).__name__}); if it is damaged or cut short, copy it again") from None
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: not a readable .npz: {str(error).splitlines()[0]}") from None


def _require_moments(path: Path, mu_name: str, mu: np.ndarray, sigma_name: str, sigma: np.ndarray) -> None:
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size) or mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        found = f"{mu_name} {mu.dtype} {mu.shape} and {sigma_name} {sigma.dtype} {sigma.shape}"
        raise BadInput(f"{path}: holds {found}; expected float (D,) and (D, D)")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise BadInput(f"{path}: {mu_name} or {sigma_name} holds NaN or infinity; make the statistics again")
