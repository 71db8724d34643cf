"""Checkpoints of another world, another architecture, another disk: what a command makes of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import contents, copy, done, files

from vavae_fast import artifacts
from vavae_fast.cli import main
from vavae_fast.config import load_config, to_mapping
from vavae_fast.training.checkpoint import ROWS, load_checkpoint
from vavae_fast.training.saver import Part, save_checkpoint

STEP = "checkpoints/step_{:08d}"


def reshard(run, step=4):
    """Put in place of a plain checkpoint what two processes would have written: each half of the rows, cut as FSDP cuts."""
    folder = run / STEP.format(step)
    groups, manifest = load_checkpoint(folder)
    parts = [Part("guard.safetensors", dict(groups.pop("guard")))]
    for group, tensors in groups.items():
        spread = {name: t for name, t in tensors.items() if t.ndim and t.shape[0] > 1}
        for rank in (0, 1):
            chunks = {name: t.chunk(2)[rank].contiguous() for name, t in spread.items()}
            rows = {name: [rank * -(-t.shape[0] // 2), t.shape[0]] for name, t in spread.items()}
            whole = {name: t.clone() for name, t in tensors.items() if name not in spread} if rank == 0 else {}
            parts.append(Part(f"{group}.rank0{rank}of02.safetensors", chunks | whole, {ROWS: json.dumps(rows)}))
    shutil.rmtree(folder)
    save_checkpoint(run / "checkpoints", step, parts, {"stage": manifest["stage"]})


def test_a_checkpoint_says_what_it_is_of(tiny):
    """Enough to go on without the run folder around it: config, data, tokenizer, seed, processes, versions."""
    manifest = json.loads((tiny.dit_run / STEP.format(4) / "manifest.json").read_text())
    assert manifest["step"] == 4 and manifest["seed"] == 0 and manifest["processes"] == 1 and "torch" in manifest["versions"]
    assert manifest["config"] == to_mapping(load_config(tiny.dit_run / "config.yaml"))
    assert manifest["data"]["tokenizer"] == json.loads((tiny.latents / "manifest.json").read_text())["facts"]["tokenizer"]
    tokenizer = json.loads((tiny.tokenizer_run / STEP.format(4) / "manifest.json").read_text())
    assert tokenizer["architecture"]["embed_dim"] == 4 and tokenizer["config"]["data"]["path"] == str(tiny.images)


@pytest.fixture
def sharded(tiny, out):
    run = copy(tiny.dit_run, out / "dit")
    reshard(run)
    return run


def test_a_sharded_checkpoint_continues_to_the_same_bits(tiny, out, sharded):
    copy(tiny.dit_run, out / "plain" / "dit")
    for folder in (out, out / "plain"):
        done("train", *tiny.dit(folder, "dit", "train.max_steps=6"))
    assert contents(sharded / STEP.format(6), "*.safetensors") == contents(out / "plain" / "dit" / STEP.format(6), "*.safetensors")


def test_a_sharded_checkpoint_samples_the_same_images(tiny, out, sharded):
    for name, run in (("a", sharded), ("b", tiny.dit_run)):
        done("sample", *tiny.dit(), "--checkpoint", str(run), "--num", "4", "--out", str(out / name))
    a, b = (np.load(out / name / "samples.npz")["arr_0"] for name in "ab")
    assert a.shape == b.shape and (a == b).all()


@pytest.mark.parametrize("which", ["ema", "model"])
def test_a_sharded_checkpoint_exports_the_same_weights(tiny, out, sharded, which):
    out.mkdir(exist_ok=True)
    for name, run in (("a", sharded), ("b", tiny.dit_run)):
        done("export", "--run", str(run), "--weights", which, "--out", str(out / f"{name}.pt"))
    a, b = (torch.load(out / f"{name}.pt", weights_only=True)[which] for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kept(run):
    """All files of a run and their bytes, without the log, which may say more."""
    return {name: (run / name).read_bytes() for name in files(run) if name != "log.txt"}


@pytest.mark.parametrize(
    "change, words",
    [
        ("model.depth=2", "lacks blocks.1.adaLN_modulation.1.bias, "),
        ("model.use_swiglu=false", "lacks blocks.0.mlp.fc1.bias, blocks.0.mlp.fc1.weight, "),
        ("data.num_classes=5", "y_embedder.embedding_table.weight is (3, 32) float32, the model's is (6, 32) float32"),
    ],
)
def test_another_architecture_is_refused_whatever_is_overridden(tiny, out, capsys, change, words):
    run = copy(tiny.dit_run, out / "dit")
    before = kept(run)
    capsys.readouterr()
    assert main(["train", *tiny.dit(out, "dit", change, "train.max_steps=6"), "--override", change.split("=")[0]]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said and "the architecture of a run cannot change: take the config back" in said
    assert kept(run) == before


def test_a_tokenizer_is_not_sharded(tiny, out, capsys):
    assert main(["train-tokenizer", *tiny.tokenizer(out, "tokenizer", "train.shard=full")]) == 2
    assert "train.shard: must be none: a tokenizer's weights are not sharded, got 'full'" in capsys.readouterr().err and not out.exists()


def test_how_weights_are_spread_may_change(tiny, out):
    copy(tiny.dit_run, out / "dit")
    done("train", *tiny.dit(out, "dit", "train.max_steps=5", "train.shard=full", "train.keep_last=2", "train.keep_every=4"))
    assert sorted(path.name for path in (out / "dit" / "checkpoints").iterdir()) == ["step_00000004", "step_00000005"]


def test_a_disk_that_has_room_again_loses_one_checkpoint_and_not_the_run(tiny, out, capsys, monkeypatch):
    """The second save finds the disk full; training goes on, says so, and the third is there."""
    from vavae_fast.training import saver

    real, calls = saver.write_tensors, []

    def full(path, *rest):
        calls.append(path.parent.name)
        if path.parent.name == "step_00000004.tmp":
            raise OSError(28, "No space left on device", str(path))
        real(path, *rest)

    monkeypatch.setattr(saver, "write_tensors", full)
    done("train", *tiny.dit(out, "dit", "train.max_steps=6"))
    assert sorted(path.name for path in (out / "dit" / "checkpoints").iterdir()) == ["step_00000002", "step_00000006"]
    assert "the checkpoint of step 4 was not saved: " in capsys.readouterr().out and "step_00000004.tmp" in calls


def test_other_images_or_latents_are_refused_and_a_new_name_of_theirs_is_not(tiny, out, capsys):
    """Another sample would move all others to other places of the run."""
    done("train-tokenizer", *tiny.tokenizer(out, "vae", "train.max_steps=2"))
    moved = copy(tiny.images, out / "moved")
    again = tiny.tokenizer(out, "vae", f"data.path={moved}", "--override", "data.path")
    done("train-tokenizer", *again, "train.max_steps=3")
    (moved / "ant" / "new.png").write_bytes((moved / "ant" / "0.png").read_bytes())
    capsys.readouterr()
    assert main(["train-tokenizer", *again]) == 2
    assert "was trained on other data: count was 16, is 17, fingerprint was" in capsys.readouterr().err
    done("train-tokenizer", *again, "--override", "data")

    run = copy(tiny.dit_run, out / "dit")
    manifest = artifacts.read_json(run / "manifest.json")
    manifest["data"]["count"] += 1
    artifacts.write_json(run / "manifest.json", manifest)
    words = tiny.dit(out, "dit", "train.max_steps=6")
    assert main(["train", *words]) == 2
    assert "was trained on other data: count was 17, is 16; give the same" in capsys.readouterr().err
    done("train", *words, "--override", "data")


def test_the_micro_batch_of_a_tokenizer_is_part_of_its_run(tiny, out, capsys):
    """BatchNorm and the adaptive weights look at one; LightningDiT's may change."""
    done("train-tokenizer", *tiny.tokenizer(out, "vae", "train.max_steps=2"))
    capsys.readouterr()
    assert main(["train-tokenizer", *tiny.tokenizer(out, "vae", "train.micro_batch_size=2")]) == 2
    assert "--override train.micro_batch_size" in capsys.readouterr().err
    assert main(["train-tokenizer", *tiny.tokenizer(out, "other", "train.compile=blocks")]) == 2
    assert "train.compile" in capsys.readouterr().err
