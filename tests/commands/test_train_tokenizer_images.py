"""The images of train-tokenizer: unreadable ones, shards by pattern, which backend, how long the steps waited for them."""

import shutil
import tarfile

import pytest
from tiny import contents, done, metrics

from vavae_fast.cli import main

LAST = "checkpoints/step_00000004"


@pytest.fixture
def damaged(start, tmp_path):
    """The tiny images, one of them cut short."""
    shutil.copytree(start.images, tmp_path / "images")
    bad = tmp_path / "images/bee/3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    return tmp_path / "images"


def test_an_unreadable_image_is_named_and_replaced_and_resume_is_exact(start, out, damaged, capsys):
    more = (f"data.path={damaged}", "data.max_corrupt=0.1")
    done("train-tokenizer", *start.tokenizer(out, "straight", *more))
    log = (out / "straight/log.txt").read_text()
    assert log.count("left out and replaced: ") == 1 and f"{damaged}/bee/3.png: damaged image" in log
    done("train-tokenizer", *start.tokenizer(out, "halves", *more, "train.max_steps=2"))
    done("train-tokenizer", *start.tokenizer(out, "halves", *more))
    assert contents(out / "straight" / LAST, "*.safetensors") == contents(out / "halves" / LAST, "*.safetensors")


def test_more_than_may_be_is_an_error_before_anything_is_written(start, out, damaged, capsys):
    assert main(["train-tokenizer", *start.tokenizer(out, "strict", f"data.path={damaged}")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {damaged}/bee/3.png: damaged image") and said.count("\n") == 1 and not (out / "strict").exists()


@pytest.mark.parametrize("words, named", [("data.max_corrupt=1", "max_corrupt"), ("data.backend=opencv", "backend")])
def test_keys_are_checked(start, out, capsys, words, named):
    assert main(["train-tokenizer", *start.tokenizer(out, "x", words)]) == 2
    assert named in capsys.readouterr().err


def test_shards_by_pattern_and_every_backend_train_alike(start, out):
    """The same images in two tars, by the readable backend: the same weights."""
    done("train-tokenizer", *start.tokenizer(out, "folder"))
    names = sorted(path.relative_to(start.images) for path in start.images.rglob("*.png"))
    for k, label in enumerate(("ant", "bee")):
        with tarfile.open(out / f"in-{k}.tar", "w") as archive:
            for name in names:
                if name.parts[0] == label:
                    archive.add(start.images / name, str(name))
    done("train-tokenizer", *start.tokenizer(out, "shards", f"data.path={out}/in-{{0..1}}.tar", "data.backend=pil"))
    assert contents(out / "folder" / LAST, "model.safetensors") == contents(out / "shards" / LAST, "model.safetensors")
    assert "16 images (pil)" in (out / "shards/log.txt").read_text()


def test_the_progress_line_shows_the_wait_for_data(start, out):
    done("train-tokenizer", *start.tokenizer(out, "tokenizer", "train.max_steps=1"))
    assert 0 <= metrics(out / "tokenizer")[0]["data_wait"] <= 1
    line = next(line for line in (out / "tokenizer/log.txt").read_text().splitlines() if "step 1/1" in line)
    assert "img/s  data " in line and "%" in line.split("data ")[1].split("  ")[0]
