"""Files that are whole or absent: written under a temporary name, synced, renamed; and the manifests beside them.

A reader never meets a half-written artifact: a kill, a full disk or an error leaves at most a `*.tmp` that the next
writer of the same name removes.
"""

import hashlib
import json
import os
import platform
import shutil
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vavae_fast import __version__
from vavae_fast.errors import BadInput

# What zipfile raises on archives that are damaged, encrypted or compressed in ways it does not know.
ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, RuntimeError, ValueError, OverflowError)
ZIP_FAULTS += (zipfile.lzma.LZMAError,) if zipfile.lzma else ()  # Python can be built without


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on any error removed."""
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> Path:
    """A folder and its parents, each new name synced: what is written into it is lost with a name that a power cut takes."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)
    return path


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


FORMAT = 2  # of manifests: since 2 they are sealed
SEAL = "seal"  # the key of a manifest's own digest in its file


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, a manifest with its seal; NaN and infinities are refused, because other readers refuse them."""
    if isinstance(value, dict) and value.get("format") == FORMAT:
        value = sealed(value)
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """`value` and the digest of what JSON gives back of it, so that a flipped bit is found in what no other file vouches for."""
    return {**value, SEAL: _digest(json.loads(json.dumps(value)))}


def seal_is_whole(value: dict[str, Any]) -> bool:
    """Whether what `sealed` made still is what it was."""
    return value.get(SEAL) == _digest({key: item for key, item in value.items() if key != SEAL})


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """The value in a file of JSON, without its seal. `BadInput` names the file when it is missing, a folder, unreadable, not UTF-8, not
    JSON, or a manifest that is not what was written."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); expected a file of JSON") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON ({type(error).__name__}); it is damaged, or not ours") from None
    if isinstance(value, dict) and (SEAL in value or value.get("format") == FORMAT):  # a flipped bit cannot hide both
        if not seal_is_whole(value):
            raise BadInput(f"{path}: damaged, or edited: its seal is not that of its content; take it from a copy, or remove it")
        del value[SEAL]
    return value


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(file)


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def require_writable(folder: Path) -> Path:
    """Raise `BadInput` unless files can be made in `folder` or, while it does not exist, in its nearest parent."""
    folder = Path(folder)
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise BadInput(f"{folder}: {nearest} is a file, not a folder; choose another output folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise BadInput(f"{folder}: cannot write to {nearest}; choose another output folder or change its permissions")
    return folder


SPARE = 1.2  # times what is to be written must be free


def free_space(folder: Path) -> int:
    """Bytes free where `folder` lies or will lie."""
    nearest = Path(folder)
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    return shutil.disk_usage(nearest).free


def require_space(folder: Path, needed: int) -> None:
    """Raise `BadInput` unless `needed` bytes are free where `folder` lies or will lie."""
    free = free_space(folder)
    if free < needed:
        raise BadInput(f"{folder}: needs {readable_bytes(needed)}, {readable_bytes(free)} are free; make room or choose another folder")


def readable_bytes(count: float) -> str:
    """`12.3 MB`: powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def manifest(kind: str, **facts: Any) -> dict[str, Any]:
    """What every artifact says of itself: its kind, what made it, when, with which versions; then `facts`."""
    versions = {"vavae_fast": __version__, "python": platform.python_version()}
    if "torch" in sys.modules:
        versions["torch"] = str(sys.modules["torch"].__version__)
    return {"kind": kind, "format": FORMAT, "command": sys.argv, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": versions, **facts}
