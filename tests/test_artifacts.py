"""Files are whole or absent, whatever goes wrong between the first byte and the rename."""

import hashlib
import json
import os
import shutil
from collections import namedtuple

import pytest

from vavae_fast import artifacts
from vavae_fast.errors import BadInput


class Crash(Exception):
    pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_replacing_gives_the_whole_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "er" / "a.bin"
    with artifacts.replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == path.parent and not path.exists()
    assert path.read_bytes() == b"new" and names(path.parent) == ["a.bin"]


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("written", [None, b"half"])
def test_an_error_in_the_middle_leaves_what_was_there(tmp_path, before, written):
    path = tmp_path / "a.bin"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(Crash), artifacts.replacing(path) as temporary:
        if written is not None:
            temporary.write_bytes(written)
        raise Crash
    assert names(tmp_path) == ([] if before is None else ["a.bin"])
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_sync_or_rename_leaves_what_was_there(tmp_path, monkeypatch, call):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError), artifacts.replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert names(tmp_path) == ["a.bin"] and path.read_bytes() == b"old"


def test_the_file_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    """Order of the system calls: sync the file, rename, sync the folder. A power cut between any two loses nothing."""
    calls, opened = [], {}
    real_open, real_fsync, real_replace = os.open, os.fsync, os.replace

    def spy_open(path, flags, *mode):
        descriptor = real_open(path, flags, *mode)
        opened[descriptor] = os.fspath(path)
        return descriptor

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "fsync", lambda d: (calls.append(("sync", os.path.basename(opened[d]))), real_fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("rename", os.path.basename(b))), real_replace(a, b)))
    artifacts.write_text(tmp_path / "a.txt", "text")
    kinds = [kind for kind, _ in calls]
    assert kinds == ["sync", "rename", "sync"]
    assert calls[0][1].startswith("a.txt") and calls[0][1] != "a.txt" and calls[2][1] == tmp_path.name


def test_a_killed_writers_rest_goes_with_the_next_write(tmp_path):
    with artifacts.replacing(tmp_path / "a.bin") as temporary:
        left_behind = temporary
        temporary.write_bytes(b"x")
    left_behind.write_bytes(b"half, and then killed")
    artifacts.write_text(tmp_path / "a.bin", "whole")
    assert names(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_text() == "whole"


def test_json_round_trip_and_refusals(tmp_path):
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"b": [1, 2.5, None, "é"]})
    assert artifacts.read_json(path) == {"b": [1, 2.5, None, "é"]}
    with pytest.raises(ValueError):
        artifacts.write_json(path, {"b": float("nan")})
    assert artifacts.read_json(path) == {"b": [1, 2.5, None, "é"]}
    for text, words in ((b'{"a": ', "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[" * 100_000, "not valid JSON")):
        path.write_bytes(text)
        with pytest.raises(BadInput, match=words):
            artifacts.read_json(path)
    with pytest.raises(BadInput, match="no such file"):
        artifacts.read_json(tmp_path / "none.json")
    with pytest.raises(BadInput, match=r"cannot be read \(Is a directory\); expected a file of JSON"):
        artifacts.read_json(tmp_path)
    with pytest.raises(BadInput, match=r"cannot be read \(Not a directory\)"):
        artifacts.read_json(path / "a.json")
    path.write_text("1" * 10_000)
    with pytest.raises(BadInput, match="not valid JSON"):
        artifacts.read_json(path)


def test_an_unreadable_file_of_json_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(BadInput, match=r"a.json: cannot be read \(Permission denied\)"):
        artifacts.read_json(tmp_path / "a.json")


def test_sha256_both_ways(tmp_path):
    data = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert artifacts.sha256(tmp_path / "a") == expected
    with open(tmp_path / "a", "rb") as file:
        assert artifacts._sha256(file) == expected


def test_require_writable_names_what_stands_in_the_way(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert artifacts.require_writable(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    with pytest.raises(BadInput, match="file is a file, not a folder; choose another output folder"):
        artifacts.require_writable(tmp_path / "file" / "out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(BadInput, match=f"cannot write to {tmp_path}; choose another"):
        artifacts.require_writable(tmp_path / "new")
    assert names(tmp_path) == ["file"]


def test_require_space_says_how_much_is_missing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (asked.append(path), usage(10, 7, 3_000_000))[1])
    artifacts.require_space(tmp_path / "not" / "yet", 3_000_000)
    with pytest.raises(BadInput, match=r"needs 5\.0 MB, 3\.0 MB are free; make room"):
        artifacts.require_space(tmp_path / "not" / "yet", 5_000_000)
    assert asked == [tmp_path, tmp_path]


@pytest.mark.parametrize("count, text", [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (11e9, "11.0 GB"), (3e12, "3.0 TB")])
def test_readable_bytes(count, text):
    assert artifacts.readable_bytes(count) == text


def test_a_manifest_says_what_made_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["vavae-fast", "train"])
    made = artifacts.manifest("run", seed=3)
    assert made["kind"] == "run" and made["format"] == 2 and made["seed"] == 3 and made["command"] == ["vavae-fast", "train"]
    assert {"vavae_fast", "python"} <= made["versions"].keys()
    json.dumps(made, allow_nan=False)


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path):
    """Or changes nothing: 1e-05 and 1E-05 are the same number."""
    path = tmp_path / "manifest.json"
    value = artifacts.manifest("run", step=4, lr=1e-05, files={"a": {"bytes": 3, "sha256": "0f"}})
    artifacts.write_json(path, value)
    assert artifacts.read_json(path) == value
    data, found = path.read_bytes(), 0
    for bit in range(8 * len(data)):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        try:
            assert artifacts.read_json(path) == value
        except BadInput:
            found += 1
    assert 8 * len(data) - found < 10


def test_an_earlier_manifest_has_no_seal(tmp_path):
    (tmp_path / "a.json").write_text('{"kind": "run", "format": 1}')
    assert artifacts.read_json(tmp_path / "a.json") == {"kind": "run", "format": 1}
    (tmp_path / "a.json").write_text('{"kind": "run", "format": 2}')
    with pytest.raises(BadInput, match="a.json: damaged, or edited"):
        artifacts.read_json(tmp_path / "a.json")


def test_the_names_of_new_folders_are_synced_too(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(artifacts, "sync", synced.append)
    artifacts.make_folder(tmp_path / "runs" / "run")
    assert (tmp_path / "runs" / "run").is_dir() and synced == [tmp_path, tmp_path / "runs"]
    artifacts.make_folder(tmp_path / "runs" / "run")
    assert len(synced) == 2
    with artifacts.replacing(tmp_path / "samples" / "a") as temporary:
        temporary.touch()
    assert synced[2:] == [tmp_path, temporary, tmp_path / "samples"]
