"""reproduce: its plan, a run of a few steps from stand-ins to page, what is kept, what is done again."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vavae_fast.cli import main
from vavae_fast.commands.invoke import parse
from vavae_fast.experiments import catalogue, runner
from vavae_fast.experiments.judges import InceptionJudge
from vavae_fast.experiments.pool import Done
from vavae_fast.experiments.scale import Files, Scale
from vavae_fast.experiments.scales import cifar, demo
from vavae_fast.experiments.standins import Given
from vavae_fast.experiments.work import Lab, in_order, perform

ROOT = Path(__file__).parents[2]
CONFIGS = ["--configs", str(ROOT / "configs")]


def test_dry_run_tells_arms_sharing_and_time_and_writes_nothing(tmp_path, capsys):
    assert main(["reproduce", "all", "--dry-run", "--out", str(tmp_path / "out"), *CONFIGS]) == 0
    said = capsys.readouterr().out
    assert "13 experiments" in said and "CPU hours" in said and "pieces of work are used by several experiments" in said
    assert "system: needs --scale imagenet" in said and "stand" in said.lower() and said.count("d16, no VF") >= 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, culprit",
    [
        (["dilema"], "did you mean dilemma?"),
        (["system"], "system: needs --scale imagenet and the published files"),
        (["dilemma", "--seeds", "0"], "--seeds: must be 1 or more"),
        (["dilemma", "--budget", "0"], "--budget: must be above 0"),
        (["dilemma", "--scale", "cifar"], "--data: missing"),
        (["dilemma", "--published", "vavae"], "--published: expected NAME=PATH"),
        (["dilemma", "--foundation", "mae=nowhere"], "nowhere does not exist"),
        (["dilemma", "--configs", "nowhere"], "nowhere: no such folder"),
        (["dilemma", "--scale", "imagenet", "--quick"], "--quick"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(tmp_path, capsys, monkeypatch, words, culprit):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *words, *([] if "--configs" in words else CONFIGS)]) == 2
    assert culprit in capsys.readouterr().err and not any(tmp_path.iterdir())


def in_this_process(lab: Lab, scale: Scale, names: list[str], monkeypatch) -> list[str]:
    """Run experiments without a pool; returns the keys of what was done, in order."""
    done = []

    def run_tasks(tasks, processes, finished, failed=None):
        for task in tasks:
            task.function(*task.arguments)
            done.append(task.name)
            finished(Done(task.name, None, 0.0, 0.0, 0.0))

    monkeypatch.setattr(runner, "run_tasks", run_tasks)
    planned = runner.plan_experiments([catalogue.experiment(name) for name in names], scale, [0])
    runner.run_experiments(lab, scale, planned, 1)
    return done


def test_a_quick_experiment_from_stand_ins_to_page(tmp_path, monkeypatch):
    """unlabeled: two tokenizers, latents with and without labels, four LightningDiTs; then nothing is done again but what is missing."""
    lab, scale = Lab(tmp_path), demo(ROOT / "configs", Files(), 1.0, True)
    done = in_this_process(lab, scale, ["unlabeled"], monkeypatch)
    expected = {"classifier": 1, "encoder": 1, "tokenizer": 2, "latents": 4, "images": 1, "lightningdit": 4}
    assert Counter(key.split("-")[0] for key in done) == expected
    told = json.loads((tmp_path / "unlabeled" / "results.json").read_text())
    assert told["quick"] and all(seed["scores"] for seeds in told["arms"].values() for seed in seeds)
    labelled, not_labelled = (told["arms"][name][0]["scores"] for name in ("labels, no VF", "no labels, no VF"))
    assert {"frechet", "agreement", "psnr", "rfrechet", "2", "4"} <= set(labelled) and labelled["frechet"] == labelled["4"]["frechet"]
    assert 0 <= not_labelled["balance"] <= 1 and "agreement" not in not_labelled
    page = (tmp_path / "unlabeled" / "report.html").read_text()
    assert "its numbers mean nothing" in page and "Stand-ins" in page and "data:image/png" in page
    assert "unlabeled/report.html" in (tmp_path / "report.html").read_text() and "| unlabeled |" in (tmp_path / "summary.md").read_text()
    arms = catalogue.experiment("unlabeled").arms(scale, 0)
    last = arms["no labels, no VF"]
    assert [path.name for path in (last.run_folder(lab) / "checkpoints").glob("step_*")] == ["step_00000004"], "only the last is kept"

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "arms").glob("*/result.json")}
    scores = json.loads((lab.folder(last) / "result.json").read_text())["scores"]
    (lab.folder(last) / "result.json").unlink()
    assert in_this_process(lab, scale, ["unlabeled"], monkeypatch) == [last.key]
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "arms").glob("*/result.json")}
    assert {path for path in before if before[path] != after[path]} == {lab.folder(last) / "result.json"}
    assert json.loads((lab.folder(last) / "result.json").read_text())["scores"] == scores, "from the samples that were there"


def test_first_steps_of_cifar_at_tiny_size(tmp_path):
    """An arm of 32-pixel images in class folders: encoder, both classifiers, tokenizer, latents, LightningDiT, the classifier's scores."""
    generator = np.random.default_rng(0)
    for split in ("train", "valid"):
        for label in range(10):
            folder = tmp_path / split / f"class{label}"
            folder.mkdir(parents=True)
            for k in range(4):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{k}.png")
    scale = cifar(ROOT / "configs", Files(str(tmp_path / "train"), str(tmp_path / "valid")), 1.0, True)
    lab, arm = Lab(tmp_path / "out"), scale.arm(0, 4, "contrastive")
    for work in in_order([arm]):
        perform(lab, work)
    scores = lab.result(arm)["scores"]["4"]
    assert scores["frechet"] > 0 and 0 <= scores["agreement"] <= 1
    reconstruction = lab.result(arm.latents.tokenizer)["scores"]
    assert set(reconstruction) == {"psnr", "ssim", "rfrechet"} and 0 < reconstruction["psnr"] < 60
    assert len({work.key for work in in_order([arm]) if work.kind == "classifier"}) == 2, "the judge is not the loss"


def test_given_weights_and_published_configs_become_words_of_the_commands(scales, monkeypatch, tmp_path):
    """At ImageNet's size nothing can be trained here: what would be run is parsed and its config loaded."""
    import importlib

    from vavae_fast.config import load_config

    ran, scale = [], scales["imagenet"]

    def run(self, command, *words):
        module = importlib.import_module("vavae_fast.commands." + command.replace("-", "_"))
        args = parse(module, command, [str(word) for word in words])
        ran.append((command, args))
        if hasattr(module, "CONFIG") and Path(args.config).is_file():
            load_config(args.config, tuple(args.overrides), kind=module.CONFIG)
        if getattr(args, "json", None):
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(dict.fromkeys((*args.metrics.split(","), "protocol"), 1.5)))

    monkeypatch.setattr(Lab, "run", run)
    lab, arm = Lab(tmp_path), scale.arm(0, 32, "dinov2")
    tokenizer = arm.latents.tokenizer
    assert isinstance(tokenizer.foundation, Given) and isinstance(scale.judge, InceptionJudge)
    assert tokenizer.do(lab) == {"rfrechet": 1.5, "psnr": 1.5, "ssim": 1.5, "lpips": 1.5}
    assert arm.latents.do(lab) == {} and set(arm.do(lab)) == {str(mark) for mark in scale.marks}
    system = catalogue.experiment("system").arms(scale, 0)
    assert all(work.do(lab)["final"]["frechet"] == 1.5 for work in system.values()) and len(system) == 4
    commands = [command for command, _ in ran]
    assert commands[:4] == ["train-tokenizer", "evaluate", "extract", "train"] and commands.count("sample") == len(scale.marks) + 4
    words = dict(ran)["train-tokenizer"].overrides
    assert any(word.startswith("foundation.weights=") and word.endswith("dinov2") for word in words) and "train.fused=true" in words
    presets = [args.preset for command, args in ran if command == "sample"][-4:]
    assert presets == [None, "paper-64ep", None, "paper-800ep"]


def test_a_larger_image_keeps_its_judge(scales):
    """resolution: twice the side, the same config file, latents of twice the side."""
    for scale in scales.values():
        arms = catalogue.experiment("resolution").arms(scale, 0)
        sizes = {arm.latents.tokenizer.images.size for arm in arms.values()}
        assert sizes == {scale.images.size, 2 * scale.images.size}
        assert all(arm.facts()["config"]["data"]["image_size"] == arm.latents.tokenizer.images.size for arm in arms.values())
        assert replace(scale, samples=1).samples == 1


@pytest.mark.slow  # four arms in processes of their own, killed once: about 40 s of CPU
def test_a_killed_run_goes_on_and_finished_arms_stay(tmp_path):
    command = [sys.executable, "-m", "vavae_fast", "reproduce", "unlabeled", "--quick", "--seeds", "1", "--out", str(tmp_path / "out"), *CONFIGS]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 300
    while len(list((tmp_path / "out").glob("arms/tokenizer-*/result.json"))) < 1 and time.monotonic() < end:
        time.sleep(0.2)
    first.kill()
    first.wait()
    held = {path: path.read_bytes() for path in (tmp_path / "out").glob("arms/*/result.json")}
    assert len(held) >= 3
    time.sleep(3)  # workers that outlived their parent leave after what they do
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert all(path.read_bytes() == data for path, data in held.items())
    told = json.loads((tmp_path / "out" / "unlabeled" / "results.json").read_text())
    assert len(told["arms"]) == 4 and all(seed["scores"] for seeds in told["arms"].values() for seed in seeds)
    shutil.rmtree(tmp_path / "out")


@pytest.mark.slow  # five tokenizers of a few steps, their latents and t-SNE: about 30 s of CPU
def test_latents_become_pictures(tmp_path, monkeypatch):
    lab, scale = Lab(tmp_path), demo(ROOT / "configs", Files(), 1.0, True)
    in_this_process(lab, scale, ["latents"], monkeypatch)
    told = json.loads((tmp_path / "latents" / "results.json").read_text())
    for name, ((seed,)) in ((name, seeds) for name, seeds in told["arms"].items()):
        assert 0 < seed["scores"]["class_share"] < 1 and 1 <= seed["scores"]["effective_dimension"] <= 16, name
        assert seed["scores"]["density_cv"] > 0
    assert (tmp_path / "latents" / "report.html").read_text().count("data:image/png") == 10, "colours and t-SNE of each arm"
