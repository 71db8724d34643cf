"""What memory and disk will hold is said before a run begins, with the number to set."""

from dataclasses import replace

import pytest
import torch

from vavae_fast.cli import main
from vavae_fast.commands import preflight
from vavae_fast.errors import BadInput
from vavae_fast.schema import TrainConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("free, fits", [(10_000, None), (1100, 8), (700, 4), (450, 2), (210, 1)])
def test_the_largest_micro_batch_that_fits_is_named(monkeypatch, free, fits):
    """100 for the weights, 100 a sample; a share of 8."""
    monkeypatch.setattr(preflight, "free_memory", lambda device: free)
    if fits in (None, 8):
        preflight.require_memory(lambda size: 100 + 100 * size, 8, 8, CPU)
        return
    with pytest.raises(BadInput, match=rf"^train.micro_batch_size: 8 samples at once need about 900 B of memory, {free} B are free; set .*={fits}$"):
        preflight.require_memory(lambda size: 100 + 100 * size, 8, 8, CPU)


def test_where_not_even_one_sample_fits_another_cure_is_named(monkeypatch):
    monkeypatch.setattr(preflight, "free_memory", lambda device: 150)
    with pytest.raises(BadInput, match="one is too many; set model.use_checkpoint=true"):
        preflight.require_memory(lambda size: 100 + 100 * size, 8, 8, CPU)


@pytest.mark.parametrize("stage", ["train", "train-tokenizer"])
def test_both_stages_ask_before_they_write(start, tiny, out, capsys, monkeypatch, stage):
    """The prediction is a real one; the memory is said to be little."""
    monkeypatch.setattr(preflight, "SMALL", 0)
    needs = []
    monkeypatch.setattr(preflight, "free_memory", lambda device: needs.append(device) or 1)
    words = tiny.dit(out) if stage == "train" else tiny.tokenizer(out)
    assert main([stage, *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "error: train.micro_batch_size: 4 samples at once need about" in said and "one is too many" in said
    assert needs == [CPU] and not out.exists()
    monkeypatch.setattr(preflight, "free_memory", lambda device: 1 << 50)
    assert main([stage, *words, "train.max_steps=1"]) == 0


def test_only_the_first_process_of_a_machine_asks_and_not_for_what_any_holds(monkeypatch):
    gpu = torch.device("cuda", 0)
    assert preflight.predicts(gpu, 10) and preflight.predicts(CPU, preflight.SMALL) and not preflight.predicts(CPU, preflight.SMALL - 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not preflight.predicts(gpu, 10)


def test_the_machines_memory_is_shared_by_its_processes(monkeypatch):
    alone = preflight.free_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < preflight.free_memory(CPU) < alone / 2


@pytest.mark.parametrize(
    "changes, most", [({}, 10), (dict(keep_last=2), 3), (dict(keep_last=2, keep_every=300), 6), (dict(keep_last=50), 10), (dict(ckpt_every=5000), 1)]
)
def test_checkpoints_at_a_time_and_what_they_take(tmp_path, monkeypatch, changes, most):
    """1,000 steps; a checkpoint every 100."""
    config = replace(TrainConfig(ckpt_every=100), **changes)
    monkeypatch.setattr(preflight.artifacts, "free_space", lambda folder: 450)
    disk = preflight.plan_disk(tmp_path, 100, config, 1000)
    assert f"; {most} at a time at most: {most * 100 if most < 10 else '1.0 k'}" in disk.line
    assert disk.short is (most > 4) and (not disk.short or disk.line.endswith("make room, or set train.keep_last=2, which takes 300 B"))


def test_checkpoints_that_are_there_take_no_more_room(tmp_path, monkeypatch):
    for step in (100, 200):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    monkeypatch.setattr(preflight.artifacts, "free_space", lambda folder: 100)
    disk = preflight.plan_disk(tmp_path, 100, TrainConfig(ckpt_every=100, keep_last=2), 1000)
    assert not disk.short and "3 at a time at most: 100 B more than now, 100 B are free" in disk.line


def test_a_run_that_will_fill_the_disk_says_so_at_its_start_and_goes_on(tiny, out, capsys, monkeypatch):
    monkeypatch.setattr(preflight.artifacts, "free_space", lambda folder: 1_700_000)  # of which a save needs 1.6 MB
    words = tiny.dit(out, "dit", "train.max_steps=4", "train.ckpt_every=1")
    assert main(["train", *words, "--dry-run"]) == 0
    assert "the disk will be full; make room, or set train.keep_last=2, which takes 1.5 MB" in capsys.readouterr().out
    assert main(["train", *words]) == 0
    assert "the disk will be full" in (out / "dit" / "log.txt").read_text()
