"""A tokenizer's stages are one run: where each begins is a function of the step, what each ends with stays and can be exported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import contents, done, metrics

from vavae_fast.cli import main
from vavae_fast.config import load_config
from vavae_fast.training import guard, tokenizer

ROOT = Path(__file__).parents[2]
STEP = "checkpoints/step_{:08d}"
STAGES = ("stages=[{name: align, steps: 4, vf_weight: 0.5}, {name: reconstruct, steps: 3, disc_start: 1}, "
          "{name: margins, epochs: 1, disc_start: 1, distmat_margin: 0.25, proj_fix: true, base_learning_rate: 5.0e-4}]")  # fmt: skip
RECIPE = (STAGES, "train.max_steps=null", "train.keep_last=2")
STEPS = 11  # 4, 3 and 16 images in batches of 4


@pytest.fixture(scope="session")
def staged(tiny, tmp_path_factory):
    """A run through all stages that nobody disturbed."""
    out = tmp_path_factory.mktemp("staged")
    done("train-tokenizer", *tiny.tokenizer(out, "t", *RECIPE))
    return out / "t"


def tensors(run, step, group="model"):
    return load_file(run / STEP.format(step) / f"{group}.safetensors")


def test_lines_and_checkpoints_say_the_stage(staged):
    assert [line["stage"] for line in metrics(staged)] == ["align"] * 4 + ["reconstruct"] * 3 + ["margins"] * 4
    assert [line["lr"] for line in metrics(staged)] == [1e-3] * 7 + [5e-4] * 4
    kept = sorted(int(path.name[5:]) for path in (staged / "checkpoints").iterdir())
    assert kept == [4, 7, 10, 11], "the stages' ends beside the last two"
    assert json.loads((staged / STEP.format(4) / "manifest.json").read_text())["stages"] == {"align": 4, "reconstruct": 7, "margins": 11}
    said = (staged / "log.txt").read_text()
    assert [f"stage {name}: to step {end}" in said for name, end in (("align", 4), ("reconstruct", 7), ("margins", 11))] == [True] * 3
    assert "step 5/11  reconstruct  loss" in said


def test_each_stage_has_its_own_start_of_the_gan(staged):
    """disc_start 5: the autoencoder feels it from iteration 3; disc_start 1: from iteration 1 of its stage."""
    assert [line["g_loss"] != 0 for line in metrics(staged)] == [False] * 3 + [True] + [False, True, True] + [False, True, True, True]


def test_the_projection_is_fixed_in_the_last_stage_only(staged):
    projections = [tensors(staged, step)["linear_proj.weight"] for step in (4, 7, 11)]
    assert not torch.equal(*projections[:2]) and torch.equal(*projections[1:])
    slots = tensors(staged, 11, "optimizer")
    assert "exp_avg.linear_proj.weight" not in slots and "exp_avg.linear_proj.weight" in tensors(staged, 7, "optimizer")


def test_optimizers_are_fresh_in_each_stage(staged):
    for step, since in ((4, 4), (7, 3), (11, 4)):
        for group in ("optimizer", "optimizer_disc"):
            counts = {float(value) for name, value in tensors(staged, step, group).items() if name.startswith("step.")}
            assert counts == {float(since)}, (step, group)


def test_a_run_stopped_anywhere_ends_in_the_same_bits(tiny, out, staged):
    """Inside of stages and at their ends."""
    for stop in (2, 4, 5, 7, 9):
        done("train-tokenizer", *tiny.tokenizer(out, "t", *RECIPE, f"train.max_steps={stop}"))
    done("train-tokenizer", *tiny.tokenizer(out, "t", *RECIPE))
    assert contents(out / "t" / STEP.format(STEPS), "*.safetensors") == contents(staged / STEP.format(STEPS), "*.safetensors")
    for end in (4, 7):
        assert contents(out / "t" / STEP.format(end), "*.safetensors") == contents(staged / STEP.format(end), "*.safetensors")


def test_each_stages_result_is_exported(staged, out, capsys):
    out.mkdir()
    for name, step in (("align", 4), ("reconstruct", 7), ("margins", 11)):
        done("export", "--run", str(staged), "--stage", name, "--out", str(out / f"{name}.safetensors"))
        exported = load_file(out / f"{name}.safetensors")
        assert all(torch.equal(value, exported[key]) for key, value in tensors(staged, step).items())
    for words, found in ((["--stage", "algn"], "no stage 'algn'; it has align, reconstruct, margins"),
                         (["--stage", "align", "--step", "4"], "--step")):  # fmt: skip
        assert main(["export", "--run", str(staged), *words, "--out", str(out / "x.pt")]) == 2
        assert found in capsys.readouterr().err


def test_a_run_without_stages_has_none_to_export(tiny, out, capsys):
    assert main(["export", "--run", str(tiny.tokenizer_run), "--stage", "align", "--out", str(out / "x.pt")]) == 2
    assert "no stage 'align'; it has none" in capsys.readouterr().err


def test_a_stage_of_no_steps_is_left_out(tiny, out):
    """As one who has the first stage's weights continues: discriminator and all."""
    words = (*RECIPE, "stages.align.steps=0", f"weight_init={tiny.tokenizer_run}")
    done("train-tokenizer", *tiny.tokenizer(out, "t", *words))
    assert [line["stage"] for line in metrics(out / "t")] == ["reconstruct"] * 3 + ["margins"] * 4
    assert "autoencoder, projection, discriminator" in (out / "t" / "log.txt").read_text()


def test_a_leap_in_a_later_stage_goes_back_into_an_earlier_one(tiny, out, monkeypatch):
    """The nll of a tokenizer is watched: its whole loss leaps with every adaptive weight. What comes after is a run stopped there and continued."""
    monkeypatch.setattr(guard, "LEAST", 2)
    real, leapt = tokenizer.tokenizer_step, []

    def leaping(state, step, micro_batches):
        values = real(state, step, micro_batches)
        if step == 8 and not leapt:
            leapt.append(step)
            values["nll"] = values["nll"] * 100
        return values | {"loss": values["loss"] * (1000 if step == 6 else 1)}

    words = (*RECIPE, "train.ckpt_every=6", "stages.margins.epochs=2")
    with monkeypatch.context() as patched:
        patched.setattr(tokenizer, "tokenizer_step", leaping)
        patched.setattr(guard.Guard, "expect_another_loss", lambda self: None)
        done("train-tokenizer", *tiny.tokenizer(out, "t", *words))
    said = (out / "t" / "log.txt").read_text()
    assert "the nll leapt to" in said and f"back to {out / 't' / STEP.format(7)}" in said
    lines = metrics(out / "t")
    assert [line["step"] for line in lines] == list(range(1, 16)) and lines[-1]["stage"] == "margins"


@pytest.mark.parametrize("words, said", [
    (["stages.algn.epochs=1"], "stages.algn.epochs: no 'algn' in the list; it has align, reconstruct, margins"),
    (["stages.align.epochs=1"], "epochs, steps: one of them is the length of stage align, got both"),
    (["stages.align.vf_weight=-1"], "stages.align.vf_weight: must be 0 or more"),
    (["stages.align.vf_wieght=1"], "Did you mean stages[0].vf_weight?"),
    (["stages.align.name=margins"], "stages: must be of different names"),
    (["stages.align.name=a b"], "stages[0].name: must be one word"),
    (["lightning.trainer.max_epochs=3"], "lightning.trainer.max_epochs: must be null with stages"),
    (["train.max_steps=12"], "train.max_steps: must be at most 11, the steps of all stages, got 12"),
    (["stages.align.steps=0", "stages.reconstruct.steps=0", "stages.margins.epochs=0"], "stages: all are 0 steps long"),
])  # fmt: skip
def test_stages_that_cannot_be_are_one_line(tiny, out, capsys, words, said):
    assert main(["train-tokenizer", *tiny.tokenizer(out, "t", *RECIPE, *words)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not out.exists()


def test_a_changed_stage_is_refused_and_may_be_overridden(tiny, staged, out, capsys):
    words = tiny.tokenizer(staged.parent, "t", *RECIPE, "stages.margins.cos_margin=0.5")
    assert main(["train-tokenizer", *words, "--dry-run"]) == 2
    assert "stages.margins.cos_margin was None, is 0.5" in capsys.readouterr().err
    done("train-tokenizer", *words, "--dry-run", "--override", "stages.margins.cos_margin")


def test_the_published_recipe():
    """Each stage as the config of a run of its own: the comments of the reference's f16d32_vfdinov2_long.yaml."""
    config = load_config(ROOT / "configs" / "tokenizer_f16d32.yaml")
    assert [(stage.name, stage.epochs) for stage in config.stages] == [("align", 100), ("reconstruct", 15), ("margins", 15)]
    runs = [config.at(stage).model for stage in config.stages]
    losses = [run.params.lossconfig.params for run in runs]
    assert [(loss.disc_start, loss.vf_weight, loss.distmat_margin, loss.cos_margin) for loss in losses] == [
        (5001, 0.5, 0.0, 0.0), (1, 0.1, 0.0, 0.0), (1, 0.1, 0.25, 0.5)]  # fmt: skip
    assert [run.params.proj_fix for run in runs] == [False, False, True] and {run.base_learning_rate for run in runs} == {1e-4}
    fifty = load_config(ROOT / "configs" / "tokenizer_f16d32_50ep.yaml")
    loss = fifty.model.params.lossconfig.params
    assert (loss.disc_start, loss.vf_weight, loss.distmat_margin, loss.cos_margin) == (5001, 0.1, 0.25, 0.5)
    assert fifty.lightning.trainer.max_epochs == 50 and not fifty.stages and fifty.global_batch_size == config.global_batch_size == 256
