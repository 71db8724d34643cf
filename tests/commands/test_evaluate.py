"""evaluate: a tokenizer's reconstructions by their definitions; samples against a reference with an Inception of random weights."""

import json

import numpy as np
import pytest
import torch
from tiny import done

from vavae_fast.cli import main
from vavae_fast.commands import build
from vavae_fast.config import load_config
from vavae_fast.data import open_images
from vavae_fast.evaluation import psnr, ssim
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


def test_samples_are_scored_with_the_inception_that_is_given(tmp_path, capsys, monkeypatch):
    """Random features stand for Inception's: a set has precision and recall 1 against itself."""
    from vavae_fast.commands import evaluate as module
    from vavae_fast.evaluation.inception import InceptionFeatures

    class Features(torch.nn.Module):
        sha256 = "0" * 64
        recognised = False

        def forward(self, images):
            pooled = images.double().flatten(1)[:, :32].float()
            return InceptionFeatures(*(pooled for _ in InceptionFeatures._fields))

    monkeypatch.setattr(module, "_inception", lambda path: Features())
    samples = npz(tmp_path / "s.npz", 24)
    done("evaluate", "--samples", samples, "--reference", samples, "--metrics", "precision,recall", "--json", str(tmp_path / "a.json"))
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["precision"] == result["recall"] == 1.0 and "precision" in capsys.readouterr().out


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
