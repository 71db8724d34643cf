"""train, whole: what it writes, resume bit for bit, processes and micro-batches that change nothing, changed configs refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import contents, done, files, metrics

from vavae_fast.cli import main

ROOT = Path(__file__).parents[2]
STEP = "checkpoints/step_{:08d}"


def weights(run, step, group="model"):
    return load_file(run / STEP.format(step) / f"{group}.safetensors")


def same_checkpoint(a, b, step):
    return contents(a / STEP.format(step), "*.safetensors") == contents(b / STEP.format(step), "*.safetensors")


def test_a_run_folder_holds_what_it_promises(tiny):
    run = tiny.dit_run
    parts = ("ema", "guard", "model", "optimizer")
    expected = [f"{STEP.format(s)}/{name}.safetensors" for s in (2, 4) for name in parts] + [f"{STEP.format(s)}/manifest.json" for s in (2, 4)]
    assert set(files(run)) == {*expected, "config.yaml", "log.txt", "layers.jsonl", "manifest.json", "metrics.jsonl", "report.html"}
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["kind"] == "run" and manifest["processes"] == 1 and manifest["data"]["count"] == 16
    assert manifest["data"]["tokenizer"] == json.loads((tiny.latents / "manifest.json").read_text())["facts"]["tokenizer"]
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "mse", "cos", "lr", "grad_norm", "images_per_second", "data_wait", "memory_gb"} <= lines[0].keys()
    assert all(abs(line["loss"] - line["mse"] - line["cos"]) < 1e-5 for line in lines)


def test_training_lowers_the_loss(tiny, out):
    done("train", *tiny.dit(out, "long", "train.max_steps=100", "train.log_every=25", "train.global_batch_size=16", "optimizer.lr=5e-3"))
    losses = [line["loss"] for line in metrics(out / "long")]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]


def test_the_same_command_gives_the_same_bits(tiny, out):
    done("train", *tiny.dit(out))
    assert same_checkpoint(out / "dit", tiny.dit_run, 4)


def test_two_steps_and_two_more_are_four(tiny, out):
    done("train", *tiny.dit(out, "dit", "train.max_steps=2"))
    done("train", *tiny.dit(out))
    assert same_checkpoint(out / "dit", tiny.dit_run, 4)
    assert [(m["step"], m["loss"]) for m in metrics(out / "dit")] == [(m["step"], m["loss"]) for m in metrics(tiny.dit_run)]


def test_terminated_and_started_again_is_never_stopped(tiny, out):
    """SIGTERM to the process itself; it saves, says where, leaves with 0; the same command goes on, to the same bits."""
    rarely = "train.ckpt_every=100000"
    argv = [sys.executable, "-m", "vavae_fast", "train", *tiny.dit(out / "stopped", "dit", "train.max_steps=100000", rarely)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    log = out / "stopped" / "dit" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "SIGTERM: saved step" in said and errors == "", errors
    step = int(next((out / "stopped" / "dit" / "checkpoints").iterdir()).name[5:])
    last = step + 3
    done("train", *tiny.dit(out / "stopped", "dit", f"train.max_steps={last}", rarely))
    done("train", *tiny.dit(out / "again", "dit", f"train.max_steps={last}", rarely))
    assert same_checkpoint(out / "stopped" / "dit", out / "again" / "dit", last)


def test_killed_in_the_middle_it_continues_from_the_last_whole_checkpoint(tiny, out):
    """As after SIGKILL between two saves: a half-written folder beside the last whole one, log lines of steps that are lost."""
    done("train", *tiny.dit(out, "dit", "train.max_steps=3", "train.ckpt_every=2"))
    run = out / "dit"
    half = run / (STEP.format(4) + ".tmp")
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    for name in contents(run / STEP.format(3), "*"):
        (run / STEP.format(3) / name).unlink()
    (run / STEP.format(3)).rmdir()
    done("train", *tiny.dit(out))
    assert same_checkpoint(run, tiny.dit_run, 4) and [m["step"] for m in metrics(run)] == [1, 2, 3, 4]
    assert not half.exists()


def torchrun(processes, *words, timeout=240):
    """`torchrun --nproc-per-node N train.py …`"""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(ROOT / "train.py"), *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


TEN = ("train.max_steps=10", "train.ckpt_every=10", "train.global_batch_size=8")


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """Ten steps of a batch of 8 in one process, at once."""
    out = tmp_path_factory.mktemp("alone")
    done("train", *tiny.dit(out, "dit", *TEN))
    return out / "dit"


def assert_same_losses(run, reference, rtol=1e-5):
    a, b = metrics(run), metrics(reference)
    assert [m["step"] for m in a] == [m["step"] for m in b] == list(range(1, 11))
    for key in ("loss", "mse", "cos", "grad_norm"):
        torch.testing.assert_close(torch.tensor([m[key] for m in a]), torch.tensor([m[key] for m in b]), rtol=rtol, atol=0)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulated_micro_batches_are_the_batch(tiny, out, alone, micro):
    done("train", *tiny.dit(out, "dit", *TEN, f"train.micro_batch_size={micro}"))
    assert_same_losses(out / "dit", alone)


def test_fused_is_plain(tiny, out, alone):
    done("train", "--fused", *tiny.dit(out, "dit", *TEN))
    assert_same_losses(out / "dit", alone, rtol=1e-4)
    assert weights(out / "dit", 10).keys() == weights(alone, 10).keys()


@pytest.mark.slow  # starts three interpreters
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes over gloo; on a GPU machine they would share one over NCCL")
def test_two_processes_are_one(tiny, out, alone):
    """Over gloo, with accumulation; then the other half of the run in one process: the world may change, the run does not."""
    result = torchrun(2, *tiny.dit(out, "two", *TEN, "train.micro_batch_size=2"))
    assert result.returncode == 0, result.stderr
    assert_same_losses(out / "two", alone)
    assert json.loads((out / "two" / "manifest.json").read_text())["processes"] == 2
    for name, value in weights(alone, 10).items():
        torch.testing.assert_close(weights(out / "two", 10)[name], value, rtol=1e-3, atol=1e-5)
    done("train", *tiny.dit(out, "two", *TEN[1:], "train.max_steps=12"))
    assert [m["step"] for m in metrics(out / "two")] == list(range(1, 13))


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes over gloo; on a GPU machine they would share one over NCCL")
def test_a_batch_that_does_not_divide_ends_all_processes_at_once(tiny, out):
    result = torchrun(2, *tiny.dit(out, "two", "train.global_batch_size=5"), timeout=120)
    # Either process may be the first to say so: the launcher ends the other, which may not have spoken.
    said = re.findall(r"^error(?: \(rank 1\))?: (train.*)$", result.stderr, re.MULTILINE)
    assert result.returncode != 0 and set(said) == {"train.global_batch_size 5 does not divide over 2 processes; nearest: 4, 6"}
    assert not (out / "two").exists()


# -- the run and its config -------------------------------------------------------------------------------------------


def test_a_changed_config_is_refused_with_its_cure(tiny, out, capsys):
    done("train", *tiny.dit(out, "dit", "train.max_steps=2"))
    before = contents(out, "*.*")
    capsys.readouterr()
    assert main(["train", *tiny.dit(out, "dit", "optimizer.lr=2e-3", "data.flip=false")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "optimizer.lr was 0.001, is 0.002" in said and "data.flip was True, is False" in said
    assert "--override optimizer.lr" in said and "choose another train.exp_name" in said
    assert contents(out, "*.*") == before
    assert main(["train", *tiny.dit(out, "dit", "optimizer.lr=2e-3", "data.flip=false"), "--override", "optimizer.lr"]) == 2
    said = capsys.readouterr().err
    assert "data.flip" in said and "optimizer.lr" not in said
    done("train", *tiny.dit(out, "dit", "optimizer.lr=2e-3", "--override", "optimizer.lr"))
    assert metrics(out / "dit")[-1]["lr"] == 2e-3


def test_how_a_run_is_watched_may_change(tiny, out):
    done("train", *tiny.dit(out, "dit", "train.max_steps=2"))
    done("train", *tiny.dit(out, "dit", "train.log_every=2", "train.ckpt_every=3", "train.micro_batch_size=2", "sample.cfg_scale=3"))
    assert [m["step"] for m in metrics(out / "dit")] == [1, 2, 4]


def test_never_resuming_is_respected(tiny, out, capsys):
    done("train", *tiny.dit(out))
    for words in (("--resume", "never"), ("train.resume=false",)):
        assert main(["train", *tiny.dit(out), *words]) == 2
        assert "holds checkpoints of an earlier run; continue it with --resume auto" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_is_said_and_stepped_over(tiny, out, capsys):
    done("train", *tiny.dit(out))
    file = out / "dit" / STEP.format(4) / "ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    done("train", *tiny.dit(out))
    said = capsys.readouterr().out
    assert "ema.safetensors is damaged" in said and "continues from" in said and "step_00000002" in said
    assert same_checkpoint(out / "dit", tiny.dit_run, 4)


# -- starting from weights --------------------------------------------------------------------------------------------


def test_weights_to_start_from(tiny, out, capsys):
    more = (f"train.weight_init={tiny.dit_run}", "train.max_steps=1", "optimizer.lr=1e-12", "optimizer.max_grad_norm=null")
    done("train", *tiny.dit(out, "dit", *more))
    assert "starts from the weights of" in capsys.readouterr().out
    for name, value in weights(tiny.dit_run, 4).items():
        torch.testing.assert_close(weights(out / "dit", 1)[name], value, rtol=0, atol=1e-10)
    done("train", *tiny.dit(out, "dit", *more, "train.max_steps=2"))
    assert "starts from the weights of" not in capsys.readouterr().out, "a continued run has its own"


def test_qk_norm_can_be_switched_on_for_trained_weights(tiny, out, capsys):
    done("train", *tiny.dit(out, "normed", f"train.weight_init={tiny.dit_run}", "model.use_qknorm=true", "train.max_steps=2"))
    assert "QK-norm added to its" in (out / "normed/log.txt").read_text()
    norm = weights(out / "normed", 2)["blocks.0.attn.q_norm.weight"]
    assert norm.isfinite().all() and not torch.equal(norm, torch.ones_like(norm))


def test_weights_of_another_model_are_refused_before_anything_is_written(tiny, out, capsys):
    assert main(["train", *tiny.dit(out, "dit", f"train.weight_init={tiny.dit_run}", "model.hidden_size=64")]) == 2
    assert "hidden channels" in capsys.readouterr().err and not out.exists()


def test_a_model_without_null_class_trains(tiny, out):
    done("train", *tiny.dit(out, "dit", "model.class_dropout_prob=0", "train.max_steps=2"))
    assert weights(out / "dit", 2)["y_embedder.embedding_table.weight"].shape[0] == 2


@pytest.mark.parametrize("more", [
    ("transport.lognorm_until=2",), ("transport.path_type=GVP",),
    ("transport.path_type=VP", "transport.prediction=noise", "transport.use_cosine_loss=false"),
    ("data.latent_norm=false", "data.latent_multiplier=0.18215"), ("model.use_qknorm=true", "model.use_checkpoint=true"),
    ("train.precision=bf16", "train.residual_dtype=bf16", "model.use_checkpoint=selective", "train.attention=math"),
    ("model.learn_sigma=true", "transport.use_cosine_loss=false"), ("train.precision=bf16",),
    ("optimizer.warmup_steps=2", "optimizer.decay_fraction=0.5"),
    ("train.ema_warmup=true", "optimizer.weight_decay=0.1", "model.wo_shift=true"),
])  # fmt: skip
def test_every_kind_of_run_runs(tiny, out, more):
    done("train", *tiny.dit(out, "dit", "train.max_steps=3", *more))
    assert all(m["loss"] is not None and m["skipped"] == 0 for m in metrics(out / "dit"))


def test_what_precision_and_attention_need_is_said_before_anything_is_written(tiny, out, capsys):
    assert main(["train", *tiny.dit(out, "narrow", "train.residual_dtype=bf16")]) == 2
    assert capsys.readouterr().err == "error: train.residual_dtype: must be fp32 on a CPU, unless train.precision=bf16, got 'bf16'\n"
    assert not (out / "narrow").exists()
    assert main(["train", *tiny.dit(out, "narrow", "train.residual_dtype=bf16", "train.precision=fp32")]) == 2
    assert "residual_dtype: must be fp32 with precision fp32" in capsys.readouterr().err
    assert main(["train", *tiny.dit(out, "narrow", "train.fp8=true")]) == 2
    assert "train.fp8 needs " in capsys.readouterr().err
    assert main(["train", *tiny.dit(out, "narrow", "train.attention=flush")]) == 2
    assert "unknown backend 'flush'; known: auto, sdpa" in capsys.readouterr().err
