"""gallery: four pictures of a trained model; interpolation ends where it should; a copied latent is found at distance 0."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import done, files

from vavae_fast.cli import main
from vavae_fast.commands.gallery import nearest_latents, slerp
from vavae_fast.data import open_latents
from vavae_fast.flow.generate import LatentScale


def cells(path, columns):
    """(rows, columns, 16, 16, 3) of a grid of 16-pixel images with borders of 2."""
    grid = np.asarray(Image.open(path).convert("RGB"))
    return np.stack([[grid[2 + 18 * y : 18 + 18 * y, 2 + 18 * x : 18 + 18 * x] for x in range(columns)] for y in range(grid.shape[0] // 18)])


def drawn(tiny, out, *more):
    done("gallery", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--columns", "3", "--out", str(out), *more)


def test_four_pictures(tiny, out):
    drawn(tiny, out)
    assert files(out) == ["classes.png", "interpolation.png", "manifest.json", "neighbours.png", "trajectory.png"]
    classes, trajectory, between = (cells(out / f"{name}.png", 3) for name in ("classes", "trajectory", "interpolation"))
    assert classes.shape == trajectory.shape == between.shape == (2, 3, 16, 16, 3)
    facts = json.loads((out / "manifest.json").read_text())["facts"]
    assert facts["classes"] == [0, 1] and np.array(facts["neighbour_distances"]).shape == (2, 3)
    assert np.array_equal(trajectory[0, -1], classes[0, 0]), "the first row's way ends in the first image of its class"
    assert np.array_equal(between[0, 0], classes[0, 0]), "the first noise of the first class"
    assert not np.array_equal(between[0, 0], between[0, 2]) and not np.array_equal(trajectory[0, 0], trajectory[0, 2])
    neighbours = cells(out / "neighbours.png", 4)
    assert neighbours.shape[:2] == (2, 4) and np.array_equal(neighbours[0, 0], classes[0, 0])


def test_it_is_drawn_again_to_the_same_bytes_and_stands_in_the_report(tiny, tmp_path):
    run = tmp_path / "runs" / "dit"
    for _ in range(2):
        done("gallery", *tiny.dit(tmp_path / "runs"), "--checkpoint", str(tiny.dit_run), "--columns", "2", "--pictures", "classes,trajectory")
        before = (run / "gallery" / "classes.png").read_bytes()
    assert (run / "gallery" / "classes.png").read_bytes() == before
    (run / "config.yaml").write_text("x: 1\n")  # what makes it a run folder
    done("report", str(run))
    assert "Gallery" in (run / "report.html").read_text()


def test_autoguidance_guides_pictures_too(tiny, out):
    """The model as its own guide is no guidance at all, whatever the scale."""
    words = ("--pictures", "classes", "sample.cfg_channels=all")
    drawn(tiny, out / "itself", *words, f"sample.guide={tiny.dit_run}", "sample.cfg_scale=3")
    drawn(tiny, out / "alone", *words, "sample.cfg_scale=1")
    itself, alone = (cells(out / name / "classes.png", 3).astype(int) for name in ("itself", "alone"))
    assert np.abs(itself - alone).max() <= 1


def test_slerp_stays_among_typical_noises():
    a, b = torch.randn(2, 5, 4, 8, 8).unbind(0)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    middle = slerp(a, b, 0.5)
    assert (middle.flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1) - 1).abs().max() < 0.15
    torch.testing.assert_close(middle, slerp(b, a, 0.5))


def test_copies_of_training_latents_are_found(tiny, monkeypatch):
    monkeypatch.setattr("vavae_fast.commands.gallery._ROWS_AT_ONCE", 5)
    latents = open_latents(tiny.latents)
    scale = LatentScale(latents.mean, latents.std)
    chosen = scale.normalise(torch.cat((latents.read([11, 3]), latents.read([7], True))))
    found, distances = nearest_latents(chosen, latents, scale, 3)
    assert found.shape == (3, 3, *latents.shape) and distances[:, 0].tolist() == [0, 0, 0] and torch.equal(found[:, 0], chosen)
    assert (distances.diff(dim=1) >= 0).all() and (distances[:, 1] > 0).all()


@pytest.mark.parametrize("more, said", [
    (("--pictures", "portraits"), "--pictures"), (("--classes", "0,2"), "--classes"), (("--columns", "1"), "--columns"), (("--seed", "-1"), "--seed"),
    (("sample.mode=SDE",), "sample.mode"), (("data.data_path=nowhere",), "nowhere"),
    pytest.param(("sample.precision=fp8",), "set sample.precision=bf16", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="may have fp8")),
])  # fmt: skip
def test_wrong_words(tiny, out, capsys, more, said):
    assert main(["gallery", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not out.exists()
