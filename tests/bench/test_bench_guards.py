"""Guards: read strictly, judged, and a bench that falls under one fails."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from benchmarks import guards

ROOT = Path(__file__).parents[2]


def shipped() -> dict:
    return yaml.safe_load(guards.FILE.read_text())


def written(folder: Path, content) -> Path:
    path = folder / "guards.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def bench(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "benchmarks/test_guards.py", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_shipped_file_guards_every_operator():
    found = guards.read()
    assert set(found.ops) == {*found.counted, guards.checked_apart}
    assert found.ops["gate_add_norm_modulate"]["XL/1, rms"]["forward+backward"] == dict(compile=1.5, eager=6.5, roofline=0.85)
    assert found.steps["train XL/1, batch 256"]["compiled blocks"] == 1.25


def change(place: str, value):
    """The shipped file with one entry set, or taken out where value is None."""
    content = shipped()
    *path, last = place.split(".")
    table = content
    for key in path:
        table = table[key]
    if value is None:
        del table[last]
    else:
        table[last] = value
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("ops: [", ["while parsing"]),
        ("3", ["the file", "expected a table, found 3"]),
        (lambda: change("op", {}), ["the file", "unknown key 'op'", "ops, steps, host"]),
        (lambda: change("ops.swish", {}), ["ops: unknown key 'swish'", "swiglu"]),
        (lambda: change("ops.swiglu", None), ["ops: an operator has no guard: swiglu; add ops.swiglu"]),
        (lambda: change("ops.swiglu.gpu", None), ["ops.swiglu: a key is missing: gpu; add ops.swiglu.gpu"]),
        (lambda: change("ops.swiglu.launchs", [1, 1]), ["ops.swiglu: unknown key 'launchs'"]),
        (lambda: change("ops.swiglu.launches", 1), ["ops.swiglu.launches: expected [forward, backward], found 1"]),
        (lambda: change("ops.swiglu.bytes", "few"), ["ops.swiglu.bytes: expected a number, 0 or more, found 'few'"]),
        (lambda: change("ops.swiglu.gpu", {"XXL/1": {}}), ["ops.swiglu.gpu: unknown key 'XXL/1'", "XL/1"]),
        (lambda: change("ops.swiglu.gpu", {"XL/1": {"forwards": {}}}), ["ops.swiglu.gpu.XL/1: unknown key 'forwards'"]),
        (lambda: change("ops.swiglu.gpu", {"XL/1": {"forward": {"compiled": 1}}}), ["unknown key 'compiled'; known: eager, compile"]),
        (lambda: change("ops.swiglu.gpu", {"XL/1": {"forward": {"compile": True}}}), ["expected a number", "True"]),
        (lambda: change("steps.train XS/1, batch 2", {}), ["steps: unknown key 'train XS/1, batch 2'"]),
        (lambda: change("steps.block XL/1, batch 256", {"eagerly": 1}), ["steps.block XL/1, batch 256: unknown key 'eagerly'"]),
        (lambda: change("host.latents_over_plain", float("nan")), ["host.latents_over_plain: expected a number"]),
    ],
)
def test_a_file_that_cannot_be_meant_is_one_line(tmp_path, content, words):
    path = written(tmp_path, content() if callable(content) else content)
    with pytest.raises(guards.GuardError) as error:
        guards.read(path)
    line = str(error.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    assert all(word in line for word in words), line


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(guards.GuardError, match="No such file"):
        guards.read(tmp_path / "none.yaml")


def row(**values):
    case = dict(section="ops", op="swiglu", shape="XL/1", variant="", mode="forward+backward", key="ops/swiglu/XL/1/plain/forward+backward")
    return {**case, "ratio": dict(compile=1.2), "roofline": 0.95, "left_out": {}, **values}


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        (dict(), None),
        (dict(ratio=dict(compile=1.0)), None),
        (dict(ratio=dict(compile=0.99)), "0.990 x compile, the guard is 1.0"),
        (dict(ratio=dict(compile=float("nan"))), "nan x compile, the guard is 1.0"),
        (dict(roofline=0.85), "0.850 of the copy bandwidth, the guard is 0.9"),
        (dict(ratio={}, left_out=dict(compile="out of memory")), "no compile to hold the guard of 1.0 against: out of memory"),
        (dict(shape="B/1", ratio=dict(compile=0.1)), None),
        (dict(mode="forward", ratio=dict(compile=0.1)), None),
    ],
)
def test_judgement(values, fault):
    """Only the guarded case and pass are held to a guard; what could not be measured is under it too."""
    found = guards.read().faults([row(**values)])
    assert found == ([] if fault is None else [f"ops/swiglu/XL/1/plain/forward+backward: {fault}"])


def test_judgement_of_steps():
    step = dict(section="steps", key="steps/a", name="train XL/1, batch 256", ratio={"compiled blocks": 1.3})
    other = dict(step, name="train tiny, batch 2", ratio={"compiled blocks": 0.1})
    assert guards.read().faults([step, other]) == []
    assert guards.read().faults([dict(step, ratio={"compiled blocks": 1.2})]) == ["steps/a: 1.200 x compiled blocks, the guard is 1.25"]


def test_a_guard_that_is_not_met_fails_the_bench(tmp_path):
    path = written(tmp_path, change("ops.swiglu.launches", [0, 1]))
    failed = bench("--guards", str(path), "-k", "test_counts and (swiglu or rms_norm)")
    assert failed.returncode == 1 and "swiglu forward: launches 1, the guard is 0" in failed.stdout
    assert "1 failed, 1 passed" in failed.stdout


def test_an_unknown_key_stops_the_bench_with_one_line(tmp_path):
    path = written(tmp_path, change("ops.swish", {}))
    refused = bench("--guards", str(path))
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert [line for line in refused.stderr.splitlines() if line.strip()][0].startswith(f"ERROR: {path}: ops: unknown key 'swish'")
