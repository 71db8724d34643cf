"""Run folders: compared with the config that made them; a second training of one is refused."""

import os
from dataclasses import replace

import pytest
from tiny import copy

from vavae_fast.commands.run_lock import locked
from vavae_fast.commands.runs import check_run_folder, run_config, start_run
from vavae_fast.config import load_config, to_mapping, to_yaml
from vavae_fast.errors import BadInput
from vavae_fast.training.saver import save_checkpoint


@pytest.fixture
def run(tiny, tmp_path):
    """A run of the tiny config with a checkpoint, and that config."""
    config = load_config(tiny.root / "dit.yaml")
    start_run(tmp_path / "run", config, {})
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, [], {})
    return tmp_path / "run", config


def test_the_same_config_continues(run):
    folder, config = run
    assert check_run_folder(folder, config, "auto", ()) is True
    assert (folder / "config.yaml").read_text().partition("\n")[2] == to_yaml(config)
    assert run_config(folder) == to_mapping(config)
    data = (folder / "config.yaml").read_bytes()
    for at in (2, 40, len(data) // 2, data.index(b"\n")):
        (folder / "config.yaml").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        if at == 2:  # no hash any more, and the lines are as they were
            assert run_config(folder) == to_mapping(config)
        else:
            with pytest.raises(BadInput, match="config.yaml: damaged, or edited"):
                run_config(folder)
    (folder / "config.yaml").write_bytes(data)


def test_a_folder_without_checkpoints_is_new_whatever_its_config(run, tmp_path):
    folder, config = run
    (folder / "checkpoints" / "step_00000001" / "manifest.json").unlink()
    assert check_run_folder(folder, replace(config, optimizer=replace(config.optimizer, lr=9.0)), "never", ()) is False
    assert check_run_folder(tmp_path / "none", config, "never", ()) is False and not (tmp_path / "none").exists()


def test_differences_are_named_five_at_most(run):
    folder, config = run
    changed = replace(config, optimizer=replace(config.optimizer, lr=9.0, beta2=0.5, weight_decay=1.0, warmup_steps=5, max_grad_norm=None,
                                                decay_fraction=0.5))  # fmt: skip
    with pytest.raises(BadInput) as caught:
        check_run_folder(folder, changed, "auto", ())
    message = str(caught.value)
    assert message.count("--override") == 5 and "optimizer.lr was 0.001, is 9.0" in message and "\n" not in message
    keys = ("lr", "beta2", "weight_decay", "warmup_steps", "max_grad_norm", "decay_fraction")
    assert check_run_folder(folder, changed, "auto", [f"optimizer.{key}" for key in keys]) is True


@pytest.mark.parametrize("free", [dict(max_steps=9), dict(log_every=9), dict(micro_batch_size=2), dict(keep_last=3), dict(fused=True)])
def test_keys_that_do_not_change_the_result_are_free(run, free):
    folder, config = run
    assert check_run_folder(folder, replace(config, train=replace(config.train, **free)), "auto", ()) is True


def test_a_key_that_the_run_did_not_know_yet_meant_its_default(run):
    folder, config = run
    text = (folder / "config.yaml").read_text()
    later = ("deterministic:", "slots:", "#")  # the hash too, which an earlier version did not write
    (folder / "config.yaml").write_text("".join(line for line in text.splitlines(True) if not line.strip().startswith(later)))
    assert (folder / "config.yaml").read_text() != text and check_run_folder(folder, config, "auto", ()) is True
    with pytest.raises(BadInput, match="train.deterministic was none, is elastic"):
        check_run_folder(folder, replace(config, train=replace(config.train, deterministic="elastic")), "auto", ())


def test_a_tokenizer_of_several_stages_continues(tiny, tmp_path):
    """Their list has a default, which is no key of a config that has stages."""
    config = load_config(tiny.root / "tokenizer.yaml", ("stages=[{name: a, steps: 3}, {name: b, steps: 2}]",))
    start_run(tmp_path / "run", config, {})
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, [], {})
    assert check_run_folder(tmp_path / "run", config, "auto", ()) is True
    longer = load_config(tiny.root / "tokenizer.yaml", ("stages=[{name: a, steps: 4}, {name: b, steps: 2}]",))
    with pytest.raises(BadInput, match="stages.a.steps was 3, is 4"):
        check_run_folder(tmp_path / "run", longer, "auto", ())


@pytest.mark.parametrize("bound", [dict(global_batch_size=8), dict(global_seed=1), dict(ema_decay=0.5), dict(precision="bf16")])
def test_keys_that_change_it_are_not(run, bound):
    folder, config = run
    with pytest.raises(BadInput, match=f"--override train.{next(iter(bound))}"):
        check_run_folder(folder, replace(config, train=replace(config.train, **bound)), "auto", ())


def test_a_second_training_of_one_run_is_refused(tiny, tmp_path, capsys):
    from vavae_fast.cli import main

    folder = copy(tiny.dit_run, tmp_path / "runs" / "dit")
    capsys.readouterr()
    with locked(folder):
        assert main(["train", *tiny.dit(tmp_path / "runs")]) == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
