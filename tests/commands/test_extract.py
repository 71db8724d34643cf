"""extract, whole: what every latent is, and that neither interruption nor batch nor shard changes a byte."""

import json

import pytest
import torch
from tiny import contents, done, files, launched

from vavae_fast import rng
from vavae_fast.cli import main
from vavae_fast.commands import build
from vavae_fast.config import load_config
from vavae_fast.data import open_images, open_latents
from vavae_fast.pixels import to_unit


def words(tiny, out, *more):
    return ["extract", "--config", str(tiny.root / "tokenizer.yaml"), "--checkpoint", str(tiny.tokenizer_run), "--images", str(tiny.images),
            "--out", str(out), "--shard-size", "6", "--batch", "4", *more]  # fmt: skip


def test_a_latent_is_a_posterior_sample_of_its_image_and_of_its_mirror_image(tiny):
    latents, images = open_latents(tiny.latents), open_images(tiny.images, size=16)
    assert len(latents) == 16 and latents.shape == (4, 2, 2) and latents.labels.tolist() == [0] * 8 + [1] * 8
    tokenizer = build.tokenizer(load_config(tiny.root / "tokenizer.yaml"), str(tiny.tokenizer_run))
    pixels, index = images.read(range(16)), torch.arange(16)
    with torch.no_grad():
        for mirrored in (False, True):
            posterior = tokenizer.encode(to_unit(pixels.flip(-1) if mirrored else pixels))
            noise = rng.normal(0, 2 * index + mirrored, like=posterior.mean, stream=rng.Stream.POSTERIOR)
            expected = posterior.mean + (0.5 * posterior.logvar).exp() * noise
            torch.testing.assert_close(latents.read(index, flip=mirrored), expected, rtol=1e-4, atol=1e-5)


def test_statistics_and_manifest(tiny):
    latents = open_latents(tiny.latents)
    std, mean = torch.std_mean(latents.read(range(16)).double(), dim=(0, 2, 3), keepdim=True)
    torch.testing.assert_close(latents.mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(latents.std.double(), std, rtol=1e-5, atol=1e-6)
    facts = json.loads((tiny.latents / "manifest.json").read_text())["facts"]
    tokenizer = build.tokenizer(load_config(tiny.root / "tokenizer.yaml"), str(tiny.tokenizer_run))
    assert facts["classes"] == ["ant", "bee"] and facts["seed"] == 0 and facts["tokenizer"] == build.weights_digest(tokenizer)


def test_interrupted_and_continued_it_is_the_same_bytes(tiny, out, capsys):
    done(*words(tiny, out))
    assert contents(out, "*.safetensors") == contents(tiny.latents, "*.safetensors")
    (out / "latents_rank00_shard001.safetensors").unlink()
    for name in ("latents_stats.pt", "manifest.json"):
        (out / name).unlink()
    (out / "latents_rank00_shard002.safetensors.tmp").write_bytes(b"half")
    done(*words(tiny, out))
    assert contents(out, "*.safetensors") == contents(tiny.latents, "*.safetensors")
    assert (out / "latents_stats.pt").read_bytes() == (tiny.latents / "latents_stats.pt").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    done(*words(tiny, out))
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before, "nothing left to do"


@pytest.mark.slow  # starts six interpreters
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes over gloo; on a GPU machine they would share one over NCCL")
def test_two_processes_write_the_same_bytes_as_one(tiny, out):
    """Shards are shared out whole; then two processes draw samples, to the same pixels as one."""
    launched(2, *words(tiny, out / "latents"))
    assert contents(out / "latents", "*.safetensors") == contents(tiny.latents, "*.safetensors")
    assert (out / "latents" / "latents_stats.pt").read_bytes() == (tiny.latents / "latents_stats.pt").read_bytes()
    drawing = ["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out"]
    launched(2, *drawing, str(out / "two"))
    done(*drawing, str(out / "one"))
    assert files(out / "two") == files(out / "one") == ["manifest.json", "samples.npz", "samples.png"]
    assert (out / "two" / "samples.png").read_bytes() == (out / "one" / "samples.png").read_bytes()


def test_only_statistics(tiny, out):
    done(*words(tiny, out))
    (out / "latents_stats.pt").unlink()
    done("extract", "--config", str(tiny.root / "dit.yaml"), "--out", str(out), "--stats-only")
    assert (out / "latents_stats.pt").read_bytes() == (tiny.latents / "latents_stats.pt").read_bytes()


def test_either_kind_of_config_gives_the_same_latents(tiny, out):
    """A LightningDiT YAML names the tokenizer by vae.ckpt_path; its architecture comes with the run folder, or off the shapes."""
    done("extract", *tiny.dit(), "--images", str(tiny.images), "--out", str(out / "a"), "--shard-size", "6", "--batch", "4")
    assert contents(out / "a", "*.safetensors").keys() == contents(tiny.latents, "*.safetensors").keys()
    a, b = open_latents(out / "a"), open_latents(tiny.latents)
    assert torch.equal(a.read(range(16)), b.read(range(16)))
    done("export", "--run", str(tiny.tokenizer_run), "--out", str(out / "vae.pt"))
    done("extract", *tiny.dit(), f"vae.ckpt_path={out / 'vae.pt'}", "--images", str(tiny.images), "--out", str(out / "b"), "--batch", "4")
    torch.testing.assert_close(open_latents(out / "b").read(range(16)), b.read(range(16)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("more, words_said", [
    (["--seed", "1"], "facts.seed=0"), (["--shard-size", "5"], "shard_size=6"), (["--dtype", "float16"], "dtype="),
])  # fmt: skip
def test_another_extraction_into_the_same_folder_is_refused(tiny, out, capsys, more, words_said):
    done(*words(tiny, out))
    before = contents(out, "*")
    capsys.readouterr()
    assert main(words(tiny, out, *more)) == 2
    said = capsys.readouterr().err
    assert words_said in said and "choose another --out" in said and contents(out, "*") == before


def test_dry_run_predicts_and_writes_nothing(tiny, out, capsys):
    done(*words(tiny, out), "--dry-run")
    said = capsys.readouterr().out
    assert "16 of " in said and "(4, 2, 2)" in said and "0 of 16 are there" in said and not out.exists()


def test_storage_of_half_the_size(tiny, out):
    done(*words(tiny, out, "--dtype", "bfloat16"))
    a, b = open_latents(out), open_latents(tiny.latents)
    torch.testing.assert_close(a.read(range(16)), b.read(range(16)), rtol=2**-8, atol=0)
    assert len(files(out)) == 5
