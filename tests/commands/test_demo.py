"""The demo: its scores on digits that are known, and one quick run of everything it does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vavae_fast.cli import main
from vavae_fast.commands import demo_judge
from vavae_fast.commands.demo_stages import ARMS, DemoPlan
from vavae_fast.data import digits, open_images
from vavae_fast.evaluation import RBFClassifier

ROOT = Path(__file__).parents[2]


def small_plan(out: Path) -> DemoPlan:
    return DemoPlan(out, 0, ROOT / "configs", 4, (2, 4), 40, (2, 2), 2)


def test_judge_knows_real_digits_from_noise():
    """Held-out digits pass the bar that samples are measured by; noise and ten means do not."""
    train, labels = (torch.as_tensor(x) for x in digits("train"))
    train = train.double()
    classifier = RBFClassifier().fit(train, labels)
    test, test_labels = digits("test")
    real = demo_judge._scores(torch.as_tensor(test).double(), torch.as_tensor(test_labels), classifier, train, labels, train)
    assert real["agreement"] >= 0.98 and real["frechet"] < 30 and 0.9 < real["spread"] < 1.1
    noise = torch.rand(200, 8, 8, dtype=torch.float64) * 16
    bad = demo_judge._scores(noise, torch.arange(200) % 10, classifier, train, labels, train)
    assert bad["agreement"] < 0.3 and bad["frechet"] > 300
    means = torch.stack([train[labels == c].mean(0) for c in range(10)]).repeat(20, 1, 1)
    collapsed = demo_judge._scores(means, torch.arange(200) % 10, classifier, train, labels, train)
    assert collapsed["agreement"] == 1 and collapsed["spread"] < 0.01 and collapsed["frechet"] > 200


def test_samples_go_to_the_judge_unchanged(tmp_path):
    """What samples.npz holds of the real digits comes back as those digits."""
    images = open_images("builtin:digits/test", size=8)
    pixels = images.read(range(50))
    np.savez(tmp_path / "samples.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy(), arr_1=images.labels[:50].numpy())
    read, labels = demo_judge.read_samples(tmp_path)
    assert torch.equal(read, pixels) and torch.equal(labels, images.labels[:50])
    ours = demo_judge.digits_from_images(read, rounded=True)
    assert torch.equal(ours.to(torch.uint8), torch.as_tensor(digits("test")[0])[:50])


def test_verdict_follows_the_numbers(tmp_path):
    plan = small_plan(tmp_path)

    def metrics(values):
        scores = {arm: {"frechet": f, "agreement": a} for arm, (f, a) in zip(ARMS, values)}
        return {"arms": {arm: {"lightningdit": {str(b): {"unguided": scores[arm]} for b in plan.budgets}} for arm in ARMS}}

    for line in demo_judge.verdict(plan, metrics([(50, 0.9), (40, 0.95), (45, 0.97)])):
        assert "95.0% with VF alignment is better than 90.0% without and no better than 97.0% with the untrained control" in line
        assert "40.0 with VF alignment is better than 50.0 without and better than 45.0" in line
    for line in demo_judge.verdict(plan, metrics([(40, 0.95), (50, 0.9), (50, 0.9)])):
        assert "is no better than 95.0% without" in line and "is no better than 40.0 without and no better than 50.0" in line


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo"), "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out and not (tmp_path / "demo").exists()


def test_configs_elsewhere_are_one_line(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo"), "--configs", str(tmp_path)]) == 2
    assert "demo_tokenizer.yaml: no such config file" in capsys.readouterr().err


@pytest.mark.slow  # three arms of every stage, in processes of their own: about 40 s of CPU
def test_quick_demo_leaves_everything_and_goes_on(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "vavae_fast", "demo", "--out", str(out), "--quick", "--configs", str(ROOT / "configs")]
    first = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr
    for name in ("report.html", "samples.npz", "samples_unguided.npz", "samples.png", "overview.png", "metrics.json", "manifest.json"):
        assert (out / name).stat().st_size > 0
    with np.load(out / "samples.npz") as guided, np.load(out / "samples_unguided.npz") as unguided:
        assert guided["arr_0"].shape == (40, 16, 16, 3) and guided["arr_0"].dtype == np.uint8
        assert guided["arr_1"].tolist() == unguided["arr_1"].tolist() == [i % 10 for i in range(40)]
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["arms"]) == set(ARMS) and {s["stage"] for s in metrics["stages"]} >= {f"{arm}/lightningdit" for arm in ARMS}
    page = (out / "report.html").read_text()
    assert all(name in page for name in ARMS.values()) and "stand-in" in page and "http://" not in page.replace("http://www.w3.org", "")
    before = (out / "samples.npz").read_bytes()
    (out / "samples.npz").unlink()
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert (out / "samples.npz").read_bytes() == before, "what was there is kept, what was missing is made again"
