"""What breaks while a run trains: one line that names it, nothing lost that was saved, and the same command goes on once it is mended."""

import json
import os
import struct

import pytest
import torch
from tiny import contents, copy, done

from vavae_fast.cli import main
from vavae_fast.training import dit

STEP = "checkpoints/step_{:08d}"


@pytest.fixture
def latents(tiny, tmp_path):
    """A copy that may be spoilt."""
    return copy(tiny.latents, tmp_path / "latents")


def spoil_at(monkeypatch, step, spoil):
    """Call `spoil` when training comes to `step`."""
    real = dit.dit_step

    def spoiling(state, number, micro_batches):
        if number == step:
            spoil()
        return real(state, number, micro_batches)

    monkeypatch.setattr(dit, "dit_step", spoiling)


def goes_on(tiny, out, latents, steps=60):
    """The mended run ends in the bits of one that was never disturbed."""
    done("train", *tiny.dit(out, "dit", f"data.data_path={latents}", f"train.max_steps={steps}"))
    done("train", *tiny.dit(out, "undisturbed", f"data.data_path={latents}", f"train.max_steps={steps}"))
    assert contents(out / "dit" / STEP.format(steps), "*.safetensors") == contents(out / "undisturbed" / STEP.format(steps), "*.safetensors")


def test_a_shard_cut_short_during_a_run(tiny, out, latents, capsys, monkeypatch):
    shard = next(latents.glob("*.safetensors"))
    whole, times = shard.read_bytes(), (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    with monkeypatch.context() as patched:
        spoil_at(patched, 10, lambda: os.truncate(shard, 5000))
        assert main(["train", *tiny.dit(out, "dit", f"data.data_path={latents}", "train.max_steps=60")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and shard.name in said and "changed while it was open" in said
    assert (out / "dit" / STEP.format(10) / "manifest.json").is_file()
    shard.write_bytes(whole)
    os.utime(shard, ns=times)
    goes_on(tiny, out, latents)


def test_a_nan_planted_in_one_latent_names_its_shard_and_row(tiny, out, latents, capsys):
    shard = next(latents.glob("*.safetensors"))
    whole = shard.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    row_bytes = torch.Size(header["latents"]["shape"][1:]).numel() * 4
    spoilt = bytearray(whole)
    for key in ("latents", "latents_flip"):  # whichever of the two is drawn
        place = 8 + length + header[key]["data_offsets"][0] + 3 * row_bytes
        spoilt[place : place + 4] = struct.pack("<f", float("nan"))
    shard.write_bytes(spoilt)
    assert main(["train", *tiny.dit(out, "dit", f"data.data_path={latents}", "train.max_steps=60")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{shard.name}: NaN or infinity in row 3; extract the shard again" in said
    shard.write_bytes(whole)
    goes_on(tiny, out, latents)


def test_a_run_whose_gradients_die_is_stopped_and_one_that_may_goes_on(tiny, out, capsys, monkeypatch):
    """From step 10 on they are zero, as behind a unit that is off for good; the loss stays."""
    with monkeypatch.context() as patched:
        real = dit.dit_step

        def dying(state, number, micro_batches):
            for p in state.model.parameters() if number == 10 else ():
                if p.requires_grad:
                    p.register_hook(torch.zeros_like)
            return real(state, number, micro_batches)

        patched.setattr(dit, "dit_step", dying)
        assert main(["train", *tiny.dit(out, "dit", "train.max_steps=60", "train.max_faint=20")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the 20 steps up to step 30" in said and "no longer learns" in said
    done("train", *tiny.dit(out, "dit", "train.max_steps=60", "train.max_faint=0"))
