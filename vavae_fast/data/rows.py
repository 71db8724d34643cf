"""Rows of open files, gathered into one batch: by csrc/latent_rows.cpp in one call, or row by row where no compiler is found."""

import ctypes
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vavae_fast.data.shards import row_sums
from vavae_kernels._extension import BuildError, library

END_OF_FILE, NOT_FINITE, DAMAGED = -1, -2, -3  # causes beside those of errno, as in latent_rows.cpp
_EXPONENT = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}  # all ones in a NaN and an infinity


class Fault(NamedTuple):
    """Why row `row` of those asked for was not read: END_OF_FILE, NOT_FINITE, DAMAGED (another checksum), or an errno."""

    row: int
    cause: int


def gather_rows(
    files: Sequence[int], offsets: np.ndarray, places: np.ndarray, out: Tensor, sums: np.ndarray | None = None
) -> Fault | None:
    """Row i, at byte offsets[i] of the descriptor files[i], -> out[places[i]]; offsets, places (n,) int64, out (n, C, H, W) contiguous.

    sums (n,) int64: each row's checksum (`shards.row_sums`), -1 where it has none. None when all rows were read, are finite and what was
    written; else one that was not, with the rest of `out` undefined. Safe from several threads.
    """
    sums = np.full(len(offsets), -1, np.int64) if sums is None else sums
    compiled = _compiled()
    if compiled is None:
        return _gather_in_python(files, offsets, places, out, sums)
    return _gather_in_one_call(compiled, files, offsets, places, out, sums)


@cache
def _compiled() -> Callable[..., int] | None:
    try:
        gather = library("latent_rows", torch.device("cpu")).gather_rows
    except BuildError as error:
        warnings.warn(f"latents are read row by row in Python, at about half the speed: {error}", stacklevel=2)
        return None
    gather.restype = ctypes.c_int64
    gather.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
                       ctypes.c_int32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32)]  # fmt: skip
    return gather


def _gather_in_one_call(
    gather, files: Sequence[int], offsets: np.ndarray, places: np.ndarray, out: Tensor, sums: np.ndarray
) -> Fault | None:
    files, offsets, places, sums = np.asarray(files, np.int32), *map(np.ascontiguousarray, (offsets, places, sums))
    cause = ctypes.c_int32()
    size = out.dtype.itemsize
    read = gather(files.ctypes.data, offsets.ctypes.data, places.ctypes.data, len(offsets), size * out[0].numel(),
                  size, _EXPONENT[out.dtype], sums.ctypes.data, out.data_ptr(), cause)  # fmt: skip
    return None if read == len(offsets) else Fault(read, cause.value)


def _gather_in_python(files: Sequence[int], offsets: np.ndarray, places: np.ndarray, out: Tensor, sums: np.ndarray) -> Fault | None:
    memory = memoryview(out.view(torch.uint8).numpy()).cast("B")
    row_bytes = len(memory) // len(out)
    for i, (file, offset, place) in enumerate(zip(files, offsets.tolist(), places.tolist())):
        row = memory[place * row_bytes : (place + 1) * row_bytes]
        while row:
            try:
                got = os.preadv(file, [row], offset)  # may be short, which is legal
            except OSError as error:
                return Fault(i, error.errno)
            if got == 0:
                return Fault(i, END_OF_FILE)
            row, offset = row[got:], offset + got
    bad = ~torch.isfinite(out).flatten(1).all(dim=1).numpy()[places]
    if bad.any():
        return Fault(int(bad.argmax()), NOT_FINITE)
    bad = (sums >= 0) & (row_sums(out).numpy()[places] != sums)
    return Fault(int(bad.argmax()), DAMAGED) if bad.any() else None
