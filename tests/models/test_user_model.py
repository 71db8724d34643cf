"""A user's own model by import path: found in the current folder too, checked with one image, one line for whatever fails."""

import sys

import pytest
import torch

from vavae_fast.errors import BadInput
from vavae_fast.models.foundation import FoundationModel
from vavae_fast.models.user_model import load_user_model

OWN = """
import torch
from torch import nn


class Averages(nn.Module):
    feature_dim = 6

    def __init__(self, channels=6, **buffers):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 8, 8)

    def forward(self, images):
        return self.conv(images)


class Tokens(Averages):
    def forward(self, images):
        return self.conv(images).flatten(2).transpose(1, 2)


class Whole(Averages):
    def forward(self, images):
        return self.conv(images).long()


class Broken(Averages):
    def forward(self, images):
        return self.conv(images) / 0


class Fails(Averages):
    def forward(self, images):
        raise KeyError("weights\\nsecond line")


class Nothing(Averages):
    def forward(self, images):
        pass


def no_dim():
    return nn.Conv2d(3, 6, 8, 8)


def wrong_dim():
    return Averages(channels=5)


def needs(argument):
    return Averages()


def not_a_module():
    return lambda images: images


number = 3


class Namespace:
    make = Averages
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to be in, with own_model.py and a module that fails; sys.path and the imported modules as they were afterwards."""
    (tmp_path / "own_model.py").write_text(OWN)
    (tmp_path / "broken_model.py").write_text("import torch\nraise RuntimeError('no GPU here')\n")
    (tmp_path / "importing_model.py").write_text("import missing_part\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("own_model", "broken_model", "importing_model"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("path", ["own_model:Averages", "own_model:Namespace.make"])
def test_a_users_model_is_laid_on_the_grid(here, path):
    model = FoundationModel(load_user_model(path, 32), grid=(2, 2), name=path)
    features = model(torch.rand(2, 3, 32, 32))
    assert features.shape == (2, 6, 2, 2) and model.feature_dim == 6 and model.name == path
    assert not features.requires_grad and not any(p.requires_grad for p in model.model.parameters()) and not model.state_dict()
    assert sys.path[-1] == str(here) and sys.path.count(str(here)) == 1


def test_an_installed_module_is_not_hidden_by_a_file_here(here):
    (here / "colorsys.py").write_text("raise AssertionError('hidden')\n")
    sys.modules.pop("colorsys", None)
    with pytest.raises(BadInput, match=r"colorsys:hsv_to_rgb: hsv_to_rgb\(\) failed \(TypeError"):
        load_user_model("colorsys:hsv_to_rgb", 32)


@pytest.mark.parametrize(("path", "words"), [
    ("own_model", ["not an import path; give package.module:factory"]),
    ("own_model.py:Averages()", ["not an import path"]),
    ("own_modle:Averages", ["no module 'own_modle' here or on Python's path; run where it lies, or set PYTHONPATH"]),
    ("broken_model:make", ["importing broken_model failed (RuntimeError: no GPU here)", "--debug shows where"]),
    ("importing_model:make", ["importing importing_model failed (ModuleNotFoundError: No module named 'missing_part')"]),
    ("own_model:Average", ["own_model has no 'Average'", "name a function or class"]),
    ("own_model:number", ["number is of type int"]),
    ("own_model:needs", ["needs() failed (TypeError: needs() missing 1 required positional argument: 'argument')"]),
    ("own_model:not_a_module", ["returned an object of type function", "expected a torch.nn.Module with .feature_dim and forward"]),
    ("own_model:no_dim", [".feature_dim of Conv2d is None"]),
    ("own_model:wrong_dim", ["one image gave features (1, 5, 4, 4), expected (1, 6, h, w)"]),
    ("own_model:Tokens", ["one image gave features (1, 16, 6), expected (1, 6, h, w)", "return maps, not tokens"]),
    ("own_model:Whole", ["its features are torch.int64"]),
    ("own_model:Broken", ["features that are not finite"]),
    ("own_model:Fails", ["its forward failed on one image (1, 3, 32, 32) (KeyError"]),
    ("own_model:Nothing", ["its forward returned an object of type NoneType"]),
])  # fmt: skip
def test_what_goes_wrong_is_one_line(here, path, words):
    with pytest.raises(BadInput) as caught:
        load_user_model(path, 32)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"--foundation {path}: ") and all(word in line for word in words), line
