"""Boards: what each package is told, by stand-ins with its names; TensorBoard's own files where it is installed."""

import importlib.util
import json
import math
import sys
import types

import pytest
from PIL import Image

from vavae_fast.errors import BadInput
from vavae_fast.training.boards import require_boards
from vavae_fast.training.log import RunLog

VALUES = dict(step=20, loss=0.5, lr=1e-4, images_per_second=10.0, data_wait=0.0)


class Recorder:
    """Notes every call of every method; `init` and constructors give it back."""

    def __init__(self):
        self.calls, self.id = [], "abc123"

    def __getattr__(self, name):
        return lambda *args, **words: self.calls.append((name, args, words)) or self

    def named(self, name):
        return [(args, words) for called, args, words in self.calls if called == name]


@pytest.fixture
def wandb(monkeypatch):
    module, recorder = types.ModuleType("wandb"), Recorder()
    module.init, module.Image, module.Error = recorder.init, lambda path: ("image", path), OSError
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return recorder


@pytest.fixture
def tensorboard(monkeypatch):
    module, recorder = types.ModuleType("torch.utils.tensorboard"), Recorder()
    module.SummaryWriter = recorder.SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return recorder


def picture(folder):
    path = folder / "samples" / "grid.png"
    path.parent.mkdir()
    Image.new("RGB", (6, 4), (255, 0, 0)).save(path)
    return path


def test_wandb_gets_values_over_step_pictures_and_the_config(tmp_path, wandb):
    log = RunLog(tmp_path / "run", "run", ("wandb",), {"optimizer": {"lr": 1e-4}})
    log.step(VALUES | dict(loss=math.nan), 100, 1.0)
    log.image(20, picture(tmp_path))
    log.close()
    ((_, words),) = wandb.named("init")
    assert words["project"] == "vavae-fast" and words["name"] == "run" and words["config"] == {"optimizer": {"lr": 1e-4}} and words["id"] is None
    assert wandb.named("define_metric") == [(("*",), {"step_metric": "step"})]
    (first,), (second,) = (args for args, _ in wandb.named("log"))
    assert first["step"] == 20 and math.isnan(first["loss"]) and second == {"samples": ("image", str(tmp_path / "samples" / "grid.png")), "step": 20}
    assert len(wandb.named("finish")) == 1


def test_wandb_continues_the_run_that_the_folder_names(tmp_path, wandb):
    for _ in range(2):
        RunLog(tmp_path / "run", "run", ("wandb",)).close()
    assert [words["id"] for _, words in wandb.named("init")] == [None, "abc123"]
    assert all(words["resume"] == "allow" for _, words in wandb.named("init"))


def test_wandb_that_cannot_start_is_one_line_with_its_cure(tmp_path, wandb, monkeypatch):
    def refuse(**words):
        raise sys.modules["wandb"].Error("no API key configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(BadInput, match=r"log.to=\[wandb\]: no API key configured; run wandb login, set WANDB_MODE=offline, or remove"):
        RunLog(tmp_path, "run", ("wandb",))


def test_tensorboard_gets_values_and_pictures_and_purges_what_comes_again(tmp_path, tensorboard):
    log = RunLog(tmp_path / "run", "run", ("tensorboard",))
    log.step(VALUES, 100, 1.0)
    log.image(20, picture(tmp_path))
    log.forget_after(10)
    log.close()
    folder = str(tmp_path / "run" / "tensorboard")
    assert tensorboard.named("SummaryWriter") == [((folder,), {}), ((folder,), {"purge_step": 11})]
    assert [args for args, _ in tensorboard.named("add_scalar")] == [(key, VALUES[key], 20) for key in VALUES if key != "step"]
    ((args, words),) = tensorboard.named("add_image")
    assert args[0] == "samples" and args[1].shape == (4, 6, 3) and args[2] == 20 and words == {"dataformats": "HWC"}
    assert len(tensorboard.named("close")) == 2


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_back_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, "run", ("tensorboard",))
    for step in (10, 20):
        log.step(VALUES | dict(step=step), 100, 1.0)
    log.forget_after(10)
    log.step(VALUES | dict(step=20, loss=0.25), 100, 1.0)
    log.image(20, picture(tmp_path))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 0.5), (20, 0.25)]
    assert events.Images("samples")[0].step == 20


@pytest.mark.parametrize("name, module, cure", [
    ("tensorboard", "torch.utils.tensorboard", r"pip install 'vavae-fast\[log\]'"), ("wandb", "wandb", "pip install wandb"),
])  # fmt: skip
def test_a_board_that_is_not_installed_is_named_with_its_cure(monkeypatch, name, module, cure):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadInput, match=rf"log.to=\[{name}\]: {name} is not installed; {cure}"):
        require_boards((name,))


def test_the_folder_has_its_own_record_beside_any_board(tmp_path, wandb):
    log = RunLog(tmp_path, "run", ("wandb",))
    log.step(VALUES, 100, 1.0)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == VALUES
