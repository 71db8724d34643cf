"""The bench on a GPU in one call, most valuable first; called again it does what is missing. benchmarks/gpu.sh starts it.

    python benchmarks/gpu.py [--out FOLDER] [--seconds 510] [--only SECTION ...] [--again] [--rehearse]

Every measurement is a line of <out>/<device>-<date>.jsonl the moment it is made, and a short table ends the output. A measurement that
fails is a line that says why, and the next one runs. Whatever benchmarks/results or <out> holds of this device and this code is not
measured again, unless --again. Needs no network: wheels in benchmarks/wheels are installed for the call. VAVAE_REFERENCE names a checkout
of the public LightningDiT, for its own modules. --rehearse runs every section on a CPU with tiny shapes, kernels in Triton's interpreter.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "kernels"))
sys.path.append(str(ROOT))
if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import checks  # noqa: E402
import operators  # noqa: E402
import optimizers  # noqa: E402
import steps  # noqa: E402
import torch  # noqa: E402
import tuning  # noqa: E402
from ceilings import UNKNOWNS, Rates, ceilings  # noqa: E402
from records import RESULTS, Records, Row, read, smi  # noqa: E402

WHEELS = ROOT / "benchmarks" / "wheels"
WORKERS = 8  # processes that check operators at once; each has a CUDA context
CORRECTNESS_SECONDS = 150


class TimeUp(Exception):
    """The call's seconds are spent; what is missing is for the next call."""


class Bench:
    """What every section needs: the device, the records, the clock, and the ceilings once they are measured."""

    def __init__(self, options: argparse.Namespace):
        self.rehearse, self.again = options.rehearse, options.again
        self.device = torch.device("cpu" if self.rehearse else "cuda")
        self.ends = time.monotonic() + options.seconds
        self.records = Records(self.device, options.out, rehearsal=self.rehearse)
        self.settings = operators.REHEARSAL if self.rehearse else operators.Settings()
        self.ceilings: dict[str, float] = {}
        self.reference = Path(os.environ["VAVAE_REFERENCE"]) if os.environ.get("VAVAE_REFERENCE") else None

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def missing(self, key: str, any_source: bool = False) -> bool:
        return self.again or not self.records.done(key, any_source)

    def attempt(self, section: str, key: str, measure: Callable[[], list[tuple[str, Row]]], needs: float = 0.0) -> bool:
        """Write the rows of `measure` as (key, row), or a row with the fault under `key`. `TimeUp` if less than `needs` seconds are left."""
        if self.left < (0.0 if self.rehearse else needs):
            raise TimeUp(section)
        began = time.monotonic()
        try:
            rows = measure()
        except Exception as fault:  # whatever it is, the next measurement runs
            traceback.print_exc(limit=-4)
            self.records.add(section, key, error=f"{type(fault).__name__}: {str(fault)[:400]}", seconds=round(time.monotonic() - began, 1))
            ok = False
        else:
            for row_key, row in rows:
                self.records.add(section, row_key, **row, seconds=round(time.monotonic() - began, 1))
            ok = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{time.strftime('%H:%M:%S')} {'ok  ' if ok else 'FAIL'} {time.monotonic() - began:6.1f} s  {key}", flush=True)
        return ok


# -- sections, most valuable first -----------------------------------------------------------------------------------


def machine(bench: Bench) -> None:
    bench.attempt("machine", "machine", lambda: [("machine", dict(bench.records.stamp, wheels=sorted(p.name for p in WHEELS.glob("*.whl"))))])


def measured_ceilings(bench: Bench) -> None:
    """In every call: ratios to a ceiling are ratios within one run."""

    def measure() -> list[tuple[str, Row]]:
        rows = [(f"ceilings/{row['name']}", row) for row in ceilings(Rates(bench.device, bench.rehearse))]
        clocks = smi("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
        return [*rows, ("ceilings/clocks", dict(name="clocks", **clocks))]

    bench.attempt("ceilings", "ceilings", measure)
    for row in bench.records.rows:
        if row["key"] == "ceilings/copy" and "tbps" in row:
            bench.ceilings["tbps"] = row["tbps"]
        if row["key"] == "ceilings/matmul" and "tflops" in row:
            bench.ceilings["tflops"] = row["tflops"]


def unknowns(bench: Bench) -> None:
    """Once a device, whatever the code: they are the device's and PyTorch's."""
    for name, rows in UNKNOWNS.items():
        if bench.missing(f"unknowns/{name}", any_source=True):
            found: Callable[[], list[tuple[str, Row]]] = lambda name=name, rows=rows: [
                *((f"unknowns/{name}/{row['name']}", row) for row in rows(Rates(bench.device, bench.rehearse))), (f"unknowns/{name}", {})
            ]  # fmt: skip
            bench.attempt("unknowns", f"unknowns/{name}", found, needs=40)


def correctness(bench: Bench) -> None:
    """Operators in processes of their own: kernels compile side by side, and an illegal access ends one of them alone."""
    names = [name for name in checks.names() if bench.missing(f"correctness/{name}")]
    if not names:
        return
    count = 1 if bench.rehearse else min(WORKERS, len(names))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, *(["--rehearse"] if bench.rehearse else [])]
        workers = [subprocess.Popen([*command, "--check", *names[n::count], "--out", folder]) for n in range(count)]
        ends = time.monotonic() + (600 if bench.rehearse else min(CORRECTNESS_SECONDS, bench.left))
        for worker in workers:
            try:
                worker.wait(max(0.1, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        for name in names:
            bench.attempt("correctness", f"correctness/{name}", lambda name=name: [(f"correctness/{name}", _verdict(Path(folder), name))])


def _verdict(folder: Path, name: str) -> Row:
    """One row of all findings of an operator; RuntimeError where something is wrong, or nothing was found out."""
    path = folder / f"{name}.jsonl"
    found = read(path) if path.is_file() else []
    complete = bool(found) and found[-1].get("case") == "end"
    cases = [finding for finding in found if finding["case"] != "end"]
    faults = [f"{finding['case']}: {finding['fault']}" for finding in cases if "fault" in finding]
    if faults or not cases:
        raise RuntimeError(f"{len(faults)} of {len(cases)} cases: {faults[0]}" if faults else "its process ended before the first case")
    return dict(name=name, cases=len(cases), complete=complete, worst=max(finding["error"] for finding in cases))


def check(names: list[str], folder: Path, rehearse: bool) -> None:
    """What a worker of `correctness` does."""
    device = torch.device("cpu" if rehearse else "cuda")
    for name in names:
        with open(folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
            for finding in checks.findings(name, device, rehearse):
                print(json.dumps(finding), file=file, flush=True)
            print(json.dumps(dict(case="end")), file=file, flush=True)


def _compare(
    bench: Bench, what: str, size: str, batch: int, arms: tuple[str, ...], graph: bool = False, profile: bool = False, needs: float = 90
) -> None:
    """A comparison of `steps`, at half the batch where memory does not suffice, keyed by what was asked for."""
    key = f"steps/{what}/{size}/{batch}{'/graph' if graph else ''}/{'+'.join(arms)}"
    if bench.rehearse:  # one of each kind: sizes are all tiny
        key = f"steps/{what}{'/graph' if graph else ''}/{'model' if 'compiled model' in arms else 'public' if 'public code' in arms else 'blocks'}"
    if not bench.missing(key):
        return

    def measure() -> list[tuple[str, Row]]:
        fitting = steps.fitting_batch(size, batch, arms, bench.device) if what == "train" else batch
        tiny = dict(seconds=0.0, warm_up=0.0, backend="aot_eager", rounds=1) if bench.rehearse else dict(seconds=0.8, warm_up=0.5)
        while True:
            try:
                shape = ("tiny", 2) if bench.rehearse else (size, fitting)
                row = steps.compare(what, *shape, arms, bench.device, graph=graph, profile=profile, reference=bench.reference, **tiny)
                return [(key, row)]
            except torch.cuda.OutOfMemoryError:
                if fitting <= 8:
                    raise
                fitting //= 2
                torch.cuda.empty_cache()

    bench.attempt("steps", key, measure, needs=needs)


MAIN_ARMS = ("compiled blocks", "fused, compiled blocks", "fused")


def main_step(bench: Bench) -> None:
    _compare(bench, "train", "XL/1", 256, MAIN_ARMS, profile=True)


def other_steps(bench: Bench) -> None:
    """What each operator is worth in the compiled block; then the other baselines, sizes and batches."""
    _compare(bench, "block", "XL/1", 256, (*steps.WITHOUT, "eager", "fused"))
    if bench.reference is not None:
        _compare(bench, "train", "XL/1", 256, ("public code", "fused, compiled blocks"))
    _compare(bench, "train", "XL/1", 128, ("eager", "fused, compiled blocks"))
    _compare(bench, "sample", "XL/1", 64, ("eager", *MAIN_ARMS))
    _compare(bench, "train", "XL/1", 32, MAIN_ARMS, graph=True)
    _compare(bench, "train", "B/1", 256, ("eager", *MAIN_ARMS))
    _compare(bench, "train", "B/1", 32, MAIN_ARMS, graph=True)
    _compare(bench, "sample", "XL/1", 4, MAIN_ARMS, graph=True)
    _compare(bench, "sample", "B/1", 64, ("eager", *MAIN_ARMS))
    _compare(bench, "train", "XL/1", 256, ("compiled model", "fused, compiled model", "fused, compiled blocks"), needs=240)


def _operators(bench: Bench, found: Iterator[operators.Case]) -> None:
    for case in found:
        last = f"{case.key}/{'backward' if case.spec.gradients else 'forward'}"
        if bench.missing(last):
            measure = lambda case=case: [
                (f"{case.key}/{row['mode']}", row) for row in operators.measure(case, bench.device, bench.settings, bench.ceilings)
            ]
            bench.attempt("ops", last, measure, needs=25)


def first_operators(bench: Bench) -> None:
    """The optimizer, and every operator as the published XL/1 runs it."""
    if bench.missing("ops/adamw_ema/XL/1/step"):
        model = None if bench.rehearse else "LightningDiT-XL/1"
        rounds, seconds = bench.settings.rounds, bench.settings.seconds
        row = lambda: optimizers.measure(model, bench.device, rounds, seconds, bench.ceilings) | dict(shape="XL/1")
        bench.attempt("ops", "ops/adamw_ema/XL/1/step", lambda: [("ops/adamw_ema/XL/1/step", row())], needs=15)
    _operators(bench, (case for case in operators.cases(not bench.rehearse) if _is_first(case)))


def other_operators(bench: Bench) -> None:
    _operators(bench, (case for case in operators.cases(not bench.rehearse) if not _is_first(case)))


def _is_first(case: operators.Case) -> bool:
    shapes = case.spec.real if case.real else case.spec.small
    return case.shape == next(iter(shapes)) and case.variant == case.spec.variants[0]


def configurations(bench: Bench) -> None:
    """Launch configurations; the better ones go to <out>/configs-<device>.json, a candidate for kernels/vavae_kernels/configs."""
    most = 2 if bench.rehearse else tuning.MOST
    for case in operators.cases(not bench.rehearse):
        if case.spec.configs and _is_first(case) and bench.missing(f"configs/{case.spec.name}"):
            measure = lambda case=case: [
                *((f"configs/{case.spec.name}/{row['kernel']}", row) for row in tuning.tune(case, bench.device, bench.settings, most)),
                (f"configs/{case.spec.name}", {}),
            ]
            bench.attempt("configs", f"configs/{case.spec.name}", measure, needs=30)
    _write_configurations(bench)


def _write_configurations(bench: Bench) -> None:
    rows = [row for row in (*bench.records.before, *bench.records.rows) if row["section"] == "configs" and row.get("proposed")]
    if rows:
        proposed = {f"{row['kernel']} {row['launch_key']}": row["proposed"] for row in rows if row["source"] == bench.records.stamp["source"]}
        path = bench.records.path.parent / f"configs-{bench.records.stamp['device'].replace(' ', '_')}.json"
        path.write_text(json.dumps(proposed, indent=1, sort_keys=True) + "\n")


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "machine": machine, "ceilings": measured_ceilings, "unknowns": unknowns, "correctness": correctness, "step": main_step,
    "operators": first_operators, "steps": other_steps, "more-operators": other_operators, "configs": configurations,
}  # fmt: skip


# -- the call --------------------------------------------------------------------------------------------------------


def install_wheels() -> None:
    """Packages that the machine lacks, from benchmarks/wheels into a folder of this call's own."""
    found = sorted(map(str, WHEELS.glob("*.whl")))
    if not found:
        print("no wheels in benchmarks/wheels: peers that are not installed are left out")
        return
    folder = tempfile.mkdtemp(prefix="bench-wheels-")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", folder, *found]
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"wheels: {', '.join(Path(path).name for path in found)}" if done.returncode == 0 else f"wheels: pip failed: {done.stderr[-300:]}")
    sys.path.append(folder)


def table(rows: list[Row]) -> Iterator[str]:
    """The call's results in a few lines; the file holds all of them."""
    for row in rows:
        if "error" in row:
            yield f"FAILED   {row['key']}: {row['error'][:150]}"
        elif row["section"] in ("ceilings", "unknowns") and "name" in row:
            rates = "  ".join(f"{row[unit]} {word}" for unit, word in (("tbps", "TB/s"), ("tflops", "TFLOP/s")) if unit in row)
            yield f"{row['section']:9s}{row['name'][:48]:50s}{rates or row.get('refused', '')[:60]}"
        elif row["section"] == "correctness":
            unfinished = "" if row["complete"] else ", not all run"
            yield f"correct  {row['name'][:30]:32s}{row['cases']} cases, worst {row['worst']:.2f} of what is allowed{unfinished}"
        elif row["section"] == "steps":
            rates = row.get("images_per_second") or row["us"]
            yield f"{row['what']:6s} {row['size']} b{row['batch']} {row['how']}: " + ", ".join(f"{name} {value:g}" for name, value in rates.items())
            yield f"         {row['ours']} is " + ", ".join(f"{value:.3f} x {name}" for name, value in row["ratio"].items())
        elif row["section"] == "ops":
            ratios = ", ".join(f"{value:.2f} x {name}" for name, value in row["ratio"].items())
            share = f"{100 * row['roofline']:.0f} % of copy" if "roofline" in row else ""
            yield f"{row['op'][:24]:25s}{row['shape'][:10]:11s}{row['mode']:17s}{row['us']['ours']:10.1f} us  {share:14s}{ratios}"
        elif row["section"] == "configs" and row.get("proposed"):
            best, shipped = (row["us"].get(row[which]) for which in ("best", "shipped"))
            yield f"config   {row['kernel']} {row['launch_key']}: {row['best']} {best} us, shipped {shipped} us"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file (a rehearsal's own, unless given)")
    parser.add_argument("--seconds", type=float, default=510, help="no measurement begins that would not end by then")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--again", action="store_true", help="measure also what has been measured")
    parser.add_argument("--rehearse", action="store_true", help="every section on a CPU, tiny")
    parser.add_argument("--check", nargs="+", metavar="OPERATOR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rehearse:
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        print("needs a GPU; --rehearse runs every section without one", file=sys.stderr)
        return 2
    if options.check:
        check(options.check, options.out, options.rehearse)
        return 0
    if options.rehearse and options.out == RESULTS:
        options.out = Path(tempfile.mkdtemp(prefix="bench-rehearsal-"))
    install_wheels()
    bench = Bench(options)
    for name in options.only:
        try:
            SECTIONS[name](bench)
        except TimeUp:
            print(f"time is up in section {name}; the same call again goes on from here")
            break
        except Exception as fault:  # a section's own fault: the next one runs
            traceback.print_exc()
            bench.records.add(name, name, error=f"{type(fault).__name__}: {str(fault)[:400]}")
    print()
    print("\n".join(table(bench.records.rows)))
    failed = [row["key"] for row in bench.records.rows if "error" in row]
    print(f"\n{len(bench.records.rows)} rows in {bench.records.path}" + (f"; {len(failed)} failed" if failed else ""))
    return 1 if failed and options.rehearse else 0


if __name__ == "__main__":
    sys.exit(main())
