"""analyze: tokens drawn as said, values of the public functions, pictures and page; what is wrong is one line."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import contents, done, files

from vavae_fast.cli import main
from vavae_fast.commands.analysis import channel_counts, read_tokens
from vavae_fast.data import open_latents
from vavae_fast.evaluation import neighbour_distance_cv, uniformity

NAMES = ("density_cv", "normalized_entropy", "gini")


@pytest.fixture
def quick_t_sne(monkeypatch):
    """Two coordinates moved by the seed stand for t-SNE, which takes seconds."""
    pytest.importorskip("scipy")
    embed = lambda points, seed: points[:, :2].astype(np.float64) + 0.1 * np.random.default_rng(seed).standard_normal((len(points), 2))
    monkeypatch.setattr(sys.modules["vavae_fast.evaluation.uniformity"], "embed", embed)


def cloud(rows=50, width=6):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_values_of_a_tensor_are_those_of_the_functions(tmp_path, quick_t_sne, kind, capsys):
    x, path = cloud(), tmp_path / f"x.{kind}"
    torch.save(x, path) if kind == "pt" else save_file({"latents": x}, path)
    done("analyze", "--latents", str(path), "--seed", "3", "--repeats", "2", "--json", str(tmp_path / "a.json"), "--out", str(tmp_path / "out"))
    found = json.loads((tmp_path / "a.json").read_text())
    expected = uniformity(x, seed=3, repeats=2)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert found["neighbour_distance_cv"] == neighbour_distance_cv(x) and len(found["runs"]) == 2
    assert found["channels"]["std"] == pytest.approx(x.std(0).tolist()) and found["protocol"]["tokens"] == 50
    assert found["protocol"]["packages"].keys() == {"scikit-learn", "scipy"} and found["kind"] == "analysis"
    assert files(tmp_path / "out") == ["analysis.html", "analysis.json", "channels.png", "tsne.png"]
    said = capsys.readouterr().out
    assert "t-SNE 2/2" in said and re.search(r"^density_cv +\d\.\d{4} ± ", said, re.M)
    assert re.search(r"^neighbour_distance_cv +\d\.\d{4}$", said, re.M)
    page = (tmp_path / "out" / "analysis.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "mean and std by channel" in page and "density_cv" in page


def test_through_t_sne(tmp_path):
    """The whole way, on forty points."""
    pytest.importorskip("sklearn")
    torch.save(cloud(40, 3), tmp_path / "x.pt")
    done("analyze", "--latents", str(tmp_path / "x.pt"), "--repeats", "1", "--out", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["density_cv"] == uniformity(cloud(40, 3))["density_cv"]


def test_tokens_of_shards_are_drawn_once_each_mirrored_and_normalised(tiny):
    latents = open_latents(tiny.latents)
    everything = read_tokens(tiny.latents, 10_000, 5)
    assert everything.values.shape == (16 * 4, 4) and torch.equal(everything.mean, latents.mean.flatten())
    both = [(latents.read(range(16), flip) - latents.mean) / latents.std for flip in (False, True)]
    plain, mirrored = (x.flatten(2).transpose(1, 2).flatten(0, 1) for x in both)
    from_plain, from_mirrored = ((everything.values - x).abs().amax(1) < 1e-6 for x in (plain, mirrored))
    assert (from_plain | from_mirrored).all() and 10 < from_plain.sum() < 54
    few = read_tokens(tiny.latents, 20, 5)
    found = torch.cdist(few.values, torch.cat((plain, mirrored))).argmin(1) % 64
    assert len(few.values) == 20 == len(found.unique()), "each place at most once"
    assert torch.equal(few.values, read_tokens(tiny.latents, 20, 5).values) and not torch.equal(few.values, read_tokens(tiny.latents, 20, 6).values)


def test_rows_of_a_file_are_drawn_in_order(tmp_path):
    torch.save(cloud(100), tmp_path / "x.pt")
    few = read_tokens(tmp_path / "x.pt", 40, 0)
    places = (few.values[:, None] == cloud(100)).all(-1).nonzero()[:, 1]
    assert len(places) == 40 and (places.diff() > 0).all()


def test_counts_of_channels_add_up_and_show_their_shape():
    values = torch.cat((torch.zeros(500, 1), torch.full((500, 1), 9.0))), torch.randn(1000, 1)
    from vavae_fast.commands.analysis import Tokens

    counts = channel_counts(Tokens(torch.cat(values, 1), torch.zeros(2), torch.ones(2), {}))
    assert counts.shape == (2, 33) and (counts.sum(1) == 1000).all()
    assert (counts[0] > 0).sum() == 2 and counts[0].max() == 500 and counts[1].argmax() in range(13, 20)


def test_without_scikit_learn_one_line_says_what_to_do(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    given = ["analyze", "--latents", str(tiny.latents), "--out", str(tmp_path / "out")]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert said == ("error: analyze: scikit-learn is not installed, t-SNE needs it; pip install 'vavae-fast[analyze]', "
                    "or leave t-SNE out with --repeats 0\n")  # fmt: skip
    assert not (tmp_path / "out").exists()
    done(*given, "--repeats", "0")
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert found["neighbour_distance_cv"] > 0 and not any(name in found for name in NAMES) and found["protocol"]["repeats"] == 0
    assert files(tmp_path / "out") == ["analysis.html", "analysis.json", "channels.png"]


@pytest.mark.parametrize("kind, columns", [("tokenizer", 3), ("dit", 2)])
def test_similarity_maps_of_either_kind_of_config(tiny, tmp_path, kind, columns):
    """A tokenizer's config brings its foundation model along."""
    given = {"tokenizer": (f"ckpt_path={tiny.tokenizer_run}", f"foundation.standin={tiny.root / 'encoder.safetensors'}"),
             "dit": (f"vae.ckpt_path={tiny.tokenizer_run}",)}[kind]  # fmt: skip
    done("analyze", "--latents", str(tiny.latents), "--repeats", "0", "--out", str(tmp_path), "--config", str(tiny.root / f"{kind}.yaml"),
         "--images", str(tiny.images), "--token", "0,1", "--map-num", "5", *given)  # fmt: skip
    sheet = np.asarray(Image.open(tmp_path / "similarity.png"))
    assert sheet.shape == (5 * 18 + 2, columns * 18 + 2, 3)
    for k in range(5):
        for column in range(1, columns):
            assert tuple(sheet[2 + 18 * k, 2 + 18 * column + 15]) == (165, 20, 40), "the token above right is red"
    assert "Similarity maps" in (tmp_path / "analysis.html").read_text()


def test_the_same_words_write_the_same_pictures(tiny, tmp_path, quick_t_sne):
    for name in ("a", "b"):
        done("analyze", "--latents", str(tiny.latents), "--repeats", "1", "--out", str(tmp_path / name))
    assert contents(tmp_path / "a", "*.png") == contents(tmp_path / "b", "*.png")


def test_dry_run_says_what_would_be_looked_at(tiny, tmp_path, capsys):
    done("analyze", "--latents", str(tiny.latents), "--repeats", "0", "--out", str(tmp_path / "out"), "--dry-run")
    assert "64 tokens of 4 channels" in capsys.readouterr().out and not (tmp_path / "out").exists()


def bad_files(folder):
    torch.save(cloud(), folder / "good.pt")
    torch.save({"a": 1}, folder / "dict.pt")
    torch.save(torch.zeros(4, 4, 2, 2), folder / "four.pt")
    torch.save(torch.full((40, 2), torch.nan), folder / "nan.pt")
    torch.save(torch.ones(40, 2), folder / "same.pt")
    torch.save(cloud(8), folder / "few.pt")
    (folder / "text.pt").write_text("no tensor")
    (folder / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    save_file({"z": torch.zeros(3, 3)}, folder / "other.safetensors")
    (folder / "empty").mkdir()


@pytest.mark.parametrize("name, more, words", [
    ("nowhere", (), "nowhere: no such file or folder"), ("dict.pt", (), "dict.pt: holds dict, expected a tensor"),
    ("four.pt", (), r"four.pt: holds torch.float32 \(4, 4, 2, 2\), .*of shards give the folder"), ("nan.pt", (), "nan.pt: 80 values are NaN"),
    ("same.pt", (), "same.pt: latents: every one has 10 copies"), ("few.pt", (), "few.pt: 8 tokens are looked at, more than 10 are needed"),
    ("text.pt", (), "text.pt: not a PyTorch file, or damaged"), ("cut.safetensors", (), "cut.safetensors: not a readable"),
    ("other.safetensors", (), "other.safetensors: holds z, no latents"), ("empty", (), "empty: no .safetensors shards"),
    ("good.pt", ("--tokens", "0"), "--tokens: must be 1 or more"), ("good.pt", ("--seed", "-1"), "--seed: must be 0 or more"),
    ("good.pt", ("--repeats", "-1"), "--repeats"), ("good.pt", ("--images", "x"), "--config: similarity maps need --config and --images"),
    ("good.pt", ("--token", "0,0"), "--token: only with --config"),
])  # fmt: skip
def test_wrong_input_is_one_line_before_anything_is_written(tmp_path, capsys, name, more, words):
    bad_files(tmp_path)
    assert main(["analyze", "--latents", str(tmp_path / name), "--repeats", "0", "--out", str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(words, said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("token", ["2,0", "1", "a,b", "-1,0"])
def test_a_token_outside_the_grid_is_refused(tiny, tmp_path, capsys, token):
    assert main(["analyze", "--latents", str(tiny.latents), "--repeats", "0", "--out", str(tmp_path / "out"), "--images", str(tiny.images),
                 "--config", str(tiny.root / "dit.yaml"), f"vae.ckpt_path={tiny.tokenizer_run}", f"--token={token}"]) == 2  # fmt: skip
    assert "--token: must be ROW,COLUMN, each from 0 to 1" in capsys.readouterr().err
