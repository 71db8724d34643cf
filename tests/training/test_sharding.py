"""FSDP2 over gloo: what a run computes does not depend on who holds which rows; what one world saved, another loads bit for bit.

As a script, this file makes all the runs that its tests compare: `python test_sharding.py FOLDER`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripted import made

from vavae_fast.cli import main
from vavae_fast.training.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.slow,  # a score of runs of one to four processes, in one interpreter's children
    pytest.mark.skipif(torch.cuda.is_available(), reason="several processes over gloo; on a GPU machine they would share one over NCCL"),
]
# Widths whose halves fill vector registers: an optimizer rounds the odd elements at a shard's end differently.
BF16 = ("train.precision=bf16", "train.max_steps=6", "optimizer.max_grad_norm=null", "model.hidden_size=96")
SHORT = "train.max_steps=6"


def make_runs(folder: Path) -> None:
    from processes import begin, trained

    begin(folder)
    trained(folder, "alone", 1)
    trained(folder, "none", 2, SHORT, "train.shard=none", "train.micro_batch_size=2")
    trained(folder, "full", 2, "train.shard=full", "train.micro_batch_size=2")
    trained(folder, "hybrid", 4, SHORT, "train.shard=hybrid", nodes=2)
    trained(folder, "checkpointed", 2, SHORT, "train.shard=full", "model.use_checkpoint=true")
    trained(folder, "fused", 2, SHORT, "train.shard=full", "train.fused=true")
    for mode in ("none", "full"):
        trained(folder, f"bf16_{mode}", 2, *BF16, f"train.shard={mode}", "train.micro_batch_size=2")
    trained(folder, "skipped", 2, "train.shard=full", "train.max_steps=3", "optimizer.lr=1e30")
    for processes, steps, mode in ((2, 2, "full"), (1, 3, "full"), (4, 4, "hybrid"), (2, 6, "none")):
        trained(folder, "wandering", processes, f"train.shard={mode}", f"train.max_steps={steps}", nodes=processes // 2 or 1)
    for name, processes in (("nine", 1), ("nine_three", 3)):
        trained(folder, name, processes, SHORT, "train.global_batch_size=9", "train.shard=full", "train.micro_batch_size=3")
    stop_and_go_on(folder, "stopped")
    for name, processes, mode in (("full_1", 1, "none"), ("full_1_2", 2, "full"), ("full_1_2_4", 4, "hybrid")):
        copy_state(folder, name, processes, mode)


def stop_and_go_on(folder: Path, name: str) -> None:
    """SIGTERM to one of two processes in the middle of the run `full`; both leave well, and the same command goes on."""
    from processes import start, statuses, trained, words

    settings, said = ("train.shard=full", "train.micro_batch_size=2"), folder / f"{name}.txt"
    children = start(2, lambda: main(words(folder, name, *settings)), said)
    log = folder / name / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size) and os.waitpid(children[1], os.WNOHANG) == (0, 0):
        time.sleep(0.01)
    os.kill(children[1], signal.SIGTERM)
    began = time.monotonic()
    codes = statuses(children)
    if codes != [0, 0] or time.monotonic() - began > 30:
        sys.exit(f"{name}: exit codes {codes} after {time.monotonic() - began:.0f} s\n{said.read_text()}")
    trained(folder, name, 2, *settings)


def copy_state(folder: Path, name: str, processes: int, mode: str) -> None:
    """Load the newest checkpoint of the run that `name` continues, and save it again as the run `name`, in another world."""
    from processes import start, statuses

    source = folder / name.rpartition("_")[0] / "checkpoints"

    def copy() -> None:
        from vavae_fast.commands import train
        from vavae_fast.commands.invoke import parse
        from vavae_fast.config import load_config
        from vavae_fast.distributed import open_world
        from vavae_fast.training.log import RunLog
        from vavae_fast.training.loop import resume
        from vavae_fast.training.saver import Retention, Saver

        config = load_config(folder / "dit.yaml", (f"data.data_path={folder / 'latents'}", f"train.output_dir={folder}", f"train.shard={mode}"))
        plan = train.plan(config, parse(train, "train", ["--config", str(folder / "dit.yaml")]))
        with open_world() as world:
            log = RunLog(None, "copy")
            state = train._state(plan, world, log)
            step = resume(state, source, world, log)
            with Saver(folder / name / "checkpoints", world, {}, Retention(), log.say) as saver:
                saver.save(step, state.groups())
                saver.finish()

    said = folder / f"{name}.txt"
    codes = statuses(start(processes, copy, said, nodes=processes // 2 or 1))
    if codes != [0] * processes:
        sys.exit(f"{name}: exit codes {codes}\n{said.read_text()}")


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return made(__file__, tmp_path_factory.mktemp("runs") / "made")


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def groups(run, step):
    return load_checkpoint(run / "checkpoints" / f"step_{step:08d}")[0]


def assert_same_losses(run, reference, rtol):
    mine, theirs = lines(run), lines(reference)[: len(lines(run))]
    assert [line["step"] for line in mine] == list(range(1, len(mine) + 1)) and len(mine) in (6, 50)
    for key in ("loss", "mse", "cos", "grad_norm"):
        torch.testing.assert_close(*(torch.tensor([line[key] for line in run], dtype=torch.float64) for run in (mine, theirs)), rtol=rtol, atol=0)


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for group in a:
        assert a[group].keys() == b[group].keys()
        for name in a[group]:
            x, y = a[group][name], b[group][name]
            assert x.dtype == y.dtype and torch.equal(x, y), (group, name)


@pytest.mark.parametrize("name", ["full", "none", "hybrid", "checkpointed", "fused", "wandering"])
def test_steps_are_those_of_one_process(runs, name):
    """fp32, fifty steps of `full`, with clipping in every step; only the order of sums differs. `wandering` went through 2, 1, 4 and 2 processes."""
    norms = [line["grad_norm"] for line in lines(runs / "alone")]
    assert min(norms) > 0.5, "clipped, so that a wrong norm shows"
    assert_same_losses(runs / name, runs / "alone", rtol=1e-5)


def test_three_processes_of_which_one_has_no_row_of_a_short_tensor(runs):
    """Four rows over three are two, two and none."""
    assert_same_losses(runs / "nine_three", runs / "nine", rtol=1e-5)
    held = [load_file(runs / "nine_three" / "checkpoints" / "step_00000006" / f"model.rank0{i}of03.safetensors") for i in range(3)]
    assert [len(part.get("final_layer.linear.bias", ())) for part in held] == [2, 2, 0]
    assert groups(runs / "nine_three", 6)["model"]["final_layer.linear.bias"].shape == (4,)


def test_weights_gathered_in_bf16_are_those_that_autocast_rounds(runs):
    """Two summands have no order, so a run in bf16 with whole weights and one with spread weights must agree in every bit."""
    mine, theirs = (groups(runs / f"bf16_{mode}", 6) for mode in ("full", "none"))
    assert [line["loss"] for line in lines(runs / "bf16_full")] == [line["loss"] for line in lines(runs / "bf16_none")]
    del mine["guard"], theirs["guard"]  # it remembers gradient norms, whose squares are added shard by shard
    assert_same_bits(mine, theirs)
    assert mine["model"]["blocks.0.attn.qkv.weight"].dtype == torch.float32


def test_another_number_of_processes_is_said(runs):
    said = [line for line in (runs / "wandering" / "log.txt").read_text().splitlines() if "continues from" in line]
    changes = [line.partition(", with ")[2].partition(":")[0] for line in said]
    assert changes == ["1 processes instead of 2", "4 processes instead of 1", "2 processes instead of 4"]
    assert "processes instead of" not in (runs / "stopped" / "log.txt").read_text()


def test_each_process_writes_its_rows_and_the_main_one_what_is_whole(runs):
    names = {path.name for path in (runs / "full" / "checkpoints" / "step_00000050").iterdir()}
    shards = {f"{group}.rank0{i}of02.safetensors" for group in ("model", "ema", "optimizer") for i in range(2)}
    assert names == shards | {"guard.safetensors", "manifest.json"}
    hybrid = {path.name for path in (runs / "hybrid" / "checkpoints" / "step_00000006").iterdir()}
    assert hybrid == names, "of four processes on two nodes the second node's are replicas"
    assert groups(runs / "full", 50)["model"].keys() == groups(runs / "alone", 50)["model"].keys()


def test_what_two_processes_saved_one_and_four_load_bit_for_bit(runs):
    first = groups(runs / "full", 50)
    for name in ("full_1", "full_1_2", "full_1_2_4"):
        assert_same_bits(groups(runs / name, 50), first)
    assert (runs / "full_1" / "checkpoints" / "step_00000050" / "model.safetensors").is_file()
    assert (runs / "full_1_2" / "checkpoints" / "step_00000050" / "model.rank01of02.safetensors").is_file()


def test_one_process_told_to_stop_stops_both_and_nothing_is_lost(runs):
    assert_same_bits(groups(runs / "stopped", 50), groups(runs / "full", 50))
    first, last = sorted(path.name for path in (runs / "stopped" / "checkpoints").iterdir())
    said = (runs / "stopped.txt").read_text()
    assert f"another process was stopped: saved step {int(first[5:])} in" in said and last == "step_00000050"
    assert [line["step"] for line in lines(runs / "stopped")] == list(range(1, 51))


def test_a_step_that_is_not_finite_changes_no_row_anywhere(runs):
    """The first step at this rate makes the second gradient infinite: it is skipped, and so is the third, on both processes."""
    assert lines(runs / "skipped")[-1]["skipped"] == 2
    assert all(torch.isfinite(t).all() for t in groups(runs / "skipped", 3)["model"].values())


def test_export_reads_shards(runs, tmp_path):
    for suffix in ("safetensors", "pt"):
        assert main(["export", "--run", str(runs / "full"), "--out", str(tmp_path / f"weights.{suffix}")]) == 0
    expected = groups(runs / "full", 50)["ema"]
    for found in (load_file(tmp_path / "weights.safetensors"), torch.load(tmp_path / "weights.pt", weights_only=True)["ema"]):
        assert found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_lost_shard_ends_in_the_checkpoint_before_it(runs, capsys, tmp_path):
    """One line, then an older checkpoint; asked for by name it is an error."""
    newest = runs / "wandering" / "checkpoints" / "step_00000002"
    shard = newest / "ema.rank01of02.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    try:
        assert main(["export", "--run", str(runs / "wandering"), "--step", "2", "--out", str(tmp_path / "x.pt")]) == 2
    finally:
        shard.write_bytes(content)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ema.rank01of02.safetensors has" in said and "its manifest says" in said


if __name__ == "__main__":
    make_runs(Path(sys.argv[1]))
