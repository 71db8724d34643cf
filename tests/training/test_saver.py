"""Checkpoints as written: in the background, all or nothing, never over a whole one; what stays, what goes; failures said, three end a run."""

import json
import shutil
import threading
from collections import namedtuple

import pytest
import torch

from vavae_fast import artifacts
from vavae_fast.distributed import World
from vavae_fast.errors import BadInput
from vavae_fast.training import saver as module
from vavae_fast.training.checkpoint import checkpoint_fault, checkpoints, latest_checkpoint, load_checkpoint, step_folder
from vavae_fast.training.saver import HELD_OUT, Retention, SaveFailed, Saver, retain, save_checkpoint, snapshot

ALONE = World(0, 1, torch.device("cpu"))


def groups(value=1.0):
    model = {"a.weight": torch.full((3, 4), value), "a.bias": torch.arange(4.0), "count": torch.tensor(7)}
    return {"model": model, "optimizer": {"exp_avg.a.weight": torch.full((3, 4), 2 * value), "step.a.weight": torch.tensor(3.0)}}


def save(folder, step, tensors=None, keep=None):
    path = save_checkpoint(folder, step, snapshot(tensors or groups(step)), {})
    if keep is not None:
        retain(folder, keep, set())
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(folder):
    return [int(path.name[5:]) for path in checkpoints(folder)]


def spoil(path, file="model.safetensors"):
    data = bytearray((path / file).read_bytes())
    data[-1] ^= 1
    (path / file).write_bytes(data)


# -- one checkpoint ---------------------------------------------------------------------------------------------------


def test_a_snapshot_does_not_move_with_the_weights():
    tensors = groups()
    parts = snapshot(tensors)
    for group in tensors.values():
        for tensor in group.values():
            tensor.zero_()
    assert [part.name for part in parts] == ["model.safetensors", "optimizer.safetensors"]
    assert all(torch.equal(part.tensors[name], value) for part, (_, group) in zip(parts, groups().items()) for name, value in group.items())
    assert sum(part.bytes for part in parts) == 48 + 16 + 8 + 48 + 4
    assert snapshot(tensors, rank=1) == [], "what is whole, the main process writes"


def test_a_whole_checkpoint_is_never_written_over(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(SaveFailed, match="is there already, and whole"):
        save(tmp_path, 1, groups(2.0))
    assert torch.equal(load_checkpoint(path)[0]["model"]["a.weight"], torch.ones(3, 4)) and names(tmp_path) == [path.name]


def test_a_run_that_went_back_behind_a_damaged_checkpoint_saves_that_step_again(tmp_path):
    path = save(tmp_path, 1)
    spoil(path)
    save(tmp_path, 1, groups(2.0))
    assert torch.equal(load_checkpoint(path)[0]["model"]["a.weight"], torch.full((3, 4), 2.0))
    assert names(tmp_path) == ["step_00000001", "step_00000001.damaged"] and checkpoints(tmp_path) == [path]


def test_every_file_is_synced_before_the_name_appears_and_the_folder_after(tmp_path, monkeypatch):
    """Power may fail at any moment: what the manifest promises must be on the disk before it, and it before the name."""
    done = []
    monkeypatch.setattr(artifacts, "sync", lambda path: done.append((path.name, step_folder(tmp_path, 1).exists())))
    save(tmp_path, 1)
    kept = [entry for entry in done if not entry[0].endswith("manifest.json.tmp")]
    temporary = "step_00000001.tmp"
    assert kept == [("model.safetensors", False), ("optimizer.safetensors", False), (temporary, False), (temporary, False), (tmp_path.name, True)]
    assert done.index(("manifest.json.tmp", False)) > done.index(("optimizer.safetensors", False))


@pytest.mark.parametrize("at", range(4))
def test_a_failure_at_any_file_leaves_the_old_ones_and_nothing_else(tmp_path, monkeypatch, at):
    save(tmp_path, 1)
    count = iter(range(10))

    def failing(real):
        def call(*args):
            if next(count) == at:
                raise OSError(28, "No space left on device", "the disk")
            return real(*args)

        return call

    monkeypatch.setattr(module, "write_tensors", failing(module.write_tensors))
    monkeypatch.setattr(module.artifacts, "write_json", failing(module.artifacts.write_json))
    if at < 3:
        with pytest.raises(SaveFailed, match="^the disk: No space left on device$"):
            save(tmp_path, 2, keep=Retention(2))
    else:
        save(tmp_path, 2, keep=Retention(2))
    assert names(tmp_path) == ["step_00000001"] + (["step_00000002"] if at == 3 else [])
    assert checkpoint_fault(step_folder(tmp_path, 1)) is None


def test_a_full_disk_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
    with pytest.raises(SaveFailed, match="are free; make room"):
        save(tmp_path / "checkpoints", 1)
    assert names(tmp_path) == []


# -- which stay -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_never_saved(tmp_path, value):
    """A run could continue from nothing else, once the checkpoints before are gone."""
    save(tmp_path, 1)
    spoilt = groups()
    spoilt["optimizer"]["exp_avg.a.weight"][2, 1] = value
    with pytest.raises(SaveFailed, match="optimizer.safetensors: exp_avg.a.weight holds NaN or infinity; stop, and continue from the checkpoint"):
        save(tmp_path, 2, spoilt)
    assert names(tmp_path) == ["step_00000001"]


def test_the_last_k_whole_ones_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=Retention(2))
    assert names(tmp_path) == ["step_00000004", "step_00000005"]
    save(tmp_path, 6, keep=Retention())
    assert steps(tmp_path) == [4, 5, 6], "null keeps all"


def test_every_nth_the_pinned_and_the_best_are_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    lines = [{"step": step, HELD_OUT: loss} for step, loss in ((1, 0.1), (4, 0.5), (5, 0.3), (7, 0.4), (9, 0.6))] + [{"step": 8, "loss": 0.01}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11, "' + HELD_OUT  # the last line is being written
    (tmp_path / "metrics.jsonl").write_text(text)
    for step in range(2, 12):
        save(folder, step)
        if step == 3:
            (step_folder(folder, 3) / "pinned").touch()
    retain(folder, Retention(2, 4), set())
    assert steps(folder) == [3, 4, 5, 8, 10, 11], "pinned; 4 and 8; best of those saved; the last two"
    (tmp_path / "metrics.jsonl").unlink()
    retain(folder, Retention(2, None, frozenset({4, 8})), set())
    assert steps(folder) == [3, 4, 8, 10, 11], "and those of given steps"
    retain(folder, Retention(2, None), set())
    assert steps(folder) == [3, 10, 11]


def test_what_is_not_whole_pushes_nothing_out_and_stays(tmp_path):
    """Three newer folders of killed writers and a damaged one: retention counts, and removes, only whole checkpoints."""
    save(tmp_path, 1)
    for junk in (7, 8, 9):
        step_folder(tmp_path, junk).mkdir()
        (step_folder(tmp_path, junk) / "model.safetensors").write_bytes(b"half")
    save(tmp_path, 2)
    spoil(save(tmp_path, 3))
    retain(tmp_path, Retention(2), set())
    assert steps(tmp_path) == [1, 2, 3, 7, 8, 9]
    save(tmp_path, 4, keep=Retention(2))
    assert steps(tmp_path) == [2, 3, 4, 7, 8, 9]
    assert latest_checkpoint(tmp_path, lambda line: None) == step_folder(tmp_path, 4)


def test_what_this_run_has_verified_is_not_read_again(tmp_path, monkeypatch):
    verified = set()
    read = []
    monkeypatch.setattr(module, "checkpoint_fault", lambda path: read.append(path.name))
    for step in (1, 2, 3):
        save(tmp_path, step)
        retain(tmp_path, Retention(2), verified)
    assert read == ["step_00000001", "step_00000002", "step_00000003"] and steps(tmp_path) == [2, 3]


# -- in the background ------------------------------------------------------------------------------------------------


class Disk:
    """Stands before the writer: slow until released, or failing."""

    def __init__(self, monkeypatch):
        self.open, self.fails, self.calls = threading.Event(), [], 0
        self.real = module.save_checkpoint
        monkeypatch.setattr(module, "save_checkpoint", self)

    def __call__(self, *args):
        self.calls += 1
        assert self.open.wait(20)
        if self.fails and self.fails.pop(0):
            raise SaveFailed("the disk: full")
        return self.real(*args)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def said():
    return []


@pytest.fixture
def saver(tmp_path, said):
    with Saver(tmp_path, ALONE, {"stage": "test"}, Retention(2), said.append) as saver:
        yield saver


def test_training_goes_on_while_the_disk_is_slow_and_the_next_save_waits(saver, disk, tmp_path):
    tensors = groups(1.0)
    saver.save(1, tensors)
    saver.check()
    tensors["model"]["a.weight"].fill_(5.0)  # the next step
    assert checkpoints(tmp_path) == []
    threading.Timer(0.2, disk.open.set).start()
    saver.save(2, tensors)
    assert steps(tmp_path) == [1], "one save in flight: the first had to end"
    saver.finish()
    values = [load_checkpoint(path)[0]["model"]["a.weight"][0, 0].item() for path in checkpoints(tmp_path)]
    assert values == [1.0, 5.0]


def test_retention_follows_each_save(saver, tmp_path):
    for step in range(1, 5):
        saver.save(step, groups(step))
    saver.finish()
    assert steps(tmp_path) == [3, 4]


def test_a_failed_save_is_said_and_the_next_one_heals(saver, disk, said, tmp_path):
    disk.open.set()
    disk.fails = [True, True, False]
    saver.save(1, groups())
    saver.job.join()
    saver.check()
    assert said == ["the checkpoint of step 1 was not saved: the disk: full"]
    saver.check()
    saver.save(2, groups())
    saver.save(3, groups())
    saver.finish()
    assert len(said) == 2 and steps(tmp_path) == [3] and saver.failures == 0


def test_three_in_a_row_end_the_run(saver, disk, said):
    disk.open.set()
    disk.fails = [True] * 3
    for step in (1, 2, 3):
        saver.save(step, groups())
    with pytest.raises(BadInput, match="3 checkpoints in a row could not be saved: the disk: full"):
        saver.finish()
    assert len(said) == 3


def test_processes_that_learn_of_the_third_failure_at_different_steps_end_at_one(saver, disk, said):
    """`check` says it, and the next `save`, which all call in one step, ends the run."""
    disk.open.set()
    disk.fails = [True] * 3
    for step in (1, 2, 3):
        assert not saver.check()
        saver.save(step, groups())
    saver.job.join()
    assert saver.check() and saver.check() and len(said) == 3
    with pytest.raises(BadInput, match="3 checkpoints in a row could not be saved: the disk: full"):
        saver.save(4, groups())
    assert disk.calls == 3


def test_a_run_may_not_end_well_without_its_last_checkpoint(saver, disk, said):
    disk.open.set()
    disk.fails = [True]
    saver.save(1, groups())
    with pytest.raises(BadInput, match="the last checkpoint could not be saved"):
        saver.finish()
    assert said == ["the checkpoint of step 1 was not saved: the disk: full"]


def test_a_fault_of_ours_is_raised_where_the_save_was_asked_for(saver, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(module, "save_checkpoint", broken)
    saver.save(1, groups())
    with pytest.raises(ZeroDivisionError, match="ours"):
        saver.finish()


def test_older_checkpoints_that_cannot_be_removed_are_said(saver, monkeypatch, said, tmp_path):
    def refused(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "retain", refused)
    saver.save(1, groups())
    saver.finish()
    assert said == ["older checkpoints than that of step 1 stay: [Errno 13] Permission denied"] and steps(tmp_path) == [1]


def test_a_run_that_fails_waits_for_the_save_in_flight(tmp_path, disk, said):
    with pytest.raises(KeyError), Saver(tmp_path, ALONE, {}, Retention(), said.append) as saver:
        saver.save(1, groups())
        threading.Timer(0.2, disk.open.set).start()
        raise KeyError
    assert steps(tmp_path) == [1]


def test_a_run_that_fails_does_not_wait_for_ever(tmp_path, disk, said, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    with pytest.raises(KeyError), Saver(tmp_path, ALONE, {}, Retention(), said.append) as saver:
        saver.save(1, groups())
        raise KeyError
    assert saver.job.is_alive() and saver.job.daemon and steps(tmp_path) == []
    disk.open.set()
    saver.job.join()
