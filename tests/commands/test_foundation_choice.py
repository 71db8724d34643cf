"""What a tokenizer run is aligned with: the config's model, its grid and its input; or a user's own, from the command line alone."""

import importlib.util
import json
import sys

import pytest
import torch
from tiny import done, metrics

from vavae_fast.cli import main
from vavae_fast.commands import build
from vavae_fast.config import TokenizerConfig, load_config
from vavae_fast.errors import BadInput
from vavae_fast.models import foundation
from vavae_fast.parsing import to_dataclass

OWN = """
import torch


def make(channels=5):
    model = torch.nn.Conv2d(3, channels, 4, 4)
    model.feature_dim = channels
    return model


def wider():
    return make(7)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A current folder with a model of the user's; what it puts into Python is taken out again."""
    (tmp_path / "own_vf.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("own_vf", None)


def without_standin(start, out, *more):
    """The tiny run's words without the stand-in, which a user's model takes the place of."""
    return [word for word in start.tokenizer(out, "t", *more) if not word.startswith("foundation.standin")]


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed (vavae-fast[encoders])")
@pytest.mark.parametrize(("size", "levels", "grid"), [(256, 5, 16), (512, 5, 32), (256, 4, 32)])
def test_the_configs_grid_reaches_the_model(tmp_path, size, levels, grid):
    """f16 at 256 and 512 pixels, f8 at 256."""
    torch.manual_seed(0)
    path = tmp_path / "w.pth"
    torch.save(foundation.build_transformer("vit_tiny_patch16_224").state_dict(), path)
    config = to_dataclass(TokenizerConfig, {
        "model": {"params": {"use_vf": "timm:vit_tiny_patch16_224", "ddconfig": {"resolution": size, "ch_mult": [1] * levels}}},
        "foundation": {"weights": str(path), "input_range": "legacy", "pixels_per_patch": 32},
    })  # fmt: skip
    model = build.foundation(config)
    assert model.name == "timm:vit_tiny_patch16_224" and model.model.mean == (0.5, 0.5, 0.5) and model.model.pixels_per_patch == 32
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 192, grid, grid)
    assert build.projection(config, model).weight.shape == (config.model.params.embed_dim, 192, 1, 1)


def test_a_run_with_ones_own_model_and_its_continuation(start, own, out, capsys):
    words = without_standin(start, out)
    done("train-tokenizer", *words, "train.max_steps=2", "--foundation", "own_vf:make")
    run = out / "t"
    assert json.loads((run / "manifest.json").read_text())["foundation"] == "own_vf:make"
    assert json.loads((run / "checkpoints/step_00000002/manifest.json").read_text())["foundation"] == "own_vf:make"
    assert load_config(run / "config.yaml").model.params.use_vf == "module"
    assert all(line["vf_loss"] > 0 for line in metrics(run))
    for flag, words_said in (([], "give it again"), (["--foundation", "own_vf:wider"], "not own_vf:wider")):
        capsys.readouterr()
        assert main(["train-tokenizer", *words, *flag]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "started with --foundation own_vf:make" in said and words_said in said
    done("train-tokenizer", *words, "--foundation", "own_vf:make")
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("more", "said"), [
    (("model.params.use_vf=own_vf:make",), "use_vf: 'own_vf:make' is an import path, and a config, which may come with somebody's weights, runs no "
                                           "code; name it on the command line: --foundation own_vf:make"),
    (("model.params.use_vf=module",), "use_vf: module is the model of --foundation package.module:factory; give that flag too"),
    (("model.params.use_vf=dinov4",), "no foundation model 'dinov4', did you mean dinov3?"),
    (("--foundation", "own_vf:make", "foundation.weights=dinov2.pth"), "foundation.weights: not used with --foundation own_vf:make"),
    (("--foundation", "own_vf:make", "foundation.input_range=legacy"), "foundation.input_range: not used with --foundation"),
    (("--foundation", "own_vf:mak"), "--foundation own_vf:mak: own_vf has no 'mak'"),
    (("foundation.pixels_per_patch=0",), "foundation.pixels_per_patch: must be above 0"),
    (("foundation.input_range=imagenet",), "foundation.input_range: expected one of auto, legacy, trained"),
])  # fmt: skip
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry"])
def test_what_is_refused_before_anything_is_written(start, own, out, capsys, more, said, dry):
    assert main(["train-tokenizer", *without_standin(start, out, *more), *dry]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and not out.exists()


def test_no_code_of_a_config_runs(start, own, tmp_path, out):
    """Not even its import: neither by use_vf nor by the reference's `target` keys."""
    (tmp_path / "own_vf.py").write_text("raise SystemExit(7)\n")
    config = (start.root / "tokenizer.yaml").read_text().replace("use_vf: standin", "use_vf: own_vf:make")
    (tmp_path / "theirs.yaml").write_text(config)
    for command in ("train-tokenizer", "extract", "evaluate"):
        assert main([command, "--config", str(tmp_path / "theirs.yaml"), "--images", str(start.images), "--out", str(out)]
                    if command != "train-tokenizer" else [command, "--config", str(tmp_path / "theirs.yaml")]) == 2  # fmt: skip
    with pytest.raises(BadInput, match="is an import path"):
        load_config(tmp_path / "theirs.yaml")
    assert "own_vf" not in sys.modules


def test_the_flag_is_in_the_help(capsys):
    assert main(["train-tokenizer", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--foundation MODULE:FACTORY" in said and "give it again to continue a run" in said
