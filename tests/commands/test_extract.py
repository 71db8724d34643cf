"""extract, whole: what every latent is, and that neither interruption nor batch nor shard changes a byte."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny import contents, copy, done, files, launched, metrics

from vavae_fast import rng
from vavae_fast.cli import main
from vavae_fast.commands import build, extract
from vavae_fast.commands.run_lock import locked
from vavae_fast.config import load_config
from vavae_fast.data import open_images, open_latents
from vavae_fast.data.images import Images
from vavae_fast.models.autoencoder import DiagonalGaussian
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


def posteriors(tiny, mirrored=False):
    """Of all images, by the tokenizer that extracted them."""
    tokenizer = build.tokenizer(load_config(tiny.root / "tokenizer.yaml"), str(tiny.tokenizer_run))
    pixels = open_images(tiny.images, size=16).read(range(16))
    with torch.no_grad():
        return tokenizer.encode(to_unit(pixels.flip(-1) if mirrored else pixels))


def test_means_alone(tiny, out):
    done(*words(tiny, out, "--posterior", "mean"))
    latents = open_latents(out)
    for mirrored in (False, True):
        torch.testing.assert_close(latents.read(range(16), flip=mirrored), posteriors(tiny, mirrored).mean, rtol=1e-4, atol=1e-5)
    assert latents.manifest["facts"]["posterior"] == "mean"


def test_means_with_standard_deviations(tiny, out):
    """Samples drawn from them are those that `--posterior sample` stores; the statistics are those of samples."""
    done(*words(tiny, out, "--posterior", "mean+std"))
    shards = [load_file(path) for path in sorted(out.glob("*.safetensors"))]
    found = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
    samples, index = open_latents(tiny.latents), torch.arange(16)
    for mirrored, key in enumerate(("latents", "latents_flip")):
        posterior = posteriors(tiny, bool(mirrored))
        torch.testing.assert_close(found[f"{key}_std"], posterior.std, rtol=1e-4, atol=1e-5)
        noise = rng.normal(0, 2 * index + mirrored, like=found[key], stream=rng.Stream.POSTERIOR)
        torch.testing.assert_close(found[key] + found[f"{key}_std"] * noise, samples.read(index, flip=bool(mirrored)), rtol=1e-5, atol=1e-6)
    statistics = torch.load(out / "latents_stats.pt", weights_only=True)
    mean, std = found["latents"].double(), found["latents_std"].double()
    expected = (mean.var(dim=(0, 2, 3)) + std.square().mean(dim=(0, 2, 3))).sqrt()
    torch.testing.assert_close(statistics["std"].double().flatten(), expected, rtol=1e-6, atol=0)


@pytest.fixture
def means(tiny, out):
    done(*words(tiny, out / "means", "--posterior", "mean+std"))
    return out / "means"


def trained(tiny, out, name, data, *more):
    """The weights of a run on `data`."""
    done("train", *tiny.dit(out, name, f"data.data_path={data}", *more))
    return (sorted((out / name / "checkpoints").iterdir())[-1] / "model.safetensors").read_bytes()


def test_training_on_means_draws_samples_anew_and_resumes_to_the_bit(tiny, out, means):
    straight = trained(tiny, out, "straight", means)
    trained(tiny, out, "resumed", means, "train.max_steps=2")
    assert trained(tiny, out, "resumed", means) == straight != trained(tiny, out, "samples", tiny.latents)
    assert trained(tiny, out, "resident", means, "data.latents_in=ram") == straight


def test_held_out_means_are_scored_as_the_samples_that_would_have_been_stored(tiny, out, means):
    losses = []
    for name, data, valid in (("a", tiny.latents, means), ("b", copy(tiny.latents, out / "copy"), tiny.latents)):
        trained(tiny, out, name, data, f"data.valid_path={valid}", "log.valid_every=2")
        losses.append([row["valid_mse"] for row in metrics(out / name) if "valid_mse" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2


def test_an_encoder_in_bf16(tiny, out):
    """Near the latents of fp32, and not the same."""
    done(*words(tiny, out, "--precision", "bf16", "--posterior", "mean"))
    found, expected = open_latents(out), posteriors(tiny).mean
    error = (found.read(range(16)) - expected).square().mean().sqrt() / expected.std()
    assert 1e-5 < error < 0.05 and found.manifest["facts"]["precision"] == "bf16"


def test_fused_operators_change_no_latent_beyond_rounding(tiny, out):
    done(*words(tiny, out, "--fused"))
    torch.testing.assert_close(open_latents(out).read(range(16)), open_latents(tiny.latents).read(range(16)), rtol=1e-4, atol=1e-4)


def test_a_nan_of_the_encoder_names_the_image(tiny, out, capsys, monkeypatch):
    real = DiagonalGaussian.__init__

    def poisoned(posterior, moments):
        real(posterior, moments)
        if len(moments) == 2:  # the second batch of a shard of six, by four
            posterior.mean[1] = float("nan")

    monkeypatch.setattr(DiagonalGaussian, "__init__", poisoned)
    assert main(words(tiny, out)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "latents of image 5, ant/5.png, has a NaN" in said and files(out) == []


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
    (["--posterior", "mean"], "facts.posterior=sample, now mean"), (["--precision", "bf16"], "facts.precision=fp32, now bf16"),
    (["data.image_size=32"], "facts.image_size=16, now 32"), (["another tokenizer"], "facts.tokenizer="), (["fewer images"], "count=16, now 15"),
])  # fmt: skip
def test_another_extraction_into_the_same_folder_is_refused(tiny, out, tmp_path, capsys, more, words_said):
    done(*words(tiny, out))
    before = contents(out, "*")
    if more == ["another tokenizer"]:
        torch.save({"state_dict": build.autoencoder(load_config(tiny.root / "tokenizer.yaml")).state_dict()}, tmp_path / "vae.pt")
        more = ["--checkpoint", str(tmp_path / "vae.pt")]
    if more == ["fewer images"]:
        (copy(tiny.images, tmp_path / "images") / "ant" / "3.png").unlink()
        more = ["--images", str(tmp_path / "images")]
    capsys.readouterr()
    assert main(words(tiny, out, *more)) == 2
    said = capsys.readouterr().err
    assert words_said in said and "choose another --out" in said and contents(out, "*") == before


def test_dry_run_predicts_and_writes_nothing(tiny, out, capsys):
    done(*words(tiny, out), "--dry-run", "--world-size", "2")
    said = capsys.readouterr().out
    assert "16 of " in said and "(4, 2, 2)" in said and "0 of 16 are there" in said and not out.exists()
    assert "3 of at most 6 rows" in said and "16 images, 3 shards; by 2 processes at most 10, 2 each" in said
    size = 16 * (2 * 4 * 2 * 2 * 4 + 8)
    assert f"{size / 1000:.1f} kB in {out}, {size / 1000:.1f} kB of them to be written" in said
    assert main([*words(tiny, out), "--world-size", "2"]) == 2 and "--world-size: must be above 0, with --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_it_cleanly(tiny, out, capsys, monkeypatch, number):
    """After the batch: what is whole stays, nothing else does, and the same command goes on to the same bytes."""
    real, calls = Images.read, []

    def read(images, indices, *more):
        calls.append(len(indices))
        if len(calls) == 4:  # the second shard's last batch; the encoder is one or two behind
            os.kill(os.getpid(), number)
        return real(images, indices, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Images, "read", read)
        done(*words(tiny, out))
    there = files(out)
    said = f"{signal.Signals(number).name}: {len(there)} of 3 shards are in {out}; the same command continues"
    assert said in capsys.readouterr().out and there in ([], ["latents_rank00_shard000.safetensors"])
    done(*words(tiny, out))
    assert contents(out, "*.safetensors") == contents(tiny.latents, "*.safetensors")


def test_two_extractions_into_one_folder(tiny, out, capsys):
    with locked(out):
        assert main(words(tiny, out)) == 2
    assert f"{out}: in use by process {os.getpid()} on " in (said := capsys.readouterr().err) and "wait for it, or choose another --out" in said


def test_an_image_size_that_the_tokenizer_cannot_halve(tiny, out, capsys):
    """The config's architecture allows it, that of the given tokenizer does not."""
    smaller = str(tiny.root / "tokenizer.yaml"), "model.params.ddconfig.ch_mult=[1,1]", "data.image_size=18"
    argv = ["extract", "--config", *smaller, "--checkpoint", str(tiny.tokenizer_run), "--images", str(tiny.images), "--out", str(out)]
    assert main(argv) == 2 and "data.image_size: must be a multiple of 8, by which the tokenizer downsamples, got 18" in capsys.readouterr().err


def test_an_image_without_a_class_among_others_is_named(tiny, out, tmp_path, capsys):
    """And is not of class 0, as all are where there are no classes."""
    images = copy(tiny.images, tmp_path / "images")
    (images / "bee" / "0.png").rename(images / "stray.png")
    assert main(words(tiny, out, "--images", str(images))) == 2
    assert f"error: {images}/stray.png: has no class, as 1 of 16 images, and the others have; give it one, or remove it" in capsys.readouterr().err
    assert not out.exists()
    copy(images / "ant", tmp_path / "flat")
    done(*words(tiny, out, "--images", str(tmp_path / "flat")))
    assert open_latents(out).labels.tolist() == [0] * 8


def test_progress_says_what_is_waited_for(tiny, out, capsys, monkeypatch):
    monkeypatch.setattr(extract, "_QUIET_SECONDS", -1.0)
    done(*words(tiny, out))
    lines = [line for line in capsys.readouterr().out.splitlines() if "img/s" in line]
    assert [line.split()[1] for line in lines] == ["4/16", "6/16", "10/16", "12/16", "16/16"]
    assert all("data" in line and "disk" in line and "ETA" in line for line in lines) and lines[-1].endswith("ETA 0 s")


def test_storage_of_half_the_size(tiny, out):
    done(*words(tiny, out, "--dtype", "bfloat16"))
    a, b = open_latents(out), open_latents(tiny.latents)
    torch.testing.assert_close(a.read(range(16)), b.read(range(16)), rtol=2**-8, atol=0)
    assert len(files(out)) == 5
