"""export --pipeline, and runs in Python: the same images as `vavae-fast sample`, bit for bit."""

import json

import numpy as np
import pytest
import torch
from tiny import copy, done, files

from vavae_fast import VAVAEPipeline, artifacts
from vavae_fast.cli import main
from vavae_fast.errors import BadInput

FILES = ["README.md", "config.json", "latents_stats.pt", "lightningdit.safetensors", "manifest.json", "tokenizer.safetensors"]


def loaded(path, **more):
    return VAVAEPipeline.from_pretrained(path, device="cpu", **more)


def sampled(tiny, out, *more):
    """What `vavae-fast sample` draws: images and their labels."""
    done("sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out), "--num", "6", "--seed", "11", *more)
    with np.load(out / "samples.npz", allow_pickle=False) as archive:
        return archive["arr_0"], archive["arr_1"].tolist()


def drawn(pipeline, labels, **more):
    return np.stack([np.asarray(image) for image in pipeline(labels, seed=11, **more).images])


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "pipeline"
    done("export", "--run", str(tiny.dit_run), "--pipeline", "--out", str(out), "--license", "mit")
    return out


@pytest.mark.parametrize("words, given", [
    ((), {}),
    (("sample.cfg_scale=3", "sample.cfg_interval_start=0.3", "sample.cfg_interval_end=0.9"), dict(guidance_scale=3, guidance_interval=(0.3, 0.9))),
    (("sample.num_sampling_steps=6", "sample.timestep_shift=0", "sample.sampling_method=heun"),
     dict(num_inference_steps=6, timestep_shift=0, sampler="heun")),
    (("sample.mode=SDE", "sample.per_proc_batch_size=3"), dict(sampler="sde-euler", batch_size=3)),
])  # fmt: skip
def test_the_images_are_those_of_the_command(tiny, exported, out, words, given):
    images, labels = sampled(tiny, out, *words)
    assert np.array_equal(drawn(loaded(exported), labels, **given), images), "the exported folder"
    assert np.array_equal(drawn(loaded(tiny.dit_run), labels, **given), images), "the run folder"


def test_precision_fused_operators_and_weights_are_the_command_s_too(tiny, exported, out):
    images, labels = sampled(tiny, out / "bf16", "sample.precision=bf16")
    assert np.array_equal(drawn(loaded(exported, dtype=torch.bfloat16), labels), images)
    images, labels = sampled(tiny, out / "fused", "--fused")
    assert np.array_equal(drawn(loaded(exported, fused=True), labels), images)
    images, labels = sampled(tiny, out / "model", "--weights", "model")
    assert np.array_equal(drawn(loaded(tiny.dit_run, weights="model"), labels), images)


def test_what_is_written(tiny, exported):
    assert files(exported) == FILES
    pipeline = loaded(exported)
    assert pipeline.labels == dict(ant=0, bee=1) and pipeline.image_size == 16
    origin = json.loads((exported / "manifest.json").read_text())["origin"]
    assert (origin["run"], origin["step"], origin["weights"], origin["training"]["latents"], origin["training"]["batch"]) == ("dit", 4, "ema", 16, 4)
    card = (exported / "README.md").read_text()
    assert "license: mit" in card and "| steps | 4 |" in card and "| epochs | 1.0 |" in card and "| learning rate | 0.001 |" in card
    assert str(tiny.root) not in card + (exported / "manifest.json").read_text() + (exported / "config.json").read_text(), "no path of this machine"


def test_a_step_a_preset_and_metrics(tiny, out):
    (out / "m").mkdir(parents=True)
    (out / "m" / "fid.json").write_text('{"fid": 3.5, "protocol": {"num_samples": 50000}}')
    done("export", "--run", str(tiny.dit_run), "--pipeline", "--step", "2", "--weights", "model", "--preset", "paper-64ep",
         "--metrics", str(out / "m" / "fid.json"), "--out", str(out / "pipeline"))  # fmt: skip
    pipeline = loaded(out / "pipeline")
    assert pipeline.config.sample.cfg_scale == 10 and pipeline._parts.origin["step"] == 2 and pipeline._parts.origin["weights"] == "model"
    assert "| fid | 3.5000 |" in (out / "pipeline" / "README.md").read_text()
    step = loaded(tiny.dit_run / "checkpoints" / "step_00000002", weights="model")
    assert all(torch.equal(a, b) for a, b in zip(step.lightningdit.state_dict().values(), pipeline.lightningdit.state_dict().values()))
    assert step._parts.origin["run"] == "dit"


def moved_run(tiny, target, data_path, tokenizer):
    """The run with another machine's paths in its checkpoints."""
    run = copy(tiny.dit_run, target)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        content = artifacts.read_json(manifest)
        content["config"]["data"]["data_path"], content["config"]["vae"]["ckpt_path"] = data_path, tokenizer
        artifacts.write_json(manifest, content)
    return run


def test_tokenizer_and_statistics_may_lie_elsewhere(tiny, exported, out, capsys):
    run = moved_run(tiny, out / "dit", "/elsewhere/latents", None)
    with pytest.raises(BadInput, match=r"tokenizer: missing for .*\(its config does not name one\); give tokenizer=PATH"):
        loaded(run)
    with pytest.raises(BadInput, match=r"latents_stats: missing for .*names /elsewhere/latents/latents_stats.pt, which is not here\)"):
        loaded(run, tokenizer=tiny.tokenizer_run)
    assert main(["export", "--run", str(run), "--pipeline", "--out", str(out / "pipeline")]) == 2
    assert "tokenizer: missing" in capsys.readouterr().err and not (out / "pipeline").exists()
    done("export", "--run", str(run), "--pipeline", "--out", str(out / "pipeline"), "--tokenizer", str(tiny.tokenizer_run),
         "--latents-stats", str(tiny.latents / "latents_stats.pt"))  # fmt: skip
    pipeline = loaded(out / "pipeline")
    assert np.array_equal(drawn(pipeline, [0, 1, 1]), drawn(loaded(exported), [0, 1, 1])) and pipeline.labels == {}


def test_a_tokenizer_that_did_not_make_the_latents(tiny, out):
    early = tiny.tokenizer_run / "checkpoints" / "step_00000002"
    with pytest.raises(BadInput, match="step_00000002: not the tokenizer that made the latents of this run"):
        loaded(tiny.dit_run, tokenizer=early)
    with pytest.raises(BadInput, match="a checkpoint of tokenizer; give a LightningDiT's run, its tokenizer by tokenizer="):
        loaded(tiny.tokenizer_run)
    with pytest.raises(BadInput, match="a saved pipeline has its own tokenizer, weights; leave that out"):
        done("export", "--run", str(tiny.dit_run), "--pipeline", "--out", str(out))
        loaded(out, tokenizer=early, weights="ema")


def test_a_damaged_checkpoint_is_refused(tiny, out):
    run = copy(tiny.dit_run, out / "dit")
    for step in ("step_00000002", "step_00000004"):
        (run / "checkpoints" / step / "ema.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="holds no complete checkpoint"):
        loaded(run)


def test_the_guide_of_a_run_is_left_out_aloud(tiny, out, capsys):
    run = copy(tiny.dit_run, out / "dit")
    manifest = run / "checkpoints" / "step_00000004" / "manifest.json"
    content = artifacts.read_json(manifest)
    content["config"]["sample"]["guide"] = "weak.pt"
    artifacts.write_json(manifest, content)
    assert loaded(run).config.sample.guide is None and "sample.guide is left out" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["--license", "mit"], "--license: must be given with --pipeline"), (["--tokenizer", "x"], "--tokenizer: must be given with --pipeline"),
    (["--latents-stats", "x"], "--latents-stats: must be given with --pipeline"),
    (["--pipeline", "--license", "my own"], "license: must be a name of the hub's list"),
    (["--pipeline", "--metrics", "none.json"], "none.json: no such file"), (["--pipeline", "--step", "3"], "no checkpoint of step 3"),
    (["--pipeline", "--tokenizer", "none"], "none: no such file or folder"), (["--pipeline", "--preset", "best"], "--preset"),
])  # fmt: skip
def test_what_cannot_be_exported(tiny, out, capsys, words, said):
    assert main(["export", "--run", str(tiny.dit_run), "--out", str(out / "a.pt"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not out.exists()


def test_a_folder_in_use_is_not_written_over(tiny, capsys):
    assert main(["export", "--run", str(tiny.dit_run), "--pipeline", "--out", str(tiny.dit_run)]) == 2
    assert "holds other files; choose an empty folder" in capsys.readouterr().err


def test_dry_run_writes_nothing(tiny, out, capsys):
    done("export", "--run", str(tiny.dit_run), "--pipeline", "--out", str(out), "--dry-run")
    assert "VAVAEPipeline(custom, 16 x 16, 2 classes, cpu, float32)" in capsys.readouterr().out and not out.exists()
