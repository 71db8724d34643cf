"""gpu.sh: what fails is a line and the rest goes on; called again it does what is missing; time that is up ends it in order."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from benchmarks import gpu
from benchmarks.records import lines
from vavae_fast.commands.bench_report import read

ROOT = Path(__file__).parents[2]


def rows_of(folder: Path) -> list[dict]:
    return [row for path in folder.glob("*.jsonl") for row in read(path)]


def section(bench, name, key, rows, log):
    """A section of one measurement that notes when it runs."""
    if bench.missing(key):
        bench.attempt(name, key, lambda: (log.append(key), rows())[1])


def fails():
    raise RuntimeError("an experiment that fails")


def test_what_fails_is_a_line_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    log = []
    sections = {
        "a": lambda bench: section(bench, "a", "a", fails, log),
        "b": lambda bench: fails(),
        "c": lambda bench: section(bench, "c", "c", lambda: [("c", dict(value=3))], log),
    }
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    bench = gpu.Bench(tmp_path, rehearse=True)
    gpu.run(bench, sections)
    first, second, third = rows_of(tmp_path)
    assert first["error"] == second["error"] == "RuntimeError: an experiment that fails"
    assert (first["key"], second["key"], third["key"], third["value"]) == ("a", "b", "c", 3)
    for row in (first, second, third):
        assert row["device"] == "rehearsal" and len(row["source"]) == 12 and row["time"].endswith("Z") and row["torch"]
    assert gpu.report(bench) == 1 and "FAILED   a: RuntimeError: an experiment that fails" in capsys.readouterr().out

    gpu.run(gpu.Bench(tmp_path, rehearse=True), sections)  # the same call again: what failed is tried again, what is done is not
    assert log == ["a", "c", "a"]


def test_rows_of_other_code_are_measured_again(tmp_path):
    bench = gpu.Bench(tmp_path, rehearse=True)
    bench.attempt("c", "c", lambda: [("c", {})])
    again = gpu.Bench(tmp_path, rehearse=True)
    assert not again.missing("c")
    again.records.stamp["source"] = "0" * 12
    assert again.missing("c") and not again.missing("c", any_source=True)
    assert gpu.Bench(tmp_path, rehearse=True, again=True).missing("c")


def test_rows_are_on_disk_before_the_next_begins(tmp_path):
    bench = gpu.Bench(tmp_path, rehearse=True)

    def measure():
        yield "first", {}
        assert [row["key"] for row in rows_of(tmp_path)] == ["first"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.attempt("a", "a", measure)
    assert [row["key"] for row in rows_of(tmp_path)] == ["first"]


def test_a_verdict_is_of_all_cases(tmp_path):
    """A worker that was stopped leaves a part, which is not done; a fault is an error, and so is silence."""
    path = tmp_path / "swiglu.jsonl"
    right, wrong, end = ('{"case": "a", "error": 0.5}\n', '{"case": "b", "fault": "AssertionError: out0"}\n', '{"case": "end"}\n')
    path.write_text(right + right + end)
    assert gpu._verdict(tmp_path, "swiglu") == ("correctness/swiglu", dict(name="swiglu", cases=2, complete=True, worst=0.5))
    path.write_text(right + '{"case": "b", "er')
    assert gpu._verdict(tmp_path, "swiglu") == ("correctness/swiglu/part", dict(name="swiglu", cases=1, complete=False, worst=0.5))
    path.write_text(right + wrong + end)
    with pytest.raises(RuntimeError, match="1 of 2 cases: b: AssertionError: out0"):
        gpu._verdict(tmp_path, "swiglu")
    path.unlink()
    with pytest.raises(RuntimeError, match="ended before the first case"):
        gpu._verdict(tmp_path, "swiglu")


def test_time_that_is_up_ends_the_call(tmp_path, monkeypatch, capsys):
    log = []
    monkeypatch.setattr(gpu, "SECTIONS", {"a": lambda bench: section(bench, "a", "a", lambda: [], log)})
    gpu.run(gpu.Bench(tmp_path, seconds=-1, rehearse=True), ["a"])
    assert log == [] and "time is up in section a" in capsys.readouterr().out


def test_a_measurement_that_hangs_is_cut_off(tmp_path, monkeypatch, capsys):
    """The alarm passes every `except Exception` on its way."""

    def hangs():
        try:
            time.sleep(20)
        except Exception:
            time.sleep(20)

    monkeypatch.setattr(gpu, "SECTIONS", {"a": lambda bench: bench.attempt("a", "a", hangs)})
    before = signal.signal(signal.SIGALRM, gpu._time_up)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        began = time.monotonic()
        gpu.run(gpu.Bench(tmp_path, rehearse=True), ["a"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 10 and "time is up in section a" in capsys.readouterr().out


def test_a_lost_context_goes_on_in_a_fresh_process_without_what_broke_it(tmp_path, monkeypatch):
    log, executed = [], []
    sections = {
        "a": lambda bench: section(bench, "a", "a", fails, log),
        "b": lambda bench: section(bench, "b", "b", lambda: [("b", {})], log),
    }
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    bench = gpu.Bench(tmp_path, rehearse=True)
    with monkeypatch.context() as broken:
        broken.setattr(bench, "_check_context", lambda: (_ for _ in ()).throw(gpu.ContextLost("an illegal memory access")))
        with pytest.raises(gpu.ContextLost):
            gpu.run(bench, sections)
    monkeypatch.setattr(os, "execv", lambda path, words: executed.append(words))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--began", "1.0", "--seconds", "9"])
    gpu._again_in_a_fresh_process(bench)
    assert executed[0][-5:] == ["--rehearse", "--seconds", "9", "--began", str(bench.began)]
    gpu.run(gpu.Bench(tmp_path, rehearse=True, began=bench.began), sections)
    assert log == ["a", "b"]


def test_killed_and_called_again_it_goes_on(tmp_path):
    """A rehearsal in a process of its own, killed in the middle of a section."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--rehearse", "--only", "unknowns", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 120
    while "unknowns/gemm" not in [row["key"] for row in rows_of(tmp_path)] and time.monotonic() < ends:
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = [row["key"] for row in rows_of(tmp_path)]
    assert "unknowns/gemm" in before
    with open(next(tmp_path.glob("*.jsonl")), "a") as file:
        file.write('{"section": "unkno')  # the line that was being written
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    after = [row["key"] for row in rows_of(tmp_path)]
    assert after.count("unknowns/gemm") == 1 and {f"unknowns/{name}" for name in gpu.UNKNOWNS} <= set(after)


def test_without_a_gpu_it_says_so(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([ROOT / "benchmarks" / "gpu.sh", "--out", tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "needs a GPU; --rehearse runs every section without one\n"
    assert not list(tmp_path.iterdir())


def test_wheels_beside_it_are_importable(tmp_path, monkeypatch, capsys):
    import zipfile

    with zipfile.ZipFile(tmp_path / "beside_it-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("beside_it/__init__.py", "found = True\n")
    monkeypatch.setattr(gpu, "WHEELS", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    gpu.unpack_wheels()
    import beside_it

    assert beside_it.found and "beside_it-1.0" in capsys.readouterr().out


def test_a_line_for_every_kind_of_row():
    rows = [
        dict(section="ceilings", key="ceilings/copy", name="copy", us=1.0, tbps=4.2),
        dict(section="unknowns", key="u", name="XL/1 cudnn", refused="no"),
        dict(section="correctness", key="c", name="swiglu", cases=3, worst=0.5, complete=True),
        dict(section="steps", key="s", name="train", batch=2, us={"fused": 1.0}, ours="fused", ratio={}, left_out={"eager": "out of memory"}),
        dict(section="ops", key="o", op="swiglu", shape="XL/1", variant="", mode="forward", us=dict(ours=3.0), ratio=dict(compile=1.25), tbps=3.9),
        dict(section="x", key="x", error="RuntimeError: no"),
    ]
    text = "\n".join(lines(rows))
    for words in ("4.2 TB/s", "worst 0.50", "out of memory", "3900 GB/s; 1.25 x compile", "FAILED   x: RuntimeError: no"):
        assert words in text
