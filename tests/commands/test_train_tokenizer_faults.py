"""What breaks while a tokenizer trains, where the DiT engine's tests do not look: both networks, the ends of stages, images that are no numbers."""

import json
import os
import shutil
import signal

import pytest
import torch
from tiny import contents, done

from vavae_fast.cli import main
from vavae_fast.training import saver, tokenizer

STEP = "checkpoints/step_{:08d}"
RECIPE = ("stages=[{name: a, steps: 4}, {name: b, steps: 4, disc_start: 1, proj_fix: true}]", "train.max_steps=null", "train.ckpt_every=3")


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    done("train-tokenizer", *tiny.tokenizer(out, "t", *RECIPE))
    return contents(out / "t" / STEP.format(8), "*.safetensors")


def words(tiny, out, *more):
    return ["train-tokenizer", *tiny.tokenizer(out, "t", *RECIPE, *more)]


def goes_on(tiny, out, undisturbed, *more):
    done(*words(tiny, out, *more))
    assert contents(out / "t" / STEP.format(8), "*.safetensors") == undisturbed


def at_step(monkeypatch, step, act):
    """Call act(state) before a step is taken."""
    real = tokenizer.tokenizer_step

    def acting(state, number, micro_batches):
        if number == step:
            act(state)
        return real(state, number, micro_batches)

    monkeypatch.setattr(tokenizer, "tokenizer_step", acting)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_signal_inside_of_a_stage_and_at_its_end(tiny, out, undisturbed, capsys, monkeypatch, step):
    with monkeypatch.context() as patched:
        at_step(patched, step, lambda state: os.kill(os.getpid(), signal.SIGTERM))
        assert main(words(tiny, out)) == 0
    assert f"SIGTERM: saved step {step + 1} in" in capsys.readouterr().out
    goes_on(tiny, out, undisturbed)


def test_a_stages_end_that_cannot_be_saved_stops_the_run(tiny, out, undisturbed, capsys, monkeypatch):
    """Another checkpoint that fails is said and passed over; a stage's result comes once. The steps since the last one are made again."""
    real = saver.write_tensors

    def full(path, *rest):
        if path.parent.name == "step_00000004.tmp":
            raise OSError(28, "No space left on device", str(path))
        real(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(saver, "write_tensors", full)
        assert main(words(tiny, out)) == 2
    said = capsys.readouterr()
    assert "the checkpoint of step 4 was not saved: " in said.out and "mend that, and start the same command again" in said.err
    assert [path.name for path in (out / "t" / "checkpoints").iterdir()] == ["step_00000003"]
    goes_on(tiny, out, undisturbed)


def test_images_that_are_no_numbers_stop_the_run_and_name_the_samples(tiny, out, undisturbed, capsys, monkeypatch):
    """One image of each batch from step 5 on: both networks stay as they are, and the third such step ends the run."""
    real = tokenizer.TokenizerState.images

    def spoilt(state, batch):
        bad = (batch.index >= 16) & (batch.index % 4 == 2)
        return torch.where(bad[:, None, None, None], float("nan"), real(state, batch))

    with monkeypatch.context() as patched:
        patched.setattr(tokenizer.TokenizerState, "images", spoilt)
        assert main(words(tiny, out, "train.max_skipped=3")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "not finite in the last 3 steps up to step 7 (samples 16 to 27 of the run's order)" in said
    norms = json.loads((out / "t" / "gradients.json").read_text())["gradient_norms"]
    assert norms["encoder.conv_in.weight"] == "nan" and any(name.endswith("main.5.bias") for name in norms)
    before, after = (contents(out / "t" / STEP.format(step), "*.safetensors") for step in (4, 6))
    assert before["model.safetensors"] == after["model.safetensors"] and before["discriminator.safetensors"] == after["discriminator.safetensors"]
    shutil.rmtree(out / "t" / STEP.format(6))  # or the mended run would leave out what it skipped
    goes_on(tiny, out, undisturbed)


def test_a_read_only_place_is_one_line(tiny, tmp_path, capsys, monkeypatch):
    place = tmp_path / "closed"
    place.write_text("a file where a folder should be")
    assert main(words(tiny, place)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(place) in said
