"""Checkpoints as read: what is saved comes back, shards are put together, damage is named and stepped over."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from vavae_fast import artifacts
from vavae_fast.errors import BadInput
from vavae_fast.training.checkpoint import (
    ROWS,
    checkpoint_fault,
    group_digest,
    holds,
    latest_checkpoint,
    load_checkpoint,
    load_tensors,
    sweep,
)
from vavae_fast.training.saver import Part, save_checkpoint, snapshot


def groups(value=1.0):
    model = {"a.weight": torch.full((3, 4), value), "a.bias": torch.arange(4.0), "count": torch.tensor(7)}
    return {"model": model, "optimizer": {"exp_avg.a.weight": torch.full((3, 4), 2 * value), "step.a.weight": torch.tensor(3.0)}}


def save(folder, step, tensors):
    return save_checkpoint(folder, step, snapshot(tensors), {"stage": "test", "seed": 5})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(path, offset=-1):
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    path = save(tmp_path, 12, groups())
    assert path == tmp_path / "step_00000012" and names(path) == ["manifest.json", "model.safetensors", "optimizer.safetensors"]
    loaded, manifest = load_checkpoint(path)
    assert manifest["step"] == 12 and manifest["stage"] == "test" and manifest["seed"] == 5 and manifest["kind"] == "checkpoint"
    for group, tensors in groups().items():
        assert loaded[group].keys() == tensors.keys()
        assert all(torch.equal(loaded[group][k], v) and loaded[group][k].dtype == v.dtype for k, v in tensors.items())
    assert all((path / name).stat().st_mode & 0o044 == 0o044 for name in names(path)), "others can read it"
    only, _ = load_checkpoint(path, "optimizer")
    assert only.keys() == {"optimizer"}


def test_transposed_and_shared_tensors_are_saved(tmp_path):
    whole = torch.arange(6.0).view(2, 3)
    path = save(tmp_path, 1, {"model": {"t": whole.t(), "row": whole[1]}})
    loaded, _ = load_checkpoint(path)
    assert torch.equal(loaded["model"]["t"], whole.t()) and torch.equal(loaded["model"]["row"], whole[1])


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda p: damage(p / "model.safetensors"), "model.safetensors is damaged"),
        (lambda p: damage(p / "optimizer.safetensors", 12), "optimizer.safetensors is damaged"),
        (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-1]), "bytes, its manifest says"),
        (lambda p: (p / "optimizer.safetensors").unlink(), "lacks optimizer.safetensors"),
        (lambda p: (p / "manifest.json").unlink(), r"incomplete \(no manifest.json\)"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_text('{"files": {"model.safetensors": 3}}'), "manifest.json is damaged"),
    ],
)
def test_damage_is_named_and_the_older_one_taken(tmp_path, spoil, words):
    older, newer = save(tmp_path, 1, groups(1.0)), save(tmp_path, 2, groups(2.0))
    assert latest_checkpoint(tmp_path, pytest.fail) == newer
    spoil(newer)
    said = []
    assert latest_checkpoint(tmp_path, said.append) == older
    assert len(said) == 1 and "step_00000002" in said[0] and "trying an older" in said[0]
    with pytest.raises(BadInput, match=words) as caught:
        load_checkpoint(newer)
    assert "\n" not in str(caught.value) and "choose another checkpoint" in str(caught.value)


def test_a_shard_of_another_step_is_noticed(tmp_path):
    """Same names, same sizes: only the hash tells them apart."""
    older, newer = save(tmp_path, 1, groups(1.0)), save(tmp_path, 2, groups(2.0))
    shutil.copy(older / "model.safetensors", newer / "model.safetensors")
    assert checkpoint_fault(newer) == "model.safetensors is damaged (its hash is not the manifest's)"
    assert checkpoint_fault(newer, hashes=False) is None


def test_every_flipped_bit_is_noticed(tmp_path):
    path = save(tmp_path, 1, groups())
    file = path / "model.safetensors"
    data = file.read_bytes()
    for offset in range(0, len(data), 7):
        damage(file, offset)
        assert checkpoint_fault(path) is not None, offset
        file.write_bytes(data)
    assert checkpoint_fault(path) is None


def test_a_file_that_the_disk_does_not_give_back_is_named(tmp_path, monkeypatch):
    old, new = (save(tmp_path, step, groups()) for step in (1, 2))
    read = artifacts.sha256

    def failing(path):
        if path.parent == new:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(artifacts, "sha256", failing)
    said = []
    assert latest_checkpoint(tmp_path, said.append) == old and "model.safetensors cannot be read" in said[0]


def test_no_checkpoint_at_all(tmp_path):
    assert latest_checkpoint(tmp_path, pytest.fail) is None and latest_checkpoint(tmp_path / "none", pytest.fail) is None


def test_asking_for_weights_that_are_not_there(tmp_path):
    path = save(tmp_path, 1, groups())
    with pytest.raises(BadInput, match="has no ema weights; it holds model, optimizer"):
        load_checkpoint(path, "ema")


def test_a_manifest_may_not_name_files_elsewhere(tmp_path):
    """A hostile manifest: a name that leaves the folder is no file of this checkpoint."""
    path = save(tmp_path, 1, groups())
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    manifest = artifacts.read_json(path / "manifest.json")
    outside = tmp_path / "outside.safetensors"
    manifest["files"]["../outside.safetensors"] = {"bytes": outside.stat().st_size, "sha256": artifacts.sha256(outside)}
    artifacts.write_json(path / "manifest.json", manifest)
    with pytest.raises(BadInput, match="manifest.json is damaged"):
        load_checkpoint(path)


# -- shards -----------------------------------------------------------------------------------------------------------


def shards(value=1.0):
    """The same groups as two processes write them: rows of the weight here and there, what is whole in the first."""
    model, optimizer = groups(value)["model"], groups(value)["optimizer"]
    rows = {"a.weight": [0, 3], "a.bias": [0, 4]}
    first = {**model, "a.weight": model["a.weight"][:2], "a.bias": model["a.bias"][:2]}
    second = {"a.weight": model["a.weight"][2:], "a.bias": model["a.bias"][2:]}
    return [
        Part("model.rank00of02.safetensors", first, {ROWS: json.dumps(rows)}),
        Part("model.rank01of02.safetensors", second, {ROWS: json.dumps({"a.weight": [2, 3], "a.bias": [2, 4]})}),
        Part("optimizer.safetensors", optimizer),
    ]


def test_shards_are_put_together(tmp_path):
    path = save_checkpoint(tmp_path, 3, shards(), {})
    loaded, manifest = load_checkpoint(path)
    assert loaded.keys() == {"model", "optimizer"} and set(loaded["model"]) == set(groups()["model"]) and len(loaded["model"]) == 3
    assert all(torch.equal(loaded[group][name], value) for group, tensors in groups().items() for name, value in tensors.items())
    assert holds(path, "model") and holds(path, "optimizer") and not holds(path, "ema")
    assert group_digest(manifest, "model") == "+".join(artifacts.sha256(path / f"model.rank0{i}of02.safetensors") for i in (0, 1))
    assert group_digest(manifest, "optimizer") == artifacts.sha256(path / "optimizer.safetensors")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_shard_is_named(tmp_path, lost):
    path = save_checkpoint(tmp_path, 3, shards(), {})
    (path / f"model.rank0{lost}of02.safetensors").unlink()
    assert checkpoint_fault(path) == f"lacks model.rank0{lost}of02.safetensors"


@pytest.mark.parametrize("kept", [(0,), (1,), (0, 2), (1, 2)])
def test_a_manifest_without_all_shards_is_damaged(tmp_path, kept):
    """Were it not noticed, the rows of the others would be missing from the weights."""
    parts = [part for i, part in enumerate(shards()) if i in kept]
    assert checkpoint_fault(save_checkpoint(tmp_path, 3, parts, {})) == "manifest.json is damaged"


@pytest.mark.parametrize("rows", ['{"a.weight": [1, 3], "a.bias": [2, 4]}', '{"a.weight": [0, 3], "a.bias": [2, 4]}'])
def test_rows_that_do_not_fit_together_are_refused(tmp_path, rows):
    first, second, _ = shards()
    path = save_checkpoint(tmp_path, 3, [first, Part(second.name, second.tensors, {ROWS: rows})], {})
    with pytest.raises(BadInput, match="rows of a.weight are in none of its shards"):
        load_checkpoint(path)[0]["model"]["a.weight"]


@pytest.mark.parametrize("metadata", [None, {ROWS: "[]"}, {ROWS: "{"}, {ROWS: '{"a.weight": 3}'}])
def test_a_shard_that_does_not_say_its_rows_is_refused(tmp_path, metadata):
    first, second, _ = shards()
    path = save_checkpoint(tmp_path, 3, [first, Part(second.name, second.tensors, metadata)], {})
    with pytest.raises(BadInput, match="model.rank01of02.safetensors: does not say which rows"):
        load_checkpoint(path)


# -- into a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("b"), "x: lacks b; the architecture of a run cannot change"),
        (lambda t: t.update({f"c{i}": torch.ones(1) for i in range(7)}), "has, unlike the model, c0, c1, c2, c3, c4 and 2 more"),
        (lambda t: t.update(a=torch.ones(3)), r"a is \(3,\) float32, the model's is \(2,\) float32"),
        (lambda t: t.update(a=torch.ones(2, dtype=torch.float64)), r"a is \(2,\) float64, the model's is \(2,\) float32"),
    ],
)
def test_tensors_that_do_not_fit_are_named_in_one_line(change, words):
    tensors, targets = {"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.zeros(2), "b": torch.zeros(3)}
    load_tensors(targets, tensors, "x")
    assert all(torch.equal(targets[name], tensors[name]) for name in "ab")
    change(tensors)
    with pytest.raises(BadInput, match=words) as caught:
        load_tensors(targets, tensors, "x")
    assert "\n" not in str(caught.value)


def test_what_killed_writers_and_removers_left_is_swept(tmp_path):
    whole = save(tmp_path, 1, groups())
    for name in ("step_00000002.tmp", "step_00000003.del", "step_00000004.damaged", "mine.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    sweep(tmp_path)
    sweep(tmp_path / "none")
    assert names(tmp_path) == ["mine.tmp", whole.name, "step_00000004.damaged"]


def test_a_sweep_removes_a_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step_00000003.tmp").symlink_to(tmp_path / "elsewhere")
    sweep(tmp_path / "run")
    assert not any((tmp_path / "run").iterdir()) and (tmp_path / "elsewhere" / "file").read_text() == "mine"
