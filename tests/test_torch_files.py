"""PyTorch's files: their checksums are looked at, their claims are not believed."""

import io
import zipfile

import pytest
import torch

from vavae_fast.errors import BadInput
from vavae_fast.torch_files import read_torch

STATE = {"model": {"a": torch.arange(300.0), "b": torch.ones(2, 3)}, "step": 7}


@pytest.fixture
def file(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_what_was_saved(file):
    found = read_torch(file)
    assert found["step"] == 7 and torch.equal(found["model"]["a"], STATE["model"]["a"])


def test_a_flipped_bit_of_a_value_is_found_by_the_checksum(file):
    """torch.load gives the wrong value without a word."""
    data = bytearray(file.read_bytes())
    at = data.index(STATE["model"]["a"].numpy().tobytes()) + 401
    data[at] ^= 4
    file.write_bytes(data)
    assert not torch.equal(torch.load(file, weights_only=True)["model"]["a"], STATE["model"]["a"])
    with pytest.raises(BadInput, match=r"a.pt: damaged, its member a/data/0 has another checksum than was written; fetch it again"):
        read_torch(file)
    with pytest.raises(BadInput, match="; ask Ann$"):
        read_torch(file, "ask Ann")


def test_files_saved_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_torch(tmp_path / "a.pt")["model"]["a"], STATE["model"]["a"])


@pytest.mark.parametrize("tensor, words", [
    (torch.ones(1).expand(1 << 40), r"shape \(1099511627776,\) claims"),
    (torch.ones(3).to_sparse(), "sparse, quantized or without values"),
    (torch.ones(3, device="meta"), "sparse, quantized or without values"),
])  # fmt: skip
def test_tensors_that_are_not_what_the_file_holds(tmp_path, tensor, words):
    torch.save({"model": {"a": tensor}}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match=words):
        read_torch(tmp_path / "a.pt")


def test_a_list_of_a_list_of_the_same_list_ends(tmp_path):
    """Ten thousand times ten thousand times the same: looked into once."""
    nested = [torch.ones(2)]
    for _ in range(3):
        nested = [nested] * 10_000
    torch.save(nested, tmp_path / "a.pt")
    assert len(read_torch(tmp_path / "a.pt")) == 10_000


def test_members_that_lie_over_each_other(file):
    """The same bytes listed many times: a checksum of each would take hours."""
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    with zipfile.ZipFile(file, "a") as archive:
        for k in range(50):
            twin = zipfile.ZipInfo(f"a/data/{k + 100}")
            twin.header_offset, twin.CRC, twin.file_size, twin.compress_size = largest.header_offset, largest.CRC, 1200, 1200
            archive.filelist.append(twin)
            archive._didModify = True
    with pytest.raises(BadInput, match="a.pt: its members overlap"):
        read_torch(file)


def test_a_legacy_file_and_noise(tmp_path):
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_torch(tmp_path / "old.pt")["model"]["b"], STATE["model"]["b"])
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    (tmp_path / "cut.pt").write_bytes(buffer.getvalue()[:500])
    with pytest.raises(BadInput, match="cut.pt: not a PyTorch file, or damaged"):
        read_torch(tmp_path / "cut.pt")


def test_a_member_that_is_shorter_than_its_tensor(file):
    """Its checksum is right; under a memory map torch.load goes on in the bytes of the next member."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:1000] if name == "a/data/0" else data)
    with pytest.raises(BadInput, match="a.pt: not a PyTorch file, or damaged .record size"):
        read_torch(file)
