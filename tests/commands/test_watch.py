"""train, watched: held-out loss, sample grids and the growing report appear, and what is trained stays the same to the bit."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import contents, copy, done, files, launched, metrics

from vavae_fast import artifacts
from vavae_fast.cli import main
from vavae_fast.commands import build, watch
from vavae_fast.commands.networks import sampler_settings
from vavae_fast.commands.online_fid import share_of
from vavae_fast.config import load_config
from vavae_fast.data import open_latents
from vavae_fast.distributed import World
from vavae_fast.evaluation import feature_statistics, frechet_distance
from vavae_fast.evaluation.reference import save_reference
from vavae_fast.flow.generate import LatentScale, generate_images, generate_latents
from vavae_fast.training.previews import preview_labels

STEP = "checkpoints/step_{:08d}"
WATCHED = ("log.valid_every=2", "log.valid_num=6", "log.samples_every=3", "log.samples_num=5", "log.layers_every=2")


@pytest.fixture(scope="module")
def held_out(tiny, tmp_path_factory):
    """A folder of latents beside the one trained on, by the same tokenizer."""
    return copy(tiny.latents, tmp_path_factory.mktemp("held-out") / "latents")


@pytest.fixture(scope="module")
def watched(tiny, held_out, tmp_path_factory):
    """The run of `tiny.dit_run`, watched."""
    out = tmp_path_factory.mktemp("watched")
    done("train", *tiny.dit(out, "dit", f"data.valid_path={held_out}", *WATCHED))
    return out / "dit"


def weights(run, step=4):
    return contents(run / STEP.format(step), "*.safetensors")


def held_out_values(run):
    return [(m["step"], {k: v for k, v in m.items() if k.startswith("valid")}) for m in metrics(run) if "valid_mse" in m]


def test_watching_changes_no_bit_of_what_is_trained(tiny, watched):
    assert weights(watched) == weights(tiny.dit_run)
    for a, b in zip(metrics(watched), metrics(tiny.dit_run), strict=True):
        assert all(a[key] == b[key] for key in ("step", "loss", "mse", "grad_norm", "lr"))


def test_held_out_loss_is_logged_of_both_weights_and_by_t(watched):
    values = held_out_values(watched)
    assert [step for step, _ in values] == [2, 4]
    for _, found in values:
        bins = {key: value for key, value in found.items() if key.startswith("valid_mse_t")}
        assert bins and all(re.fullmatch(r"valid_mse_t0\.\d", key) for key in bins)
        assert min(bins.values()) <= found["valid_mse"] <= max(bins.values())
        assert 0 < found["valid_mse_model"] != found["valid_mse"]


def test_layers_are_looked_at(watched):
    """The largest of all layers among the metrics, every layer in a file of its own."""
    lines = [m for m in metrics(watched) if "attention_logit" in m]
    layers = [json.loads(line) for line in (watched / "layers.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == [found["step"] for found in layers] == [2, 4]
    for line, found in zip(lines, layers):
        assert line["attention_logit"] == max(found["attention_logit"]) == found["attention_logit"][int(line["attention_logit_layer"])] > 0
        assert line["residual_rms"] == max(found["residual_rms"]) > 0


def test_a_resumed_run_measures_the_same(tiny, held_out, watched, out):
    done("train", *tiny.dit(out, "dit", f"data.valid_path={held_out}", *WATCHED, "train.max_steps=2"))
    done("train", *tiny.dit(out, "dit", f"data.valid_path={held_out}", *WATCHED))
    assert held_out_values(out / "dit") == held_out_values(watched)
    assert contents(out / "dit" / "samples", "*4.png") == contents(watched / "samples", "*4.png")


def test_grids_of_samples_are_drawn_by_the_tokenizer(watched):
    grids = sorted((watched / "samples").iterdir())
    assert [path.name for path in grids] == ["step_00000003.png", "step_00000004.png"]
    assert Image.open(grids[0]).size == (2 * 18 + 2, 3 * 18 + 2)
    sheet = np.asarray(Image.open(grids[0]))
    assert sheet[2:18, 2:18].std() > 0 and (sheet[-18:-2, -18:-2] == 255).all(), "five images in six places"


def test_without_a_tokenizer_latents_are_shown_and_that_is_said_once(tiny, out, capsys):
    done("train", *tiny.dit(out, "dit", "vae.ckpt_path=null", "log.samples_every=2", "log.samples_num=4"))
    assert capsys.readouterr().out.count("samples are shown as their first three latent channels") == 1
    sheet = np.asarray(Image.open(out / "dit" / "samples" / "step_00000004.png"))
    assert sheet.shape == (2 * 18 + 2, 2 * 18 + 2, 3), "latents of 2 x 2, as large as the images"
    assert len(np.unique(sheet[2:10, 2:10].reshape(-1, 3), axis=0)) == 1, "one latent is a square of one colour"


def test_the_report_of_a_watched_run_has_curves_and_grids(watched):
    page = (watched / "report.html").read_text()
    for text in ("held-out loss: averaged weights", "held-out loss by t", "step_00000004", "valid_mse, last logged", "valid_every: 2"):
        assert text in page
    assert page.count("data:image/png;base64,") == 2


def test_the_report_grows_with_every_save(tiny, out, monkeypatch):
    from vavae_fast.commands import report

    seen, write = [], report.write
    monkeypatch.setattr(report, "write", lambda run: (seen.append(len(run.steps)), write(run))[1])
    done("train", *tiny.dit(out))
    assert seen == [2, 4]


def test_a_report_that_cannot_be_written_stops_nothing(tiny, out, capsys, monkeypatch):
    from vavae_fast.commands import report

    def refuse(run):
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(report, "write", refuse)
    done("train", *tiny.dit(out))
    assert weights(out / "dit") == weights(tiny.dit_run) and "report.html was not written: " in capsys.readouterr().out


class Colours(torch.nn.Module):
    """Stands for Inception: 4 numbers an image."""

    def forward(self, images):
        return SimpleNamespace(pool=torch.cat([images.float().mean((2, 3)), images.float().std((1, 2, 3))[:, None]], 1) / 255)


@pytest.fixture
def judged(tiny, tmp_path, monkeypatch):
    """The settings of a run that watches its FID, with a stand-in for Inception."""
    monkeypatch.setattr(watch, "load_inception", lambda path: Colours())
    (tmp_path / "inception.pth").write_bytes(b"")
    save_reference(tmp_path / "reference.npz", np.full(4, 0.5), 0.01 * np.eye(4))
    return (f"data.fid_reference_file={tmp_path / 'reference.npz'}", f"log.fid_inception={tmp_path / 'inception.pth'}",
            "log.fid_every=2", "train.global_batch_size=16", "sample.num_sampling_steps=2", "sample.cfg_scale=1")  # fmt: skip


@pytest.mark.slow  # draws and decodes 2,048 images twice
def test_a_small_fid_is_that_of_the_images_of_its_weights(tiny, judged, out):
    done("train", *tiny.dit(out, "dit", *judged, "train.max_steps=2"))
    done("train", *tiny.dit(out, "plain", "train.global_batch_size=16", "train.max_steps=2"))
    assert weights(out / "dit", 2) == weights(out / "plain", 2), "looking trains nothing"
    found = [m["fid"] for m in metrics(out / "dit") if "fid" in m]
    config = load_config(tiny.root / "dit.yaml", tuple(tiny.dit(out, "dit", *judged)[2:]))
    model, _ = build.trained_lightningdit(config, str(out / "dit"))
    latents = open_latents(config.data.data_path)
    scale = LatentScale(latents.mean, latents.std, config.data.latent_multiplier) if config.data.latent_norm else LatentScale()
    labels = preview_labels(2048, config.data.num_classes)
    drawn = generate_latents(model, labels, latents.shape, sampler_settings(config.sample), seed=config.train.global_seed,
                             null_label=config.data.num_classes, transport=build.transport(config.transport, False))  # fmt: skip
    images = torch.cat([x for _, x in generate_images(drawn, build.tokenizer(config).decode, scale)])
    mu, sigma = feature_statistics(Colours()(images).pool.numpy())
    assert found == pytest.approx([frechet_distance(mu, sigma, np.full(4, 0.5), 0.01 * np.eye(4))], rel=1e-5)


def test_processes_share_the_samples_of_a_fid():
    shares = [list(share_of(10, World(rank, 3, torch.device("cpu")))) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3] and sorted(sum(shares, [])) == list(range(9))


@pytest.mark.parametrize("less, words", [
    ("data.fid_reference_file", "data.fid_reference_file: .*an .npz with mu and sigma"),
    ("log.fid_inception", "log.fid_inception: .*FID Inception"),
    ("vae.ckpt_path", "log.fid_every: FID is of images; set vae.ckpt_path"),
])  # fmt: skip
def test_what_a_fid_needs_is_said_before_anything_is_written(tiny, judged, out, capsys, less, words):
    settings = [s for s in judged if not s.startswith(less)] + ["vae.ckpt_path=null"] * (less == "vae.ckpt_path")
    assert main(["train", *tiny.dit(out, "dit", *settings)]) == 2
    assert re.search(words, capsys.readouterr().err) and not out.exists()


def test_the_dry_run_says_what_will_be_watched(tiny, held_out, out, capsys):
    done("train", *tiny.dit(out, "dit", f"data.valid_path={held_out}", *WATCHED, "--dry-run"))
    assert "watched    loss on 6 of 16 held-out latents every 2 steps; 5 samples every 3 steps, decoded" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize("more, words", [
    (("data.valid_path=nowhere",), ["data.valid_path: nowhere does not exist"]),
    (("data.valid_path={latents}",), ["data.valid_path:", "nothing is held out"]),
    (("data.valid_path={held_out}", "vae.ckpt_path=nowhere", "log.samples_every=1"), ["vae.ckpt_path: nowhere does not exist"]),
    (("log.samples_every=1", "sample.cfg_scale=2", "model.class_dropout_prob=0"), ["sample.cfg_scale", "null class"]),
    (("log.samples_every=1", "sample.sampling_method=eulr"), ["sample.sampling_method", "euler"]),
    (("log.to=[wandb]",), ["log.to=[wandb]: wandb is not installed; pip install wandb"]),
])  # fmt: skip
def test_what_cannot_be_watched_is_one_line_before_anything_is_written(tiny, held_out, out, capsys, monkeypatch, more, words):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    assert main(["train", *tiny.dit(out, "dit", *(word.format(latents=tiny.latents, held_out=held_out) for word in more))]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said
    assert not out.exists()


def test_latents_of_another_tokenizer_are_refused(tiny, held_out, out, capsys, tmp_path):
    folder = copy(held_out, tmp_path / "other")
    manifest = artifacts.read_json(folder / "manifest.json")
    manifest["facts"]["tokenizer"] = "0" * 64
    artifacts.write_json(folder / "manifest.json", manifest)
    assert main(["train", *tiny.dit(out, "dit", f"data.valid_path={folder}")]) == 2
    assert f"{folder}: made by another tokenizer than {tiny.latents}; extract both with one" in capsys.readouterr().err


def test_how_a_run_is_watched_may_change(tiny, held_out, out):
    done("train", *tiny.dit(out, "dit", "train.max_steps=2"))
    done("train", *tiny.dit(out, "dit", f"data.valid_path={held_out}", *WATCHED))
    assert weights(out / "dit") == weights(tiny.dit_run)


@pytest.mark.slow  # starts three interpreters
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes over gloo; on a GPU machine they would share one over NCCL")
def test_two_processes_with_sharded_weights_measure_draw_and_train_as_one(tiny, held_out, watched, out):
    launched(2, "train", *tiny.dit(out, "dit", f"data.valid_path={held_out}", *WATCHED, "train.shard=full"))
    for ours, theirs in zip(metrics(out / "dit"), metrics(watched), strict=True):
        keys = [key for key in theirs if key.startswith("valid") or key in ("loss", "mse", "grad_norm", "attention_logit")]
        assert [ours[key] for key in keys] == pytest.approx([theirs[key] for key in keys], rel=1e-4), theirs["step"]
    ours, theirs = (np.asarray(Image.open(run / "samples" / "step_00000004.png")).astype(int) for run in (out / "dit", watched))
    assert np.abs(ours - theirs).max() <= 1
    assert files(out / "dit" / "samples") == files(watched / "samples")
