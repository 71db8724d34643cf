"""train-tokenizer, whole: what it writes, resume bit for bit over the GAN's start, stages that start from each other."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import contents, done, files, metrics

from vavae_fast.cli import main

STEP = "checkpoints/step_{:08d}"


def weights(run, step, group="model"):
    return load_file(run / STEP.format(step) / f"{group}.safetensors")


def same_checkpoint(a, b, step):
    return contents(a / STEP.format(step), "*.safetensors") == contents(b / STEP.format(step), "*.safetensors")


def test_a_run_folder_holds_what_it_promises(tiny):
    run = tiny.tokenizer_run
    parts = ("discriminator", "guard", "model", "optimizer", "optimizer_disc")
    expected = [f"{STEP.format(s)}/{name}.safetensors" for s in (2, 4) for name in parts] + [f"{STEP.format(s)}/manifest.json" for s in (2, 4)]
    assert set(files(run)) == {*expected, "config.yaml", "log.txt", "manifest.json", "metrics.jsonl", "report.html"}
    manifest = json.loads((run / STEP.format(4) / "manifest.json").read_text())
    assert manifest["stage"] == "tokenizer" and manifest["architecture"]["embed_dim"] == 4 and manifest["foundation"] == "standin"
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["g_loss"] != 0 for line in lines] == [False, False, False, True], "disc_start 5: from iteration 3"
    assert ["d_loss" in line for line in lines] == [False, False, True, True], "and the discriminator from 2"


def test_two_steps_and_two_more_are_four(tiny, out):
    """Over the start of the GAN: its optimizer has no state in the first half."""
    done("train-tokenizer", *tiny.tokenizer(out, "tokenizer", "train.max_steps=2"))
    assert weights(out / "tokenizer", 2, "optimizer_disc") == {}
    done("train-tokenizer", *tiny.tokenizer(out))
    assert same_checkpoint(out / "tokenizer", tiny.tokenizer_run, 4)


def test_a_stage_starts_from_the_one_before(tiny, out, capsys):
    more = (f"weight_init={tiny.tokenizer_run}", "train.max_steps=1", "model.base_learning_rate=1e-12",
            "model.params.proj_fix=true", "model.params.lossconfig.params.disc_start=1")  # fmt: skip
    done("train-tokenizer", *tiny.tokenizer(out, "stage2", *more))
    assert "starts from the weights of" in capsys.readouterr().out
    before, after = weights(tiny.tokenizer_run, 4), weights(out / "stage2", 1)
    assert before.keys() == after.keys() and torch.equal(before["linear_proj.weight"], after["linear_proj.weight"])
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-10)
    for name, value in weights(tiny.tokenizer_run, 4, "discriminator").items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(weights(out / "stage2", 1, "discriminator")[name], value, rtol=0, atol=1e-10)


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(tiny, out, capsys):
    assert main(["train-tokenizer", *tiny.tokenizer(out, "stage2", f"weight_init={tiny.tokenizer_run}", "model.params.ddconfig.ch=16")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "base channels" in said and not out.exists()


def test_a_changed_batch_is_refused_however_it_is_spelt(tiny, out, capsys):
    """Without train.global_batch_size the batch is batch_size x devices x nodes x accumulation, as the reference's is."""
    words = ("train.global_batch_size=null", "data.params.batch_size=2", "lightning.trainer.devices=2")
    done("train-tokenizer", *tiny.tokenizer(out, "t", *words, "train.max_steps=2"))
    assert main(["train-tokenizer", *tiny.tokenizer(out, "t", *words[:2], "lightning.trainer.devices=4")]) == 2
    assert "lightning.trainer.devices was 2, is 4" in capsys.readouterr().err
    done("train-tokenizer", *tiny.tokenizer(out, "t", *words, "lightning.trainer.max_epochs=3"))


def test_epochs_give_the_steps(tiny, out):
    done("train-tokenizer", *tiny.tokenizer(out, "t", "train.max_steps=null", "lightning.trainer.max_epochs=1"))
    assert metrics(out / "t")[-1]["step"] == 4, "16 images in batches of 4"


@pytest.mark.parametrize("more", [
    ("model.params.use_vf=null",), ("model.params.reverse_proj=false",), ("model.params.lossconfig.params.perceptual_weight=0",),
    ("model.params.lossconfig.params.disc_loss=vanilla", "model.params.lossconfig.params.disc_start=0"),
    ("data.crop=center", "data.flip=true", "max_grad_norm=1.0", "decay_fraction=0.5"),
    ("lightning.trainer.precision=bf16", "train.micro_batch_size=2"),
    ("train.fused=true",), ("data.path=builtin:digits/test",),
])  # fmt: skip
def test_every_kind_of_run_runs(tiny, out, more):
    done("train-tokenizer", *tiny.tokenizer(out, "t", "train.max_steps=3", *more))
    assert all(m["loss"] is not None and m["skipped"] == 0 for m in metrics(out / "t"))


def test_dry_run_says_what_would_be_done_and_writes_nothing(tiny, out, capsys):
    done("train-tokenizer", *tiny.tokenizer(out), "--dry-run")
    said = capsys.readouterr().out
    assert "f8d4: 0.02 M parameters" in said and "16 images, 2 classes" in said and "(new)" in said and not out.exists()


def test_dry_run_predicts_memory_and_operations_of_all_networks(tiny, out, capsys):
    """Only what is trained is in a checkpoint, twice more as moments."""
    done("train-tokenizer", *tiny.tokenizer(out), "--dry-run", "train.precision=bf16", "train.fused=true")
    said = capsys.readouterr().out
    assert "foundation 0.0" in said and "perceptual 0.0" in said and "discriminator 0.0" in said
    assert "GFLOP a training image, all networks, with the GAN" in said and "per GPU in bf16, predicted" in said
    assert "one: 4 steps, to 4; lr 0.001 (not scaled); GAN from iteration 3, weight 0.5; VF weight 0.1, margins 0.1 and 0.2" in said


# -- weights and sizes that do not fit: one line before anything is written -------------------------------------------


def some_weights(path, **shapes):
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


def lpips(files):
    return [f"perceptual.vgg_weights={files['resnet']}", f"perceptual.linear_weights={files['linear']}"]


@pytest.mark.parametrize("words, said", [
    (lambda t, files: ["perceptual.standin=null"], "perceptual.vgg_weights: not set; give torchvision's VGG16 weights"),
    (lambda t, files: ["perceptual.standin=null", f"perceptual.vgg_weights={files['resnet']}"], "perceptual.linear_weights: not set"),
    (lambda t, files: ["perceptual.standin=null", *lpips(files)],
     "unexpected: conv1.weight"),
    (lambda t, files: ["perceptual.standin=null", f"perceptual.vgg_weights={files['resnet']}", f"perceptual.linear_weights={files['resnet']}"],
     "holds no linear layers"),
    (lambda t, files: ["perceptual.standin=null", *lpips(files), "data.image_size=8", "model.params.ddconfig.resolution=8"],
     "LPIPS needs 16 pixels, data.image_size is 8; set perceptual_weight=0"),
    (lambda t, files: ["model.params.use_vf=dinov2-small"], "foundation.weights: not set"),
    (lambda t, files: ["model.params.use_vf=dinov2-small", f"foundation.weights={files['resnet']}"], "resnet.safetensors: "),
    (lambda t, files: ["data.image_size=32"], "an encoder of 16-pixel images, data.image_size is 32"),
    (lambda t, files: ["data.image_size=20"], "data.image_size 20 is not a multiple of the downsampling factor 8"),
    (lambda t, files: [f"foundation.standin={t.root / 'perceptual.safetensors'}"], "no encoder"),
    (lambda t, files: [f"weight_init={files['resnet']}"], "resnet.safetensors: "),
])  # fmt: skip
def test_weights_of_another_model_and_sizes_that_do_not_fit(tiny, out, tmp_path, capsys, words, said):
    linear = {f"lin{k}.model.1.weight": (1, width, 1, 1) for k, width in enumerate((64, 128, 256, 512, 512))}
    found = dict(resnet=some_weights(tmp_path / "resnet.safetensors", **{"conv1.weight": (4, 3, 7, 7)}),
                 linear=some_weights(tmp_path / "vgg.safetensors", **linear))  # fmt: skip
    assert main(["train-tokenizer", *tiny.tokenizer(out, "t", *words(tiny, found))]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not out.exists()
