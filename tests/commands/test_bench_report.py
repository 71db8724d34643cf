"""bench-report: measurements and nothing else reach the README; what is missing is called not yet measured; a stale README is found."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vavae_fast.cli import main
from vavae_fast.commands import bench_report
from vavae_fast.commands.bench_report import BEGIN, END

GUARDS = """
ops:
  swiglu: {gpu: {XL/1: {forward+backward: {compile: 1.0, roofline: 0.9}}}}
  rms_norm: {gpu: {"XL/1, weight": {forward: {compile: 1.0}}}}
  adamw_ema: {gpu: {XL/1: {step: {loop: 2.6}}}}
steps:
  train XL/1, batch 256: {compiled blocks: 1.25}
"""
STAMP = dict(device="NVIDIA H100", time="2026-01-02T03:04:05Z", source="a" * 12)
SWIGLU = dict(STAMP, section="ops", key="ops/swiglu/XL/1/plain/forward+backward", ratio=dict(compile=1.07, eager=2.2), roofline=0.93)
STEP = dict(STAMP, section="steps", key="steps/train XL/1, batch 256", ours="fused", batch=128, ratio={"compiled blocks": 1.28})


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "guards.yaml").write_text(GUARDS)
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return tmp_path


def measured(checkout: Path, *rows: dict, name: str = "a.jsonl") -> None:
    (checkout / "benchmarks" / "results" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(checkout: Path) -> str:
    assert main(["bench-report", "--root", str(checkout)]) == 0
    text = (checkout / "README.md").read_text()
    assert text.startswith("before\n" + BEGIN) and text.endswith(END + "\nafter\n") and "old" not in text
    return text


def test_nothing_measured_is_said(checkout):
    text = table(checkout)
    assert "| `swiglu` | XL/1 | forward+backward | not yet measured | not yet measured | compile ≥ 1, copy bandwidth ≥ 90 % |" in text
    assert "| train XL/1, batch 256 | – | not yet measured | compiled blocks ≥ 1.25 |" in text
    assert not (checkout / "docs").exists()


def test_measurements_reach_the_tables_and_a_plot(checkout):
    machine = dict(STAMP, section="machine", key="machine", torch="2.11.0", triton="3.6.0")
    measured(checkout, machine, SWIGLU, STEP)
    text = table(checkout)
    assert "**On one NVIDIA H100** (torch 2.11.0, triton 3.6.0, 2026-01-02;" in text
    assert "| `swiglu` | XL/1 | forward+backward | 93 % | compile 1.07, eager 2.20 |" in text
    assert "| train XL/1, batch 256 | fused, batch 128 | compiled blocks 1.28 |" in text
    assert "| `rms_norm` | XL/1, weight | forward | not yet measured | not yet measured |" in text
    plot = ElementTree.parse(checkout / "docs" / "bench-NVIDIA-H100.svg").getroot()
    (bar,) = plot.iter("{http://www.w3.org/2000/svg}rect")
    assert float(bar.get("width")) == pytest.approx(0.93 * (760 - 360 - 60), abs=0.06)
    assert "(docs/bench-NVIDIA-H100.svg)" in text


def test_the_newest_counts_and_a_failure_never_hides_a_measurement(checkout):
    newer = dict(SWIGLU, time="2026-02-01T00:00:00Z", ratio=dict(compile=1.11))
    failure = dict(STAMP, section="ops", key=SWIGLU["key"], time="2026-03-01T00:00:00Z", error="RuntimeError: a | b")
    other = dict(failure, key="ops/rms_norm/XL/1/weight/forward")
    measured(checkout, newer, failure, other, name="b.jsonl")
    measured(checkout, SWIGLU, name="c.jsonl")
    text = table(checkout)
    assert "compile 1.11" in text and "compile 1.07" not in text
    assert "failed: RuntimeError: a / b" in text


def test_a_rehearsal_is_no_measurement(checkout):
    measured(checkout, dict(SWIGLU, device=bench_report.REHEARSAL))
    assert "1.07" not in table(checkout)


def test_check_finds_a_stale_readme_and_writes_nothing(checkout, capsys):
    before = (checkout / "README.md").read_text()
    assert main(["bench-report", "--root", str(checkout), "--check"]) == 2
    assert (checkout / "README.md").read_text() == before and "README.md: not what" in capsys.readouterr().err
    table(checkout)
    assert main(["bench-report", "--root", str(checkout), "--check"]) == 0
    measured(checkout, SWIGLU)
    assert main(["bench-report", "--root", str(checkout), "--check"]) == 2


def test_a_line_that_a_stopped_run_left_is_no_row_and_any_other_is_an_error(checkout, capsys):
    path = checkout / "benchmarks" / "results" / "a.jsonl"
    path.write_text(json.dumps(SWIGLU) + '\n{"device": "NV')
    assert "compile 1.07" in table(checkout)
    path.write_text('{"device": "NV\n' + json.dumps(SWIGLU) + "\n")
    assert main(["bench-report", "--root", str(checkout)]) == 2
    assert "a.jsonl, line 1: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "README.md").unlink(), "README.md: no such file"),
        (lambda root: (root / "README.md").write_text("no marks"), "README.md: no " + BEGIN),
        (lambda root: (root / "README.md").write_text(BEGIN), "README.md: no " + BEGIN),
        (lambda root: (root / "benchmarks" / "guards.yaml").write_text("ops: 3"), "guards.yaml: "),
        (lambda root: (root / "benchmarks" / "results" / "demo-cpu.json").write_text("{"), "demo-cpu.json: not JSON"),
    ],
)
def test_bad_input_is_one_line(checkout, capsys, spoil, words):
    spoil(checkout)
    assert main(["bench-report", "--root", str(checkout)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_record_takes_a_demos_result_in(checkout, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    assert main(["bench-report", "--root", str(checkout), "--record", str(run)]) == 2
    assert "not the folder of a finished demo" in capsys.readouterr().err
    scores = dict(unguided=dict(agreement=0.9, frechet=40.0), guided=dict(agreement=1.0))
    arm = dict(reconstruction=dict(psnr=20.0), lightningdit={"300": scores})
    metrics = dict(time="2026-01-02T03:04:05", versions=dict(torch="2.13"), seed=7, protocol="", arms=dict.fromkeys(bench_report.ARMS, arm),
                   held_out=dict(frechet=17.0), shown={}, stages=[])  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "manifest.json").write_text(json.dumps(dict(seconds=12.3)))
    assert main(["bench-report", "--root", str(checkout), "--record", str(run)]) == 0
    (result,) = (checkout / "benchmarks" / "results").glob("demo-*.json")
    assert json.loads(result.read_text())["seconds"] == 12.3
    text = (checkout / "README.md").read_text()
    assert "seed 7" in text and "| none | 20.0 dB | 90.0 % / 40.0 | 100.0 % |" in text
    assert main(["bench-report", "--root", str(checkout), "--check"]) == 0


def test_the_experiments_of_reproduce_are_recorded_and_told(checkout, tmp_path):
    """Their claims, early and at the end, with what they were made on; the file is named by scale and device."""
    claim = dict(experiment="dilemma", claim="VF helps", score="Fréchet", early="seen (+8.0, +9.0)", at_end="not seen, one seed (-1.0)", seeds=2)
    told = dict(scale="demo", protocol="Small digits.", early_steps=100, claims=[claim], versions={"torch": "2.13.0"}, time="2026-01-02T03")
    (tmp_path / "rep").mkdir()
    (tmp_path / "rep" / "summary.json").write_text(json.dumps(told))
    assert main(["bench-report", "--root", str(checkout), "--record", str(tmp_path / "rep")]) == 0
    (kept,) = (checkout / "benchmarks" / "results").glob("reproduce-demo-*.json")
    assert json.loads(kept.read_text())["claims"] == [claim]
    text = (checkout / "README.md").read_text()
    assert "| experiment | claim of the paper | by | after 100 steps | at the end | scale | seeds |" in text and "Small digits." in text
    assert "| dilemma | VF helps | Fréchet | seen (+8.0, +9.0) | not seen, one seed (-1.0) | demo | 2 |" in text
