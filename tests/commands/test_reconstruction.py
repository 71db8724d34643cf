"""evaluate --reconstruction: both protocols by their definitions, one process or two, any batch, one batch in memory."""

import json
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny import done, launched

import vavae_fast.evaluation
from vavae_fast import rng
from vavae_fast.cli import main
from vavae_fast.commands import build, reconstruction
from vavae_fast.commands._pictures import differences
from vavae_fast.commands.reconstruction import Reconstructor
from vavae_fast.config import load_config
from vavae_fast.data import open_images
from vavae_fast.evaluation import feature_statistics, frechet_distance, psnr, ssim
from vavae_fast.models import LPIPS
from vavae_fast.pixels import to_uint8, to_unit
from vavae_fast.training import checkpoint
from vavae_fast.training.heldout import spread_rows


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eleven images of several sizes, so that the two crops differ."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(2)
    for k in range(11):
        Image.fromarray(generator.integers(0, 256, (20 + k, 41 - k, 3), np.uint8)).save(folder / f"{k:02d}.png")
    return folder


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    """One file with VGG's keys and the linear layers'."""
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(LPIPS.random().state_dict(), path)
    return path


def words(tiny, photos, *more):
    return ["evaluate", "--reconstruction", "--config", str(tiny.root / "tokenizer.yaml"), "--checkpoint", str(tiny.tokenizer_run),
            "--images", str(photos), *more]  # fmt: skip


def scored(out, *given):
    out.mkdir(exist_ok=True)
    done(*given, "--json", str(out / "a.json"))
    return json.loads((out / "a.json").read_text())


def tokenizer(tiny):
    return build.tokenizer(load_config(tiny.root / "tokenizer.yaml"), str(tiny.tokenizer_run))


def test_the_adm_protocol_scores_what_a_png_would_hold(tiny, photos, lpips, out):
    found = scored(out, *words(tiny, photos, "--metrics", "psnr,ssim,lpips", "--vgg", str(lpips), "--lpips", str(lpips)))
    pixels = open_images(photos, size=16).read(range(11))
    model = tokenizer(tiny)
    made = to_uint8(model.decode(model.encode(to_unit(pixels)).mode()))
    expected = [psnr(made, pixels), ssim(made, pixels), LPIPS.random()(to_unit(pixels), to_unit(made))]
    assert [found[name] for name in ("psnr", "ssim", "lpips")] == pytest.approx([float(e.mean()) for e in expected], rel=1e-4)
    assert found["protocol"]["name"] == "adm" and found["protocol"]["vgg_sha256"] == found["protocol"]["lpips_sha256"]


def test_the_lightningdit_protocol_scores_a_sample_and_floats(tiny, photos, lpips, out):
    weights = ("--vgg", str(lpips), "--lpips", str(lpips))
    found = scored(out, *words(tiny, photos, "--protocol", "lightningdit", "--metrics", "psnr,ssim,lpips", *weights))
    pixels = open_images(photos, size=16, crop="bilinear").read(range(11))
    assert not torch.equal(pixels, open_images(photos, size=16).read(range(11)))
    model, x = tokenizer(tiny), to_unit(pixels)
    posterior = model.encode(x)
    made = model.decode(posterior.sample(noise=rng.normal(0, torch.arange(11), like=posterior.mean, stream=rng.Stream.POSTERIOR)))
    expected = [psnr(to_uint8(made), pixels), ssim(made.clamp(-1, 1), x, data_range=2.0, border="reflect"), LPIPS.random()(x, made)]
    assert [found[name] for name in ("psnr", "ssim", "lpips")] == pytest.approx([float(e.mean()) for e in expected], rel=1e-4)
    other = scored(out, *words(tiny, photos, "--protocol", "lightningdit", "--metrics", "psnr", "--seed", "7"))
    assert found["protocol"]["name"] == "lightningdit" and other["psnr"] != found["psnr"] and other["protocol"]["seed"] == 7


def test_no_value_depends_on_the_batch(tiny, photos, out):
    values = [scored(out, *words(tiny, photos, "--protocol", "lightningdit", "--metrics", "psnr,ssim", "--batch", str(n))) for n in (1, 4, 32)]
    for name in ("psnr", "ssim"):
        assert [v[name] for v in values] == pytest.approx([values[0][name]] * 3, rel=1e-4), "rounding may move a pixel by one level of 255"


class Colours(torch.nn.Module):
    """Stands for Inception: 4 numbers an image."""

    sha256, recognised = "0" * 64, False

    def forward(self, images):
        return SimpleNamespace(pool=torch.cat([images.float().mean((2, 3)), images.float().std((1, 2, 3))[:, None]], 1) / 255)


def test_rfid_compares_reconstructions_with_their_originals(tiny, photos, out, monkeypatch, capsys):
    monkeypatch.setattr(vavae_fast.evaluation, "load_inception", lambda path: Colours())
    monkeypatch.setattr(vavae_fast.evaluation, "require_count", lambda *given: None)
    found = scored(out, *words(tiny, photos, "--metrics", "rfid", "--batch", "4"))
    pixels, model = open_images(photos, size=16).read(range(11)), tokenizer(tiny)
    made = to_uint8(model.decode(model.encode(to_unit(pixels)).mode()))
    moments = [feature_statistics(Colours()(images).pool) for images in (made, pixels)]
    assert found["rfid"] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-4)
    said = capsys.readouterr().out
    assert "rFID-11" in said and "note: Inception weights are not the known ones" in said and found["protocol"]["inception_sha256"] == "0" * 64


def test_a_picture_shows_originals_reconstructions_and_differences(tiny, photos, out):
    done(*words(tiny, photos, "--metrics", "psnr", "--picture", str(out / "a.png"), "--picture-num", "3", "--batch", "2"))
    sheet = torch.from_numpy(np.array(Image.open(out / "a.png"))).permute(2, 0, 1)
    assert sheet.shape == (3, 3 * 18 + 2, 3 * 18 + 2)
    pixels = open_images(photos, size=16).read(spread_rows(11, 3))
    for k in range(3):
        original, made, difference = (sheet[:, 2 + 18 * k : 18 + 18 * k, 2 + 18 * n : 18 + 18 * n] for n in range(3))
        assert torch.equal(original, pixels[k]) and not torch.equal(made, original)
        assert torch.equal(difference, differences(original[None], made[None])[0])


def test_one_batch_is_held_at_a_time(tiny, photos, monkeypatch):
    alive, most, plain = weakref.WeakSet(), [], Reconstructor._scored

    def watched(self, batch):
        found = plain(self, batch)
        alive.add(found.pixels)
        most.append(len(alive))
        return found

    monkeypatch.setattr(Reconstructor, "_scored", watched)
    done(*words(tiny, photos, "--metrics", "psnr", "--batch", "1"))
    assert len(most) == 11 and max(most) <= 2, "the one at hand, and the one before until its name is taken"


def test_a_full_disk_ends_an_evaluation_in_one_line(tiny, photos, out, monkeypatch, capsys):
    def full(*words):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(reconstruction, "SAVED_EVERY", 0.0)
    monkeypatch.setattr(checkpoint, "save_file", full)
    assert main([*words(tiny, photos, "--metrics", "psnr"), "--json", str(out / "scores.json")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be written" in said and "No space left" in said and not list(out.glob("*.tmp"))


def test_a_killed_evaluation_goes_on_and_gives_the_same_bits(tiny, photos, out, monkeypatch, capsys):
    monkeypatch.setattr(vavae_fast.evaluation, "load_inception", lambda path: Colours())
    monkeypatch.setattr(vavae_fast.evaluation, "require_count", lambda *given: None)
    monkeypatch.setattr(reconstruction, "SAVED_EVERY", 0.0)
    given = words(tiny, photos, "--metrics", "rfid,psnr,ssim", "--batch", "3")
    undisturbed, plain, seen = scored(out, *given), Reconstructor._scored, []

    def killed(self, batch):
        seen.append(len(batch.index))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return plain(self, batch)

    part = out / "b.json.part0"
    with monkeypatch.context() as patch:
        patch.setattr(Reconstructor, "_scored", killed)
        assert main([*given, "--json", str(out / "b.json")]) == 130
    assert part.is_file() and not (out / "b.json").exists()
    held = part.read_bytes()
    part.with_name("b.json.part0.tmp").write_bytes(held[:10])  # as SIGKILL within a write leaves it
    capsys.readouterr()
    done(*given, "--json", str(out / "b.json"))
    assert "continues after 6 of 11 images" in capsys.readouterr().out and not list(out.glob("*.part*"))
    found = json.loads((out / "b.json").read_text())
    assert [found[name] for name in ("rfid", "psnr", "ssim")] == [undisturbed[name] for name in ("rfid", "psnr", "ssim")]
    part.write_bytes(held)
    done(*given, "--seed", "1", "--json", str(out / "b.json"))
    assert "continues" not in capsys.readouterr().out, "another evaluation's tally"
    part.write_bytes(held[:-10])
    done(*given, "--json", str(out / "b.json"))
    assert "not readable" in capsys.readouterr().out
    assert json.loads((out / "b.json").read_text())["psnr"] == undisturbed["psnr"]


@pytest.mark.slow  # starts three interpreters
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes over gloo; on a GPU machine they would share one over NCCL")
def test_two_processes_score_as_one(tiny, photos, out):
    given = words(tiny, photos, "--protocol", "lightningdit", "--metrics", "psnr,ssim", "--batch", "3")
    alone = scored(out, *given)
    result = launched(2, *given, "--json", str(out / "b.json"))
    both = json.loads((out / "b.json").read_text())
    assert [both[name] for name in ("psnr", "ssim")] == pytest.approx([alone[name] for name in ("psnr", "ssim")], rel=1e-4)
    assert both["protocol"]["processes"] == 2 and result.stdout.count("psnr ") == 1
    same = ("name", "count", "fingerprint", "tokenizer_sha256", "seed", "precision")
    assert [both["protocol"][key] for key in same] == [alone["protocol"][key] for key in same]


@pytest.mark.parametrize("more, said", [
    (("--metrics", "lpips"), "--vgg: missing"), (("--metrics", "rfid"), "11 images, FID and sFID need 2048 or more"),
    (("--metrics", "psnr", "--image-size", "20"), "--image-size: must be a multiple of 8"), (("--metrics", "psnr", "--seed", "-1"), "--seed"),
    (("--metrics", "psnr", "--picture-num", "0"), "--picture-num"), (("--metrics", "psnr", "--samples", "x"), "--samples: only without"),
    (("--metrics", "psnr", "--protocol", "best"), "--protocol"), (("--metrics", "psnr", "--bootstrap", "5"), "--bootstrap: only without"),
])  # fmt: skip
def test_wrong_words(tiny, photos, capsys, more, said):
    assert main(words(tiny, photos, *more)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_flags_of_reconstruction_alone_are_refused_elsewhere(capsys):
    assert main(["evaluate", "--samples", "x", "--reference", "y", "--picture-num", "3"]) == 2
    assert "--picture-num: only with --reconstruction" in capsys.readouterr().err
