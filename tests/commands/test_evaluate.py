"""evaluate: a tokenizer's reconstructions by their definitions; samples against a reference with an Inception of random weights."""

import json

import numpy as np
import pytest
import torch
from tiny import done

from vavae_fast import artifacts
from vavae_fast.cli import main
from vavae_fast.commands import build
from vavae_fast.commands import evaluate as module
from vavae_fast.config import load_config
from vavae_fast.data import open_images
from vavae_fast.evaluation import psnr, ssim
from vavae_fast.evaluation.inception import InceptionFeatures
from vavae_fast.pixels import to_uint8, to_unit


def test_reconstruction_scores_are_their_definitions(tiny, out, capsys):
    out.mkdir()
    words = ["evaluate", "--reconstruction", "--config", str(tiny.root / "tokenizer.yaml"), "--checkpoint", str(tiny.tokenizer_run),
             "--images", str(tiny.images), "--metrics", "psnr,ssim", "--batch", "5"]  # fmt: skip
    done(*words, "--json", str(out / "a.json"))
    table, result = capsys.readouterr().out, json.loads((out / "a.json").read_text())
    tokenizer = build.tokenizer(load_config(tiny.root / "tokenizer.yaml"), str(tiny.tokenizer_run))
    pixels = open_images(tiny.images, size=16).read(range(16))
    with torch.no_grad():
        decoded = to_uint8(tokenizer.decode(tokenizer.encode(to_unit(pixels)).mode()))
    assert result["psnr"] == pytest.approx(float(psnr(decoded, pixels).double().mean()), rel=1e-3)
    assert result["ssim"] == pytest.approx(float(ssim(decoded, pixels).double().mean()), rel=1e-3, abs=1e-4)
    assert result["protocol"]["count"] == 16 and "psnr" in table and "ssim" in table


def test_either_kind_of_config_scores_the_same_and_names_the_tokenizer(tiny, out):
    out.mkdir()
    common = ["--images", str(tiny.images), "--metrics", "psnr"]
    done("evaluate", "--reconstruction", "--config", str(tiny.root / "tokenizer.yaml"), f"ckpt_path={tiny.tokenizer_run}", *common,
         "--json", str(out / "a.json"))  # fmt: skip
    done("evaluate", "--reconstruction", "--config", str(tiny.root / "dit.yaml"), *common, "--json", str(out / "b.json"),
         f"vae.ckpt_path={tiny.tokenizer_run}")  # fmt: skip
    a, b = (json.loads((out / name).read_text()) for name in ("a.json", "b.json"))
    assert a["psnr"] == b["psnr"] and a["protocol"]["tokenizer"] == b["protocol"]["tokenizer"] == str(tiny.tokenizer_run)


def test_perfect_reconstructions_are_written_too(tiny, out, monkeypatch):
    """PSNR of equal images is infinite, which JSON has no word for."""
    out.mkdir()
    from vavae_fast.models.autoencoder import AutoencoderKL

    class Copy:
        def __init__(self, x):
            self.x = x

        def mode(self):
            return self.x

    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x: Copy(x))
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z: z)
    done("evaluate", "--reconstruction", "--config", str(tiny.root / "tokenizer.yaml"), f"ckpt_path={tiny.tokenizer_run}",
         "--images", str(tiny.images), "--metrics", "psnr,ssim", "--json", str(out / "a.json"))  # fmt: skip
    result = json.loads((out / "a.json").read_text())
    assert result["psnr"] is None and result["ssim"] == pytest.approx(1.0)


def npz(path, count=4, size=16):
    np.savez(path, np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8))
    return str(path)


@pytest.mark.parametrize("metrics, count, words", [
    ("fid", 4, "FID and sFID need 2048 or more"), ("is", 4, "Inception weights: none given"), ("fid,is", 3000, "Inception weights: none given"),
])  # fmt: skip
def test_inputs_are_checked_before_inception_is_looked_for(tmp_path, capsys, metrics, count, words):
    samples = npz(tmp_path / "s.npz", count, 4)
    assert main(["evaluate", "--samples", samples, "--reference", samples, "--metrics", metrics, "--json", str(tmp_path / "new" / "a.json")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "new").exists()


class Pixels(torch.nn.Module):
    """A few pixels stand for Inception's features, and for another network's."""

    sha256, recognised, name = "0" * 64, False, "pixels"

    def forward(self, images):
        pooled = images.double().flatten(1)[:, :32].float()
        return InceptionFeatures(*(pooled for _ in InceptionFeatures._fields))


@pytest.fixture
def inception(monkeypatch):
    monkeypatch.setattr(module, "_inception", lambda path: Pixels())


def test_samples_are_scored_with_the_inception_that_is_given(tmp_path, capsys, inception):
    """A set has precision and recall 1 against itself."""
    samples = npz(tmp_path / "s.npz", 24)
    words = ["evaluate", "--samples", samples, "--reference", samples, "--metrics", "precision,recall,is", "--bootstrap", "4"]
    done(*words, "--json", str(tmp_path / "a.json"))
    result, said = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    assert result["precision"] == result["recall"] == 1.0 and result["precision_standard_error"] == 0.0
    assert "precision            1.0000  ± 0.0000 (95 %)" in said and "made_by" not in result


class NotFinite(Pixels):
    def forward(self, images):
        return InceptionFeatures(*(rows * torch.nan for rows in super().forward(images)))


@pytest.mark.parametrize("network, metrics, images, reference, words", [
    (NotFinite, "fid", None, None, "NaN or infinite"), (NotFinite, "precision", None, None, "NaN or infinite"),
    (Pixels, "is", np.full((9, 4, 4, 3), 7, np.uint8), None, "all 9 images are of one colour"),
    (Pixels, "fid", None, dict(mu=np.zeros(7), sigma=np.eye(7)), "moments of 7"),
    (Pixels, "precision", np.zeros((3, 4, 4, 3), np.uint8), None, "need 4 or more"), (Pixels, "is", np.zeros((9, 4, 4), np.uint8), None, "(9, 4, 4)"),
    (Pixels, "recall", None, dict(arr_0=np.zeros((2, 4, 4, 3), np.uint8)), "reference.npz: 2 images"),
])  # fmt: skip
def test_what_cannot_be_scored_is_one_line(tmp_path, monkeypatch, capsys, network, metrics, images, reference, words):
    monkeypatch.setattr(module, "_inception", lambda path: network())
    samples = npz(tmp_path / "s.npz", 2050, 4)
    if images is not None:
        np.savez(samples, arr_0=images)
    if reference is not None:
        np.savez(tmp_path / "reference.npz", **reference)
    against = samples if reference is None else str(tmp_path / "reference.npz")
    json_file = tmp_path / "a.json"
    assert main(["evaluate", "--samples", samples, "--reference", against, "--metrics", metrics, "--json", str(json_file)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not json_file.exists()


@pytest.mark.parametrize("more, words", [
    (["--tokenizer", "vae"], "--tokenizer"), (["--features", "dinov2"], "--features"), (["--features-weights", "hub"], "--features-weights"),
    (["model.in_chans=4"], "model.in_chans=4"),
])  # fmt: skip
def test_a_flag_without_an_effect_is_refused(tmp_path, capsys, more, words):
    samples = npz(tmp_path / "s.npz", 24)
    assert main(["evaluate", "--samples", samples, "--reference", samples, "--metrics", "is", *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {words}") and said.count("\n") == 1


def test_several_processes_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    samples = npz(tmp_path / "s.npz", 24)
    assert main(["evaluate", "--samples", samples, "--reference", samples, "--metrics", "is"]) == 2
    assert "start evaluate without torchrun" in capsys.readouterr().err


def test_what_made_the_samples_goes_with_the_scores(tiny, out, inception):
    done("sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out), "--num", "6")
    samples = str(out / "samples.npz")
    words = ["evaluate", "--samples", samples, "--reference", samples, "--metrics", "recall", "--json"]
    done(*words, str(out / "a.json"))
    made = json.loads((out / "a.json").read_text())["made_by"]
    assert made["facts"]["sampler"]["num_steps"] == 4 and made["facts"]["labels"] == "random" and made["run"]["batch"] == 4
    assert made["run"]["precision"] in ("fp32", "bf16") and "torch" in made["versions"]
    npz(out / "samples.npz", 24)  # other images under the manifest's name
    done(*words, str(out / "b.json"))
    assert "made_by" not in json.loads((out / "b.json").read_text())


def test_two_results_are_compared_with_what_made_them(tiny, out, inception, capsys):
    for name, scale in (("a", "1"), ("b", "3")):
        done("sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out / name), "--num", "6", f"sample.cfg_scale={scale}")
        done("evaluate", "--samples", str(out / name / "samples.npz"), "--reference", str(out / "a" / "samples.npz"), "--metrics", "precision",
             "--bootstrap", "3", "--json", str(out / f"{name}.json"))  # fmt: skip
    capsys.readouterr()
    done("evaluate", "--compare", str(out / "a.json"), str(out / "b.json"))
    said = capsys.readouterr().out
    assert "made_by.facts.sampler.cfg_scale: 1.0 -> 3.0" in said and "% error of the difference" in said and "not of the same measurement" not in said
    done("evaluate", "--compare", str(out / "a.json"), str(out / "a.json"))
    assert "made alike" in capsys.readouterr().out
    changed = artifacts.read_json(out / "a.json")
    changed["protocol"]["inception_sha256"] = "f" * 64
    artifacts.write_json(out / "c.json", changed)
    done("evaluate", "--compare", str(out / "a.json"), str(out / "c.json"))
    said = capsys.readouterr().out
    assert "! protocol.inception_sha256" in said and "not of the same measurement" in said
    artifacts.write_json(out / "c.json", changed | dict(precision=None, recall=0.5))
    capsys.readouterr()
    done("evaluate", "--compare", str(out / "a.json"), str(out / "c.json"))
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:3]}
    assert rows == {"precision": ["1.0000", "–"], "recall": ["–", "0.5000"]}, "values that are not there, or not finite"
    (out / "d.json").write_text("{}")
    for wrong, words in ((out / "nowhere.json", "no such file"), (out / "d.json", "not the metrics of evaluate")):
        assert main(["evaluate", "--compare", str(out / "a.json"), str(wrong)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_latents_are_decoded_on_the_fly(tiny, out, inception, capsys):
    """The shards of a set of images, decoded, against the decoder's own images."""
    from vavae_fast.commands.scored_images import DecodedLatents
    from vavae_fast.data import open_latents

    latents, tokenizer = open_latents(tiny.latents), build.tokenizer_alone(tiny.tokenizer_run)
    with torch.no_grad():
        expected = to_uint8(tokenizer.decode(latents.read(range(16))))
    decoded = DecodedLatents(str(tiny.latents), 5, str(tiny.tokenizer_run))
    assert len(decoded) == 16 and decoded.size == 16 and [len(batch) for batch in decoded] == [5, 5, 5, 1]
    assert (torch.cat(list(decoded)).int() - expected.int()).abs().max() <= 1
    out.mkdir()
    np.savez(out / "decoded.npz", arr_0=torch.cat(list(decoded)).permute(0, 2, 3, 1).numpy())
    words = ["evaluate", "--samples", str(tiny.latents), "--reference", str(out / "decoded.npz"), "--metrics", "precision,recall"]
    done(*words, "--tokenizer", str(tiny.tokenizer_run), "--json", str(out / "a.json"))
    result = json.loads((out / "a.json").read_text())
    assert result["precision"] == result["recall"] == 1.0 and result["protocol"]["batch"] == 32
    assert result["made_by"]["facts"]["tokenizer"]["sha256"] == build.weights_digest(tokenizer)
    older = str(tiny.tokenizer_run / "checkpoints" / "step_00000002")
    for more, said in (([], "--tokenizer"), (["--tokenizer", str(tiny.dit_run)], "not of a tokenizer"),
                       (["--tokenizer", older], "not the tokenizer that made the latents")):  # fmt: skip
        capsys.readouterr()
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err


def test_a_distance_in_the_space_of_a_model_that_is_named(tmp_path, monkeypatch, capsys):
    """With random weights in its layout; Inception is not asked for."""
    from vavae_fast.models import image_features

    class Means(torch.nn.Module):
        def __init__(self, name, weights):
            super().__init__()
            self.name, self.sha256 = name, "1" * 64

        def forward(self, images):
            return images.float().mean(dim=(2, 3))

    monkeypatch.setattr(image_features, "ImageFeatures", Means)
    samples = npz(tmp_path / "s.npz", 2048)
    (tmp_path / "dino.pth").write_bytes(b"weights")
    words = ["evaluate", "--samples", samples, "--reference", samples, "--metrics", "fd"]
    done(*words, "--features", "dinov2", "--features-weights", str(tmp_path / "dino.pth"), "--json", str(tmp_path / "a.json"))
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["fd"] == pytest.approx(0, abs=1e-6) and result["protocol"]["fd_features"] == "dinov2"
    for more, said in (([], "--features: missing"), (["--features", "dinov2"], "--features-weights")):
        capsys.readouterr()
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["--samples", "nowhere.npz", "--reference", "nowhere.npz"], "nowhere.npz: no such file or folder"),
    (["--reference", "x"], "--samples: missing"), (["--samples", "x", "--reference", "x", "--metrics", "fad"], "--metrics"),
    (["--samples", "x", "--reference", "x", "--config", "x"], "--config: only with --reconstruction"),
    (["--reconstruction", "--images", "x"], "--config: needed"), (["--reconstruction", "--metrics", "fid"], "--metrics"),
    (["--samples", "x", "--reference", "x", "--batch", "0"], "--batch"), (["--samples", "x", "--reference", "x", "--bootstrap", "1"], "--bootstrap"),
])  # fmt: skip
def test_wrong_words(capsys, words, said):
    assert main(["evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_dry_run_says_what_would_be_scored(tiny, capsys):
    done("evaluate", "--reconstruction", "--config", str(tiny.root / "tokenizer.yaml"), "--checkpoint", str(tiny.tokenizer_run),
         "--images", str(tiny.images), "--metrics", "psnr", "--dry-run")  # fmt: skip
    said = capsys.readouterr().out
    assert "psnr of 16 images" in said and "nothing was written" in said
