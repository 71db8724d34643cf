"""PyTorch's files (`.pt`, `.pth`, `.ckpt`, `.bin`) read without running what is in them, and without believing what they say of their size.

torch.load with weights_only does not look at the checksums that torch.save wrote, unfolds compressed members to any size, and makes
tensors that claim more than the file holds; here all three are `BadInput`.
"""

import argparse
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vavae_fast.errors import BadInput

_FETCH, _TENSORS_ALONE = "fetch it again", "where you trust it, save its tensors alone: safetensors.torch.save_file"
# What PyTorch's restricted unpickler and zip reader raise on bytes that are damaged or were never theirs.
_DAMAGED = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
            OverflowError, ImportError, MemoryError, RecursionError, struct.error, zipfile.BadZipFile, zlib.error)  # fmt: skip
_MAPPED = 1 << 30  # bytes of a file from which on it is not read but mapped
_DEEPEST = 4  # levels of dictionaries and lists in which tensors are looked for


def read_torch(path: str | Path, cure: str | None = None) -> Any:
    """What torch.save put into a file, on the CPU: tensors, plain values, argparse.Namespace.

    `BadInput` names the file and, where one is given, ends in `cure`.
    """
    path = Path(path)
    members = _zip_members(path, cure)
    if members is not None:
        _require_torch_zip(members, path)
        _require_checksums(members, path, cure)
    # Of a training checkpoint most is not wanted; a smaller file is read, because a map takes no notice of where its members end.
    mapped = path.stat().st_size > _MAPPED
    try:
        # Namespace: checkpoints of the DiT family carry their command line; it is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of foreign protocols, which end in an error all the same
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=members is not None and mapped)
    except _DAMAGED as error:
        if name := _refused_name(error):
            advice = cure or f"{_TENSORS_ALONE}(state_dict, ...)"
            raise BadInput(f"{path}: refused, it holds Python objects that could run code ({name}); {advice}") from None
        raise _damaged(path, error, cure) from None
    _require_plain(content, path)
    return content


def _damaged(path: Path, error: Exception, cure: str | None) -> BadInput:
    return BadInput(f"{path}: not a PyTorch file, or damaged ({_first_line(error)}); {cure or _FETCH}")


def _zip_members(path: Path, cure: str | None) -> list[zipfile.ZipInfo] | None:
    """What a zip archive lists, or None for any other file."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except _DAMAGED as error:
        raise _damaged(path, error, cure) from None


def _require_torch_zip(members: list[zipfile.ZipInfo], path: Path) -> None:
    """A PyTorch file is a zip of uncompressed members; a compressed one may unfold to any size."""
    if not any(member.filename.endswith("/data.pkl") for member in members):
        raise BadInput(f"{path}: a zip archive, not a PyTorch file; unpack it and name the weights inside")
    if any(member.filename.endswith("/constants.pkl") for member in members):
        cure = f"{_TENSORS_ALONE}(torch.jit.load(FILE).state_dict(), ...)"
        raise BadInput(f"{path}: refused, a TorchScript archive (CLIP's releases are), which is code; {cure}")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise BadInput(f"{path}: refused, a compressed zip (PyTorch never writes one); save it again with torch.save")


def _require_checksums(members: list[zipfile.ZipInfo], path: Path, cure: str | None) -> None:
    """Every member has the CRC-32 that was written with it. All are 0 where torch.serialization.set_crc32_options left them out."""
    if not any(member.CRC for member in members):
        return
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise BadInput(f"{path}: its members overlap: damaged, or made to deceive; {cure or _FETCH}")
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except _DAMAGED as error:
        raise _damaged(path, error, cure) from None
    if wrong is not None:
        raise BadInput(f"{path}: damaged, its member {wrong} has another checksum than was written; {cure or _FETCH}")


def _require_plain(content: Any, path: Path) -> None:
    """No tensor but plain ones of the CPU, and none that claims more bytes than the file has: a stride of 0 claims terabytes in a kilobyte."""
    size = path.stat().st_size
    for tensor in _tensors(content, _DEEPEST, set()):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise BadInput(f"{path}: holds a tensor that is sparse, quantized or without values; save plain tensors")
        if tensor.nbytes > size:
            claim = f"a tensor of shape {tuple(tensor.shape)} claims {tensor.nbytes:,} bytes of a file of {size:,}"
            raise BadInput(f"{path}: {claim}; save it contiguous, or do not trust it")


def _tensors(value: Any, levels: int, seen: set[int]) -> Iterator[Tensor]:
    """`seen`: containers that were looked into; a pickle may name one a million times."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple) and levels and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, levels - 1, seen)


def _first_line(error: BaseException) -> str:
    """The reason alone, of an error that may go on with advice to PyTorch's users."""
    lines = str(error).split("WeightsUnpickler error: ")[-1].strip().splitlines()
    return lines[0].split(" Check the documentation")[0][:160] if lines else type(error).__name__


def _refused_name(error: Exception) -> str | None:
    """The class or function that PyTorch refused, or None when the bytes made no sense to it."""
    text = " ".join(str(error).split()) if isinstance(error, pickle.UnpicklingError) else ""
    for opening in ("GLOBAL ", "unrecognized function "):
        if opening in text:
            return text.split(opening, 1)[1].split(" ", 1)[0]
    return None
