"""Rows gathered by one compiled call, and in Python where there is no compiler: the same bits, the same faults."""

import errno
import os

import numpy as np
import pytest
import torch

from vavae_fast.data import rows
from vavae_fast.data.rows import DAMAGED, END_OF_FILE, NOT_FINITE, Fault, gather_rows
from vavae_fast.data.shards import row_sums
from vavae_kernels._extension import BuildError

SHAPE = (3, 5, 7)


@pytest.fixture(params=["compiled", "python"])
def reader(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(rows, "_compiled", lambda: None)
    elif rows._compiled() is None:
        pytest.skip("no C++ compiler")


def stored(tmp_path, values, files=2):
    """values (n, C, H, W) spread over files: descriptors, offsets of each row."""
    row_bytes, where = values[0].numel() * values.dtype.itemsize, []
    opened = [os.open(tmp_path / str(k), os.O_RDWR | os.O_CREAT) for k in range(files)]
    for i, row in enumerate(values):
        offset = 3 + i // files * row_bytes  # as after a header of any length
        os.pwrite(opened[i % files], row.view(torch.uint8).numpy().tobytes(), offset)
        where.append((opened[i % files], offset))
    descriptors, offsets = zip(*where)
    return np.array(descriptors, np.int32), np.array(offsets, np.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_row_goes_to_its_place(tmp_path, reader, dtype):
    values = torch.randn(9, *SHAPE).to(dtype)
    values[0, 0, 0, 0] = torch.finfo(dtype).max  # finite, though the sum of two is not
    values[1, 0, 0, 0] = torch.finfo(dtype).max
    files, offsets = stored(tmp_path, values)
    order = np.random.default_rng(0).permutation(9)
    out = torch.empty(9, *SHAPE, dtype=dtype)
    assert gather_rows(files[order], offsets[order], np.arange(9), out) is None
    assert torch.equal(out, values[order])
    assert gather_rows(files, offsets, order, out) is None
    assert torch.equal(out[order], values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_row_that_is_not_finite(tmp_path, reader, dtype, value):
    values = torch.randn(6, *SHAPE).to(dtype)
    values[2, -1, -1, -1] = values[4, 0, 0, 0] = value
    files, offsets = stored(tmp_path, values)
    order = np.array([5, 0, 1, 3, 2, 4])
    assert gather_rows(files[order], offsets[order], order, torch.empty_like(values)) == Fault(4, NOT_FINITE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_flipped_bit_is_found_by_the_rows_checksum(tmp_path, reader, dtype):
    values = torch.randn(3, *SHAPE).to(dtype)
    files, offsets = stored(tmp_path, values)
    sums, order = row_sums(values).numpy(), np.array([2, 0, 1])
    assert (sums >= 0).all() and (sums < 1 << 32).all()
    assert gather_rows(files[order], offsets[order], order, torch.empty_like(values), sums[order]) is None
    bits = 8 * values[0].numel() * dtype.itemsize
    for bit in np.random.default_rng(0).integers(0, bits, 100):
        at = int(offsets[1] + bit // 8)
        byte = os.pread(files[1], 1, at)[0]
        os.pwrite(files[1], bytes([byte ^ 1 << bit % 8]), at)
        assert gather_rows(files[order], offsets[order], order, torch.empty_like(values), sums[order]).row == 2
        if bit % 8 == 0:  # of the fraction: still finite
            assert gather_rows(files, offsets, np.arange(3), torch.empty_like(values), sums) == Fault(1, DAMAGED)
            assert gather_rows(files, offsets, np.arange(3), torch.empty_like(values), np.full(3, -1)) is None
        os.pwrite(files[1], bytes([byte]), at)


def test_the_end_of_a_file_and_a_file_that_cannot_be_read(tmp_path, reader):
    values = torch.randn(4, *SHAPE)
    files, offsets = stored(tmp_path, values)
    os.ftruncate(files[1], offsets[3] + 5)
    assert gather_rows(files, offsets, np.arange(4), torch.empty_like(values)) == Fault(3, END_OF_FILE)
    files[2] = os.open(tmp_path / "written", os.O_WRONLY | os.O_CREAT)
    assert gather_rows(files, offsets, np.arange(4), torch.empty_like(values)) == Fault(2, errno.EBADF)


def test_without_a_compiler_it_is_said_once(monkeypatch, recwarn):
    def none_found(name, device):
        raise BuildError("no C++ compiler: install g++")

    monkeypatch.setattr(rows, "library", none_found)
    rows._compiled.cache_clear()
    try:
        assert rows._compiled() is None and rows._compiled() is None
        assert [str(w.message) for w in recwarn] == ["latents are read row by row in Python, at about half the speed: no C++ compiler: install g++"]
    finally:
        rows._compiled.cache_clear()
