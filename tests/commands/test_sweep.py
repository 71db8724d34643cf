"""sweep: every combination is drawn and scored once, the best is named, a second call does nothing again."""

import json

import numpy as np
import pytest
import torch
from tiny import done

import vavae_fast.evaluation as evaluation
from vavae_fast import distributed
from vavae_fast.cli import main
from vavae_fast.commands import sweep as module
from vavae_fast.evaluation.inception import InceptionFeatures


class PixelFeatures(torch.nn.Module):
    """Stands for Inception: a few pixels."""

    sha256, recognised = "0" * 64, False
    seen = 0

    def forward(self, images):
        PixelFeatures.seen += len(images)
        pooled = images.double().flatten(1)[:, :32].float()
        return InceptionFeatures(*(pooled for _ in InceptionFeatures._fields))


@pytest.fixture
def reference(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_inception", lambda path: PixelFeatures())
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8))
    return path


def swept(tiny, reference, out, *more):
    return ["sweep", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--reference", str(reference), "--metrics", "recall,precision", "--num", "6",
            "--out", str(out), *more]  # fmt: skip


GRID = ("sample.cfg_scale=1,2.5", "sample.timestep_shift=0,0.3")


def test_every_combination_is_scored_and_the_best_is_named(tiny, reference, out, capsys):
    done(*swept(tiny, reference, out, *GRID))
    result = json.loads((out / "sweep.json").read_text())
    assert [row["setting"] for row in result["settings"]] == [
        {"sample.cfg_scale": scale, "sample.timestep_shift": shift} for scale in ("1", "2.5") for shift in ("0", "0.3")]  # fmt: skip
    assert result["by"] == "recall" and result["best"]["recall"] == max(row["recall"] for row in result["settings"])
    folders = [out / row["folder"] for row in result["settings"]]
    facts = [json.loads((folder / "manifest.json").read_text())["facts"] for folder in folders]
    assert [(f["sampler"]["cfg_scale"], f["sampler"]["shift"], f["num"]) for f in facts] == [(1, 0, 6), (1, 0.3, 6), (2.5, 0, 6), (2.5, 0.3, 6)]
    images = [np.load(folder / "samples.npz")["arr_0"] for folder in folders]
    assert not np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    page = (out / "sweep.html").read_text()
    assert "cfg_scale=2.5, timestep_shift=0.3" in page and page.count("<svg") == 2 and "<polyline" in page
    assert f"best by recall of 6 images: {module._name(result['best']['setting'])}" in capsys.readouterr().out


def test_what_is_there_is_neither_drawn_nor_scored_again(tiny, reference, out, capsys):
    done(*swept(tiny, reference, out, "sample.cfg_scale=1,2"))
    first, seen = json.loads((out / "sweep.json").read_text())["settings"], PixelFeatures.seen
    drawn = {path: path.stat().st_mtime_ns for path in out.rglob("samples.npz")}
    done(*swept(tiny, reference, out, "sample.cfg_scale=1,2,3"))
    again = json.loads((out / "sweep.json").read_text())["settings"]
    assert again[:2] == first and len(again) == 3 and PixelFeatures.seen == seen + 6 + 12, "one setting's samples, and the reference's images"
    assert all(path.stat().st_mtime_ns == before for path, before in drawn.items())


@pytest.mark.parametrize("more, said", [
    (("sample.cfg_scale=1,two",), "cfg_scale"), (("sample.cfg_scale=1,-1",), "cfg_scale"), (("sample.sampling_method=euler,oiler",), "oiler"),
    (("--metrics", "fid"), "--num: 6 images"), (("--metrics", "beauty"), "beauty"), (("--preset", "paper-64ep", "sample.cfg_scale=1,2"), "--preset"),
    (("model.hidden_size=32,64",), "hidden_size"), (("--reference", "nowhere.npz"), "nowhere.npz"),
    (("sample.cfg_scale=1", "sample.cfg_scale=2"), "sample.cfg_scale"), (("--num", "3"), "need 4 or more"),
])  # fmt: skip
def test_all_settings_are_checked_before_the_first_is_drawn(tiny, reference, out, capsys, more, said):
    assert main(swept(tiny, reference, out, *more)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not out.exists()


def test_another_process_draws_and_leaves_scores_to_the_main_one(tiny, reference, out, monkeypatch):
    seen = PixelFeatures.seen
    monkeypatch.setattr(distributed, "open_world", lambda: distributed.World(rank=1, size=1, device=torch.device("cpu")))
    done(*swept(tiny, reference, out, "sample.cfg_scale=1,2", "sample.per_proc_batch_size=2"))
    assert PixelFeatures.seen == seen and not (out / "sweep.json").exists()


def test_what_made_the_samples_stands_beside_their_scores(tiny, reference, out):
    done(*swept(tiny, reference, out, "sample.cfg_scale=2,2"))
    (setting,) = json.loads((out / "sweep.json").read_text())["settings"]
    made = json.loads((out / setting["folder"] / "metrics.json").read_text())["made_by"]
    assert made["facts"]["sampler"]["cfg_scale"] == 2 and made["run"]["batch"] == 4


def test_dry_run(tiny, reference, out, capsys):
    done(*swept(tiny, reference, out, *GRID, "--dry-run"))
    said = capsys.readouterr().out
    assert "4 settings of 6 images, by recall" in said and "cfg_scale=1, timestep_shift=0.3" in said and not out.exists()
