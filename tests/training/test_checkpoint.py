"""Checkpoints: what is saved comes back, damage is named and stepped over, and nothing whole is lost."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from vavae_fast.errors import BadInput
from vavae_fast.training import checkpoint as module
from vavae_fast.training.checkpoint import checkpoint_fault, checkpoints, latest_checkpoint, load_checkpoint, save_checkpoint, step_folder


def groups(value=1.0):
    model = {"a.weight": torch.full((3, 4), value), "a.bias": torch.arange(4.0), "count": torch.tensor(7)}
    return {"model": model, "optimizer": {"exp_avg.a.weight": torch.full((3, 4), 2 * value), "step.a.weight": torch.tensor(3.0)}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(path, offset=-1):
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    path = save_checkpoint(tmp_path, 12, groups(), {"stage": "test", "seed": 5})
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
    path = save_checkpoint(tmp_path, 1, {"model": {"t": whole.t(), "row": whole[1]}}, {})
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
    older, newer = save_checkpoint(tmp_path, 1, groups(1.0), {}), save_checkpoint(tmp_path, 2, groups(2.0), {})
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
    older, newer = save_checkpoint(tmp_path, 1, groups(1.0), {}), save_checkpoint(tmp_path, 2, groups(2.0), {})
    shutil.copy(older / "model.safetensors", newer / "model.safetensors")
    assert checkpoint_fault(newer) == "model.safetensors is damaged (its hash is not the manifest's)"
    assert checkpoint_fault(newer, hashes=False) is None


def test_every_flipped_bit_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 1, groups(), {})
    file = path / "model.safetensors"
    data = file.read_bytes()
    for offset in range(0, len(data), 7):
        damage(file, offset)
        assert checkpoint_fault(path) is not None, offset
        file.write_bytes(data)
    assert checkpoint_fault(path) is None


def test_no_checkpoint_at_all(tmp_path):
    assert latest_checkpoint(tmp_path, pytest.fail) is None and latest_checkpoint(tmp_path / "none", pytest.fail) is None


def test_the_last_k_whole_ones_are_kept(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, groups(step), {}, keep_last=2)
    assert names(tmp_path) == ["step_00000004", "step_00000005"]
    save_checkpoint(tmp_path, 6, groups(6), {})
    assert len(checkpoints(tmp_path)) == 3, "null keeps all"


def test_incomplete_folders_do_not_push_whole_ones_out(tmp_path):
    """Three newer folders of killed writers: retention counts only whole checkpoints."""
    save_checkpoint(tmp_path, 1, groups(1), {}, keep_last=2)
    for junk in (7, 8, 9):
        step_folder(tmp_path, junk).mkdir()
        (step_folder(tmp_path, junk) / "model.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, 2, groups(2), {}, keep_last=2)
    assert [checkpoint_fault(step_folder(tmp_path, step)) for step in (1, 2)] == [None, None]
    save_checkpoint(tmp_path, 3, groups(3), {}, keep_last=2)
    assert not step_folder(tmp_path, 1).exists() and step_folder(tmp_path, 2).exists()
    assert latest_checkpoint(tmp_path, lambda line: None) == step_folder(tmp_path, 3)


def test_a_whole_checkpoint_is_never_written_over(tmp_path):
    path = save_checkpoint(tmp_path, 1, groups(1.0), {})
    with pytest.raises(BadInput, match="is there already, and whole"):
        save_checkpoint(tmp_path, 1, groups(2.0), {})
    assert torch.equal(load_checkpoint(path)[0]["model"]["a.weight"], torch.ones(3, 4)) and names(tmp_path) == [path.name]


def test_a_run_that_went_back_behind_a_damaged_checkpoint_saves_that_step_again(tmp_path):
    path = save_checkpoint(tmp_path, 1, groups(1.0), {})
    damage(path / "model.safetensors")
    save_checkpoint(tmp_path, 1, groups(2.0), {})
    assert torch.equal(load_checkpoint(path)[0]["model"]["a.weight"], torch.full((3, 4), 2.0))
    assert names(tmp_path) == ["step_00000001", "step_00000001.damaged"] and checkpoints(tmp_path) == [path]


@pytest.mark.parametrize("at", range(4))
def test_a_failure_at_any_file_leaves_the_old_ones_and_nothing_else(tmp_path, monkeypatch, at):
    save_checkpoint(tmp_path, 1, groups(1.0), {})
    count = iter(range(10))
    real_save, real_json = module.save_file, module.artifacts.write_json

    def failing(real):
        def call(*args):
            if next(count) == at:
                raise OSError(28, "No space left on device")
            return real(*args)

        return call

    monkeypatch.setattr(module, "save_file", failing(real_save))
    monkeypatch.setattr(module.artifacts, "write_json", failing(real_json))
    if at < 3:
        with pytest.raises(OSError):
            save_checkpoint(tmp_path, 2, groups(2.0), {}, keep_last=2)
    else:
        save_checkpoint(tmp_path, 2, groups(2.0), {}, keep_last=2)
    assert names(tmp_path) == ["step_00000001"] + (["step_00000002"] if at == 3 else [])
    assert checkpoint_fault(step_folder(tmp_path, 1)) is None


def test_a_full_disk_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    from collections import namedtuple

    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
    with pytest.raises(BadInput, match="are free; make room"):
        save_checkpoint(tmp_path / "checkpoints", 1, groups(), {})
    assert names(tmp_path) == []


def test_asking_for_weights_that_are_not_there(tmp_path):
    path = save_checkpoint(tmp_path, 1, groups(), {})
    with pytest.raises(BadInput, match="has no ema weights; it holds model, optimizer"):
        load_checkpoint(path, "ema")


def test_a_manifest_may_not_name_files_elsewhere(tmp_path):
    """A hostile manifest: a name that leaves the folder is no file of this checkpoint."""
    path = save_checkpoint(tmp_path, 1, groups(), {})
    save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    outside = tmp_path / "outside.safetensors"
    manifest["files"]["../outside.safetensors"] = {"bytes": outside.stat().st_size, "sha256": module.artifacts.sha256(outside)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="manifest.json is damaged"):
        load_checkpoint(path)
