"""train-tokenizer, watched: scores, pictures and similarity maps of held-out images, and what is trained stays the same to the bit."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import contents, done, launched, metrics

from vavae_fast import rng
from vavae_fast.cli import main
from vavae_fast.commands import build, watch_tokenizer
from vavae_fast.config import load_config
from vavae_fast.data import open_images
from vavae_fast.evaluation import feature_statistics, frechet_distance, psnr, ssim
from vavae_fast.losses import vf_loss
from vavae_fast.pixels import to_uint8, to_unit
from vavae_fast.training.checkpoint import load_checkpoint
from vavae_fast.training.heldout import SEED, spread_rows

STEP = "checkpoints/step_{:08d}"
WATCHED = ("log.valid_every=2", "log.valid_num=6", "log.samples_every=3", "log.samples_num=5")
NAMES = ("psnr", "ssim", "rec", "kl", "perceptual", "mdms", "mcos", "vf_loss")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Nine images that nothing is trained on, wider than high."""
    folder, generator = tmp_path_factory.mktemp("held-out"), np.random.default_rng(1)
    for k in range(9):
        Image.fromarray(generator.integers(0, 256, (16, 24, 3), np.uint8)).save(folder / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def watched(tiny, held_out, tmp_path_factory):
    """The run of `tiny.tokenizer_run`, watched."""
    out = tmp_path_factory.mktemp("watched")
    done("train-tokenizer", *tiny.tokenizer(out, "tokenizer", f"data.valid_path={held_out}", *WATCHED))
    return out / "tokenizer"


def weights(run, step=4):
    return contents(run / STEP.format(step), "*.safetensors")


def held_out_values(run):
    return [(m["step"], {k: v for k, v in m.items() if k.startswith("valid")}) for m in metrics(run) if "valid_psnr" in m]


def test_watching_changes_no_bit_of_what_is_trained(tiny, watched):
    assert weights(watched) == weights(tiny.tokenizer_run)
    for a, b in zip(metrics(watched), metrics(tiny.tokenizer_run), strict=True):
        assert all(a[key] == b[key] for key in b if key not in ("images_per_second", "data_wait", "seconds", "memory_gb"))


def test_scores_are_their_definitions(tiny, held_out, watched):
    """Of the last weights, all images at once, where the run takes four at a time."""
    values = held_out_values(watched)
    assert [step for step, _ in values] == [2, 4] and set(values[-1][1]) == {f"valid_{name}" for name in NAMES}
    config = load_config(tiny.root / "tokenizer.yaml", tuple(tiny.tokenizer()[2:]))
    model, perceptual, foundation = build.tokenizer(config, str(watched)), build.perceptual(config), build.foundation(config)
    rows = spread_rows(9, 6)
    pixels = open_images(held_out, size=16).read(rows)
    x = to_unit(pixels)
    posterior = model.encode(x)
    z = posterior.sample(noise=rng.normal(SEED, torch.from_numpy(rows), like=posterior.mean, stream=rng.Stream.POSTERIOR))
    made = model.decode(z)
    projection = load_checkpoint(watched / STEP.format(4), "model")[0]["model"]["linear_proj.weight"][:, :, 0, 0]
    mdms, mcos = vf_loss(z, foundation(x), 0.1, 0.2, projection=projection)
    expected = dict(psnr=psnr(to_uint8(made), pixels).mean(), ssim=ssim(to_uint8(made), pixels).mean(), rec=(made - x).abs().mean(),
                    kl=posterior.kl().mean(), perceptual=perceptual(x, made).mean(), mdms=mdms, mcos=mcos, vf_loss=mdms + mcos)  # fmt: skip
    found = values[-1][1]
    assert [found[f"valid_{name}"] for name in NAMES] == pytest.approx([float(expected[name]) for name in NAMES], rel=1e-5)


def test_a_resumed_run_measures_the_same(tiny, held_out, watched, out):
    done("train-tokenizer", *tiny.tokenizer(out, "tokenizer", f"data.valid_path={held_out}", *WATCHED, "train.max_steps=2"))
    done("train-tokenizer", *tiny.tokenizer(out, "tokenizer", f"data.valid_path={held_out}", *WATCHED))
    assert held_out_values(out / "tokenizer") == held_out_values(watched)
    for folder in ("samples", "similarity"):
        assert contents(out / "tokenizer" / folder, "*4.png") == contents(watched / folder, "*4.png")


def test_originals_stand_beside_their_reconstructions(held_out, watched):
    sheets = sorted((watched / "samples").iterdir())
    assert [path.name for path in sheets] == ["step_00000003.png", "step_00000004.png"]
    sheet = np.asarray(Image.open(sheets[1]))
    assert sheet.shape == (3 * 18 + 2, 4 * 18 + 2, 3), "five pairs, two a row"
    originals = open_images(held_out, size=16).read(spread_rows(9, 5)).permute(0, 2, 3, 1).numpy()
    for k in range(5):
        y, x = 2 + k // 2 * 18, 2 + k % 2 * 36
        assert np.array_equal(sheet[y : y + 16, x : x + 16], originals[k])
        made = sheet[y : y + 16, x + 18 : x + 34]
        assert made.std() > 0 and not np.array_equal(made, originals[k])


def test_similarity_maps_are_red_at_their_token(watched):
    sheet = np.asarray(Image.open(watched / "similarity" / "step_00000004.png"))
    assert sheet.shape == (5 * 18 + 2, 3 * 18 + 2, 3), "image, latents, features: five rows"
    for k in range(5):
        for column in (1, 2):
            panel = sheet[2 + 18 * k : 18 + 18 * k, 2 + 18 * column : 18 + 18 * column]
            assert tuple(panel[8, 8]) == tuple(panel[15, 15]) == (165, 20, 40), "the middle token of 2 x 2, cosine 1"
            assert len(np.unique(panel.reshape(-1, 3), axis=0)) <= 4
        assert tuple(sheet[2 + 18 * k + 8, 2 + 8]) == (255, 210, 0), "framed in the image"


def test_the_report_has_scores_pictures_and_maps(watched):
    page = (watched / "report.html").read_text()
    for text in ("PSNR of held-out images, dB", "SSIM of held-out", "Similarity maps", "valid_psnr, last logged", "each with its reconstruction"):
        assert text in page
    assert page.count("data:image/png;base64,") == 4


def test_without_held_out_images_pictures_show_those_trained_on(tiny, out):
    done("train-tokenizer", *tiny.tokenizer(out, "t", "log.samples_every=2", "log.samples_num=2", "train.max_steps=2", "model.params.use_vf=null"))
    assert (out / "t" / "samples" / "step_00000002.png").is_file() and not (out / "t" / "similarity").exists()
    assert not held_out_values(out / "t")


@pytest.mark.parametrize("more, absent", [
    (("model.params.use_vf=null", "model.params.lossconfig.params.perceptual_weight=0"), {"mdms", "mcos", "vf_loss", "perceptual"}),
    (("model.params.reverse_proj=false", "lightning.trainer.precision=bf16"), set()),
])  # fmt: skip
def test_what_a_run_has_not_is_not_measured(tiny, held_out, out, more, absent):
    words = (f"data.valid_path={held_out}", "log.samples_every=1", "train.max_steps=1", *more)
    done("train-tokenizer", *tiny.tokenizer(out, "t", *words))
    ((_, found),) = held_out_values(out / "t")
    assert set(found) == {f"valid_{name}" for name in set(NAMES) - absent} and all(value is not None for value in found.values())


class Colours(torch.nn.Module):
    """Stands for Inception: 4 numbers an image."""

    def forward(self, images):
        return SimpleNamespace(pool=torch.cat([images.float().mean((2, 3)), images.float().std((1, 2, 3))[:, None]], 1) / 255)


def few_enough(monkeypatch):
    """rFID of nine images: the schema asks for 2,048, which would take this test minutes."""
    from vavae_fast import schema

    monkeypatch.setattr(schema.LogConfig, "__post_init__", lambda self: None)
    monkeypatch.setattr(watch_tokenizer, "load_inception", lambda path: Colours())


def test_a_small_rfid_compares_reconstructions_with_their_originals(tiny, held_out, out, monkeypatch, tmp_path):
    few_enough(monkeypatch)
    (tmp_path / "inception.pth").write_bytes(b"")
    done("train-tokenizer", *tiny.tokenizer(out, "tokenizer", f"data.valid_path={held_out}", "log.fid_every=2", "log.fid_num=9",
                                            f"log.fid_inception={tmp_path / 'inception.pth'}"))  # fmt: skip
    assert weights(out / "tokenizer") == weights(tiny.tokenizer_run)
    found = [m["rfid"] for m in metrics(out / "tokenizer") if "rfid" in m]
    assert len(found) == 2
    config = load_config(tiny.root / "tokenizer.yaml", tuple(tiny.tokenizer()[2:]))
    model = build.tokenizer(config, str(out / "tokenizer"))
    pixels = open_images(held_out, size=16).read(range(9))
    posterior = model.encode(to_unit(pixels))
    z = posterior.sample(noise=rng.normal(SEED, torch.arange(9), like=posterior.mean, stream=rng.Stream.POSTERIOR))
    moments = [feature_statistics(Colours()(images).pool) for images in (to_uint8(model.decode(z)), pixels)]
    assert found[1] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-4)


def test_the_dry_run_says_what_will_be_watched(tiny, held_out, out, capsys):
    done("train-tokenizer", *tiny.tokenizer(out, "t", f"data.valid_path={held_out}", *WATCHED, "--dry-run"))
    said = capsys.readouterr().out
    assert "watched    reconstructions of 6 of 9 held-out images every 2 steps; pictures of 5 held-out images every 3 steps" in said
    assert not out.exists()


@pytest.mark.parametrize("more, words", [
    (("data.valid_path=nowhere",), "data.valid_path: nowhere does not exist"),
    (("data.valid_path={images}",), "data.valid_path: .* nothing is held out"),
    (("log.fid_every=2",), "log.fid_every: rFID of log.fid_num=2048 images, .* data.valid_path has 0"),
    (("data.valid_path={held_out}", "log.fid_every=2"), "log.fid_every: .* data.valid_path has 9; give more held-out images"),
    (("log.samples_num=0",), "log.samples_num: must be above 0"),
    (("log.layers_every=5",), "unknown key log.layers_every"),
])  # fmt: skip
def test_what_cannot_be_watched_is_one_line_before_anything_is_written(tiny, held_out, out, capsys, more, words):
    assert main(["train-tokenizer", *tiny.tokenizer(out, "t", *(word.format(images=tiny.images, held_out=held_out) for word in more))]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(words, said), said
    assert not out.exists()


@pytest.mark.slow  # starts three interpreters
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes over gloo; on a GPU machine they would share one over NCCL")
def test_two_processes_measure_and_draw_as_one(tiny, held_out, out):
    """Before the GAN starts, whose BatchNorm sees a process's images only; five images are not shared evenly."""
    words = (f"data.valid_path={held_out}", *WATCHED, "log.valid_num=5", "train.max_steps=2", "train.micro_batch_size=2")
    launched(2, "train-tokenizer", *tiny.tokenizer(out, "two", *words))
    done("train-tokenizer", *tiny.tokenizer(out, "one", *words))
    ((_, ours),), ((_, theirs),) = held_out_values(out / "two"), held_out_values(out / "one")
    assert ours == pytest.approx(theirs, rel=1e-4)
    for folder in ("samples", "similarity"):
        a, b = (np.asarray(Image.open(out / run / folder / "step_00000002.png")).astype(int) for run in ("two", "one"))
        assert np.abs(a - b).max() <= 1
