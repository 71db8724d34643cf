"""The bench on a GPU in one call, most valuable first; called again it does what is missing.

    benchmarks/gpu.sh [--out FOLDER] [--seconds 500] [--only SECTION ...] [--again] [--rehearse]

Every measurement is a line of <out>/<device>-<date>.jsonl the moment it is made, and a short table ends the output. A measurement that
fails is a line that says why, and the next one runs; where it has broken the CUDA context, in a fresh process. Whatever benchmarks/results
or <out> holds of this device and this code is not measured again, unless --again. Needs no network: what benchmarks/wheels holds is
importable during the call. VAVAE_REFERENCE names a checkout of the public LightningDiT, for its own modules; VAVAE_DIT, VAVAE_SIT and
VAVAE_REPA those of the code bases that examples/ patches. --rehearse runs every section on a CPU with tiny shapes, kernels in Triton's
interpreter.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from benchmarks import checks, elastic, operators, optimizers, patched, sampling, steps, tokenizer_steps, tuning
from benchmarks.ceilings import UNKNOWNS, Rates, bounds, ceilings
from benchmarks.guards import read as read_guards
from benchmarks.records import RESULTS, ROOT, Records, Row, lines, smi
from vavae_fast.commands.bench_report import read

WHEELS = ROOT / "benchmarks" / "wheels"
CORRECTNESS_SECONDS = 150
GRACE = 20  # seconds after the call's own in which a measurement that hangs is cut off


class TimeUp(BaseException):
    """The call's seconds are spent; what is missing is for the next call. No `except Exception` of a measurement may hold it up."""


class ContextLost(Exception):
    """The CUDA context is broken: no call of this process will succeed again."""


class Bench:
    """What every section needs: the device, the records, the clock, and the ceilings once they are measured.

    began: seconds since the epoch at which the call began, in this process or in one whose context broke.
    """

    def __init__(self, out: Path, seconds: float = 500, rehearse: bool = False, again: bool = False, began: float | None = None):
        self.rehearse, self.again = rehearse, again and began is None
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.began = time.time() if began is None else began
        self.seconds = seconds
        self.records = Records(self.device, out, rehearsal=rehearse)
        self.timing = operators.REHEARSAL if rehearse else operators.Settings()
        reference = os.environ.get("VAVAE_REFERENCE")
        self.step_timing = replace(steps.REHEARSAL if rehearse else steps.Settings(), reference=Path(reference) if reference else None)
        self.ceilings: dict[str, float] = {}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began))
        self.failed = {row["key"] for row in self.records.before if "error" in row and began is not None and row["time"] >= stamp}

    @property
    def left(self) -> float:
        return self.began + self.seconds - time.time()

    def missing(self, key: str, any_source: bool = False) -> bool:
        """Whether `key` is to be measured: not done before, and not what broke the process before this one."""
        return key not in self.failed and (self.again or not self.records.done(key, any_source))

    def attempt(self, section: str, key: str, measure: Callable[[], Iterable[tuple[str, Row]]], needs: float = 0.0) -> bool:
        """Write the rows of `measure` as (key, row), or a row with the fault under `key`. `TimeUp` if less than `needs` seconds are left."""
        if self.left < (0.0 if self.rehearse else needs):
            raise TimeUp(section)
        began, fault = time.monotonic(), None
        seconds = lambda: round(time.monotonic() - began, 1)
        try:
            for row_key, row in measure():
                self.records.add(section, row_key, **row, seconds=seconds())
        except Exception as error:  # whatever it is, the next measurement runs
            traceback.print_exc(limit=-4)
            fault = f"{type(error).__name__}: {str(error)[:400]}"
            self.records.add(section, key, error=fault, seconds=seconds())
        print(f"{time.strftime('%H:%M:%S')} {'FAIL' if fault else 'ok  '} {seconds():6.1f} s  {key}", flush=True)
        self._check_context()
        return fault is None

    def _check_context(self) -> None:
        """`ContextLost` after an illegal access or a launch that failed: the device's errors stay with the process."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise ContextLost(str(error).splitlines()[0]) from error


# -- sections, most valuable first -----------------------------------------------------------------------------------


def machine(bench: Bench) -> None:
    bench.attempt("machine", "machine", lambda: [("machine", dict(bench.records.stamp, wheels=sorted(p.name for p in WHEELS.glob("*.whl"))))])


def measured_ceilings(bench: Bench) -> None:
    """In every call: ratios to a ceiling are ratios within one run."""

    def measure() -> list[tuple[str, Row]]:
        rows = list(ceilings(Rates(bench.device, bench.rehearse)))
        bench.ceilings = bounds(rows)
        clocks = smi("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
        return [*((f"ceilings/{row['name']}", row) for row in rows), ("ceilings/clocks", dict(name="clocks", **clocks))]

    bench.attempt("ceilings", "ceilings", measure)


def unknowns(bench: Bench) -> None:
    """Once a device, whatever the code: they are the device's and PyTorch's."""
    for name, rows in UNKNOWNS.items():
        if bench.missing(f"unknowns/{name}", any_source=True):

            def measure(name: str = name, rows: Callable = rows) -> Iterable[tuple[str, Row]]:
                for row in rows(Rates(bench.device, bench.rehearse)):
                    yield f"unknowns/{name}/{row['name']}", row
                yield f"unknowns/{name}", {}

            bench.attempt("unknowns", f"unknowns/{name}", measure, needs=40)


def correctness(bench: Bench) -> None:
    """Each operator in a process of its own: kernels compile side by side, and an illegal access breaks the context of one of them alone."""
    names = [name for name in checks.names() if bench.missing(f"correctness/{name}")]
    if not names:
        return
    count = 2 if bench.rehearse else len(names)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", *(["--rehearse"] if bench.rehearse else [])]
        workers = [subprocess.Popen([*command, "--check", *names[n::count], "--out", folder], cwd=ROOT) for n in range(count)]
        try:
            ends = time.monotonic() + (600 if bench.rehearse else min(CORRECTNESS_SECONDS, bench.left))
            for worker in workers:
                try:
                    worker.wait(max(0.1, ends - time.monotonic()))
                except subprocess.TimeoutExpired:
                    pass
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        for name in names:
            bench.attempt("correctness", f"correctness/{name}", lambda name=name: [_verdict(Path(folder), name)])


def _verdict(folder: Path, name: str) -> tuple[str, Row]:
    """One row of all findings of an operator; RuntimeError where something is wrong, or nothing was found out.

    Its key is the operator's own once all cases were run; a part of them does not count as done.
    """
    path = folder / f"{name}.jsonl"
    found = read(path) if path.is_file() else []
    complete = bool(found) and found[-1].get("case") == "end"
    cases = [finding for finding in found if finding["case"] != "end"]
    faults = [f"{finding['case']}: {finding['fault']}" for finding in cases if "fault" in finding]
    if faults or not cases:
        raise RuntimeError(f"{len(faults)} of {len(cases)} cases: {faults[0]}" if faults else "its process ended before the first case")
    key = f"correctness/{name}" + ("" if complete else "/part")
    return key, dict(name=name, cases=len(cases), complete=complete, worst=max(finding["error"] for finding in cases))


def check(names: list[str], folder: Path, rehearse: bool) -> None:
    """What a worker of `correctness` does."""
    device = torch.device("cpu" if rehearse else "cuda")
    for name in names:
        with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
            for finding in checks.findings(name, device, rehearse):
                print(json.dumps(finding), file=file, flush=True)
            print(json.dumps(dict(case="end")), file=file, flush=True)


def _compare(bench: Bench, step: steps.Step, profile: bool = False) -> None:
    key = f"steps/{step.name}"
    if not bench.missing(key):
        return
    if reason := step.lacking(bench.device, bench.step_timing):
        print(f"left out  {key}: {reason}", flush=True)
        return
    row = lambda: steps.compare(step, bench.device, bench.step_timing, profile)
    bench.attempt("steps", key, lambda: [(key, row())], needs=step.needs)


def main_step(bench: Bench) -> None:
    _compare(bench, steps.rehearsal(steps.MAIN) if bench.rehearse else steps.MAIN, profile=True)


def other_steps(bench: Bench) -> None:
    for step in (steps.REHEARSED if bench.rehearse else steps.STEPS)[1:]:
        _compare(bench, step)


def tokenizer(bench: Bench) -> None:
    """Its training step, encoding, decoding, and the forms of doubling."""
    for step in tokenizer_steps.REHEARSED if bench.rehearse else tokenizer_steps.STEPS:
        _compare(bench, step, profile=step is tokenizer_steps.MAIN)


def whole_draws(bench: Bench) -> None:
    """Sampling with the published settings, decoding included, and the parts of a step."""
    for step in sampling.REHEARSED if bench.rehearse else sampling.STEPS:
        _compare(bench, step)


def other_code(bench: Bench) -> None:
    """DiT, SiT, REPA and diffusers before and after patch()."""
    for step in patched.REHEARSED if bench.rehearse else patched.STEPS:
        _compare(bench, step)


def exactness(bench: Bench) -> None:
    """What train.deterministic: elastic costs a step."""
    for step in elastic.REHEARSED if bench.rehearse else elastic.STEPS:
        _compare(bench, step)


def _measure(bench: Bench, case: operators.Case) -> None:
    last = f"{case.key}/{'backward' if case.spec.gradients else 'forward'}"
    if bench.missing(last):
        rows = lambda: operators.measure(case, bench.device, bench.timing, bench.ceilings)
        bench.attempt("ops", last, lambda: [(f"{case.key}/{row['mode']}", row) for row in rows()], needs=25)


def first_operators(bench: Bench) -> None:
    """The optimizer, and every operator as the published XL/1 runs it."""
    if bench.missing(optimizers.KEY):
        model = None if bench.rehearse else "LightningDiT-XL/1"
        row = lambda: optimizers.measure(model, bench.device, bench.timing.rounds, bench.timing.seconds, bench.ceilings)
        bench.attempt("ops", optimizers.KEY, lambda: [(optimizers.KEY, row())], needs=15)
    for case in operators.rehearsal_cases() if bench.rehearse else operators.cases():
        if bench.rehearse or case.first:
            _measure(bench, case)


def other_operators(bench: Bench) -> None:
    """Their other shapes and variants; a rehearsal has had its one of each."""
    for case in [] if bench.rehearse else operators.cases():
        if not case.first:
            _measure(bench, case)


def configurations(bench: Bench) -> None:
    """Launch configurations; the better ones go to <out>/configs-<device>.json, a candidate for kernels/vavae_kernels/configs."""
    cases = operators.rehearsal_cases() if bench.rehearse else operators.cases()
    tuned = [case for case in cases if case.spec.configs and (bench.rehearse or case.first)]
    for case in tuned[:2] if bench.rehearse else tuned:
        key = f"configs/{case.spec.name}"
        if bench.missing(key):

            def measure(case: operators.Case = case, key: str = key) -> Iterable[tuple[str, Row]]:
                for row in tuning.tune(case, bench.device, bench.timing, 2 if bench.rehearse else tuning.MOST):
                    yield f"{key}/{row['kernel']}", row
                yield key, dict(op=case.spec.name)

            bench.attempt("configs", key, measure, needs=25)
    _write_configurations(bench)


def _write_configurations(bench: Bench) -> None:
    rows = [row for row in (*bench.records.before, *bench.records.rows) if row["section"] == "configs" and row.get("proposed")]
    proposed = {f"{row['kernel']} {row['launch_key']}": row["proposed"] for row in rows if row["source"] == bench.records.stamp["source"]}
    if proposed:
        path = bench.records.path.parent / f"configs-{bench.records.stamp['device'].replace(' ', '_')}.json"
        path.write_text(json.dumps(proposed, indent=1, sort_keys=True) + "\n")


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "machine": machine, "ceilings": measured_ceilings, "unknowns": unknowns, "correctness": correctness, "step": main_step,
    "sampling": whole_draws, "tokenizer": tokenizer, "operators": first_operators, "steps": other_steps, "examples": other_code,
    "elastic": exactness, "more-operators": other_operators, "configs": configurations,
}  # fmt: skip


# -- the call --------------------------------------------------------------------------------------------------------


def unpack_wheels() -> None:
    """What the machine lacks, from benchmarks/wheels into a folder of this call's own, after everything that is installed."""
    found = sorted(WHEELS.glob("*.whl"))
    print(f"wheels: {', '.join(path.name for path in found) or 'none in benchmarks/wheels; peers that are not installed are left out'}")
    if not found:
        return
    folder = tempfile.mkdtemp(prefix="bench-wheels-")
    for path in found:
        with zipfile.ZipFile(path) as wheel:  # a wheel is an archive of importable folders
            wheel.extractall(folder)
    sys.path.append(folder)


def run(bench: Bench, sections: Iterable[str]) -> None:
    """The sections in turn, each followed by its time. `ContextLost` passes; time that is up ends the call."""
    for name in sections:
        began = time.monotonic()
        try:
            SECTIONS[name](bench)
        except TimeUp:
            print(f"time is up in section {name}; the same call again goes on from here")
            return
        except ContextLost:
            raise
        except Exception as fault:  # a section's own fault: the next one runs
            traceback.print_exc()
            bench.records.add(name, name, error=f"{type(fault).__name__}: {str(fault)[:400]}")
        print(f"{time.strftime('%H:%M:%S')} ---- {time.monotonic() - began:6.1f} s  section {name}", flush=True)


def _time_up(*_: object) -> None:
    raise TimeUp


def _again_in_a_fresh_process(bench: Bench) -> None:
    """Replace this process, whose CUDA context is lost: the same call, its clock going on, without what failed."""
    words = [word for n, word in enumerate(sys.argv[1:]) if word != "--began" and sys.argv[n] != "--began"]
    os.execv(sys.executable, [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", *words, "--began", str(bench.began)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results file; benchmarks/results, a new one of its own for a rehearsal")
    parser.add_argument("--seconds", type=float, default=500, help="no measurement begins that would not end by then")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--again", action="store_true", help="measure also what has been measured")
    parser.add_argument("--rehearse", action="store_true", help="every section on a CPU, tiny")
    parser.add_argument("--check", nargs="+", metavar="OPERATOR", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rehearse:
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        print("needs a GPU; --rehearse runs every section without one", file=sys.stderr)
        return 2
    if options.check:
        check(options.check, options.out, options.rehearse)
        return 0
    out = options.out or (Path(tempfile.mkdtemp(prefix="bench-rehearsal-")) if options.rehearse else RESULTS)
    unpack_wheels()
    bench = Bench(out, options.seconds, options.rehearse, options.again, options.began)
    if not options.rehearse:
        signal.signal(signal.SIGALRM, _time_up)
        signal.setitimer(signal.ITIMER_REAL, max(1.0, bench.left + GRACE))
    try:
        run(bench, options.only)
    except ContextLost as loss:
        print(f"the CUDA context is lost ({loss}); going on in a fresh process", flush=True)
        _again_in_a_fresh_process(bench)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return report(bench)


def report(bench: Bench) -> int:
    """The short table -> the exit status: 1 where a rehearsal failed anywhere."""
    rows = bench.records.rows
    failed = [row["key"] for row in rows if "error" in row]
    print("\n" + "\n".join(lines(rows)))
    if not bench.rehearse:
        print("\n".join(f"UNDER    {fault}" for fault in read_guards().faults(row for row in rows if "error" not in row)))
    print(f"\n{len(rows)} rows in {bench.records.path}" + (f"; {len(failed)} failed" if failed else ""))
    return 1 if failed and bench.rehearse else 0


if __name__ == "__main__":
    sys.exit(main())
