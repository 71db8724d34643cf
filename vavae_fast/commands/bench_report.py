"""Write what benchmarks/results holds into the README's tables, and plot it; "not yet measured" where there is nothing."""

import json
import os
import platform
import re
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from vavae_fast.errors import BadInput

EXAMPLE = "vavae-fast bench-report --check"

BEGIN, END = "<!-- measured: vavae-fast bench-report writes this -->", "<!-- /measured -->"
NOTHING = "not yet measured"
REHEARSAL = "rehearsal"  # the device of rows that gpu.sh --rehearse writes
ARMS = {"no-vf": "none", "vf": "self-supervised stand-in", "random": "untrained encoder (control)"}

Row = dict[str, Any]


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=Path(), metavar="FOLDER", help="the checkout: README.md, benchmarks/, docs/; default here")
    parser.add_argument("--record", type=Path, metavar="RUN", help="first copy in the result of a demo run, or of reproduce's folder")
    parser.add_argument("--check", action="store_true", help="write nothing; status 2 if the README is not what the results say")


@dataclass(frozen=True)
class BenchReportPlan:
    """Files and what they are to hold."""

    files: Mapping[Path, str]
    check: bool

    def describe(self) -> str:
        return "\n".join(f"{path}: {'up to date' if is_current(path, text) else 'to be written'}" for path, text in self.files.items())


def plan(config: None, args: Namespace) -> BenchReportPlan:
    """Reads everything; `BadInput` names the file that is missing or cannot be meant."""
    root = args.root
    readme, results, guards = root / "README.md", root / "benchmarks" / "results", root / "benchmarks" / "guards.yaml"
    for path in (readme, guards):
        if not path.is_file():
            raise BadInput(f"{path}: no such file; run in a checkout of vavae-fast, or name it with --root")
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BadInput(f"{readme}: no {BEGIN} … {END} to write between")
    kept = {path.name: _kept(path) for kind in ("demo", "reproduce") for path in sorted(results.glob(f"{kind}-*.json"))}
    files = {}
    if args.record:
        name, result = record(args.record)
        kept[name] = result
        files[results / name] = json.dumps(result, indent=1) + "\n"
    measured = newest(results)
    wanted = _guards(guards)
    plots = {device: f"docs/bench-{_file_name(device)}.svg" for device, rows in measured.items() if _shares(rows, wanted)}
    files |= {root / plots[device]: plot(device, _shares(measured[device], wanted)) for device in plots}
    parts = [*(_told(result) for result in kept.values()), *_gpu(measured, wanted, plots)]
    files[readme] = f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}"
    return BenchReportPlan(files, args.check)


def run(plan: BenchReportPlan) -> None:
    stale = {path: text for path, text in plan.files.items() if not is_current(path, text)}
    if plan.check and stale:
        raise BadInput(f"{', '.join(map(str, stale))}: not what benchmarks/results says; run vavae-fast bench-report")
    for path, text in stale.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print("\n".join(f"wrote {path}" for path in stale) or "up to date")


def is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


# -- results of the bench --------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """The rows of one file of measurements. A last line that a stopped run left unfinished is no row; anything else unreadable is `BadInput`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise BadInput(f"{path}, line {number}: not JSON: {error}") from error
    return rows


def newest(folder: Path) -> dict[str, dict[str, Row]]:
    """device -> key -> the newest row of all files in `folder`; a row that holds an error counts only where nothing better is.

    A rehearsal measures nothing and is left out.
    """
    found: dict[str, dict[str, Row]] = {}
    rows = (row for path in sorted(folder.glob("*.jsonl")) for row in read(path) if row["device"] != REHEARSAL)
    for row in sorted(rows, key=lambda row: row["time"]):
        newest_of = found.setdefault(row["device"], {})
        if "error" not in row or "error" in newest_of.get(row["key"], {"error": ""}):
            newest_of[row["key"]] = row
    return found


def _guards(path: Path) -> dict[str, Any]:
    """The bench reads guards.yaml strictly; here only its names and numbers are wanted."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return dict(ops={name: guard["gpu"] for name, guard in content["ops"].items()}, steps=content["steps"])
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: {' '.join(str(error).split())}") from error


def _gpu(measured: dict[str, dict[str, Row]], guards: dict[str, Any], plots: dict[str, str]) -> Iterator[str]:
    """The tables of each device; one of what is not yet measured where there is no device."""
    for device, rows in (measured or {"": {}}).items():
        if device:
            machine = rows.get("machine", {})
            versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "cuda", "cudnn") if machine.get(name))
            day = max(row["time"] for row in rows.values())[:10]
            yield f"**On one {device}** ({', '.join(part for part in (versions, day) if part)}; `benchmarks/gpu.sh`), ratios within one run:"
        else:
            yield f"**On a GPU: {NOTHING}.** No figure of the paper is repeated here as ours, and no prediction stands here as a measurement."
        yield _table(("operator", "at", "pass", "share of copy bandwidth", "times as fast as", "target"), _operator_lines(rows, guards["ops"]))
        yield _table(("step", "our way", "times as fast as", "target"), _step_lines(rows, guards["steps"]))
        if device in plots:
            yield f"![share of the measured copy bandwidth by operator]({plots[device]})"
    yield f"Every figure on ImageNet (FID, rFID, IS): {NOTHING}."


def _table(head: tuple[str, ...], lines: Iterator[tuple[str, ...]]) -> str:
    return "\n".join(("| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(cells) + " |" for cells in lines)))


def _operator_lines(rows: dict[str, Row], ops: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for op, case, mode, least in _guarded(ops):
        row = _operator_row(rows, op, case, mode)
        share = f"{100 * row['roofline']:.0f} %" if row and "roofline" in row else NOTHING if row is None else "–"
        yield f"`{op}`", case, mode, share, _found(row), _target(least)


def _step_lines(rows: dict[str, Row], steps: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, least in steps.items():
        row = rows.get(f"steps/{name}")
        yield name, "–" if row is None or "error" in row else f"{row['ours']}, batch {row['batch']}", _found(row), _target(least)


def _guarded(ops: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, float]]]:
    for op, cases in ops.items():
        for case, modes in cases.items():
            for mode, least in modes.items():
                yield op, case, mode, least


def _operator_row(rows: dict[str, Row], op: str, case: str, mode: str) -> Row | None:
    shape, _, variant = case.partition(", ")
    at = f"{shape}/{variant or 'plain'}" if mode != "step" else shape
    return rows.get(f"ops/{op}/{at}/{mode}")


def _found(row: Row | None) -> str:
    if row is None:
        return NOTHING
    if "error" in row:
        return "failed: " + " ".join(row["error"].split())[:80].replace("|", "/")
    return ", ".join(f"{name} {value:.2f}" for name, value in row["ratio"].items()) or "–"


def _target(least: dict[str, float]) -> str:
    return ", ".join(f"copy bandwidth ≥ {100 * value:.0f} %" if what == "roofline" else f"{what} ≥ {value:g}" for what, value in least.items())


def _shares(rows: dict[str, Row], guards: dict[str, Any]) -> dict[str, float]:
    """Operator and pass -> share of the measured copy bandwidth."""
    found = ((f"{op} {case}, {mode}", _operator_row(rows, op, case, mode)) for op, case, mode, _ in _guarded(guards["ops"]))
    return {name: row["roofline"] for name, row in found if row is not None and "roofline" in row}


def plot(title: str, shares: Mapping[str, float]) -> str:
    """A bar for each share of 1, as SVG."""
    width, left, line = 760, 360, 22
    bars = []
    for n, (name, share) in enumerate(shares.items()):
        y, length = 40 + n * line, (width - left - 60) * min(share, 1.0)
        bars.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(name)}</text>'
                    f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{line - 8}" fill="#3b6ea5"/>'
                    f'<text x="{left + length + 6:.1f}" y="{y + 12}">{100 * share:.0f} %</text>')  # fmt: skip
    height = 50 + line * len(shares)
    head = f'<text x="8" y="22" font-weight="bold">Share of the copy bandwidth of {escape(title)}</text>'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {style}>\n' + "\n".join((head, *bars)) + "\n</svg>\n"


def _file_name(device: str) -> str:
    return re.sub(r"\W+", "-", device).strip("-")


# -- results of whole commands ---------------------------------------------------------------------------------------


def record(folder: Path) -> tuple[str, Row]:
    """A demo's run folder, or that of `reproduce` -> the name of its result file and what that holds."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = _device()
    where = "gpu" if "CUDA" in device else "cpu"
    if (folder / "summary.json").is_file():
        result = _kept(folder / "summary.json")
        kept = {key: result[key] for key in ("time", "versions", "scale", "protocol", "early_steps", "claims")}
        return f"reproduce-{result['scale']}-{where}.json", dict(commit=commit, device=device, **kept)
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        seconds = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["seconds"]
        kept = {key: metrics[key] for key in ("time", "versions", "seed", "protocol", "arms", "held_out", "shown", "stages")}
    except (FileNotFoundError, KeyError, json.JSONDecodeError) as error:
        raise BadInput(f"{folder}: not the folder of a finished demo: {error}; make one with vavae-fast demo") from error
    return f"demo-{where}.json", dict(commit=commit, device=device, seconds=round(seconds, 1), **kept)


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"CUDA {torch.cuda.get_device_name()}"
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores"


def _kept(path: Path) -> Row:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}: not JSON: {error}") from error


def _told(result: Row) -> str:
    return _reproduced(result) if "claims" in result else _demo(result)


def _reproduced(result: Row) -> str:
    from vavae_fast.experiments.summary import NOTE, markdown

    return (
        f"**The paper in miniature** (`vavae-fast reproduce all --scale {result['scale']}`, {result['device']}, torch {result['versions']['torch']}, "
        f"commit {result['commit']}, {result['time'][:10]}). {result['protocol']}\n\n{markdown(result)}\n\n{NOTE}"
    )


def _demo(result: Row) -> str:
    budgets = list(result["arms"]["vf"]["lightningdit"])
    head = ("VF alignment", "held-out PSNR", *(f"{budget} steps: in class / Fréchet" for budget in budgets), "guided: in class")
    held = result["held_out"]
    return (
        f"**The demo** (`make demo`, seed {result['seed']}, {result['device']}, torch {result['versions']['torch']}, "
        f"commit {result['commit']}, {result['time'][:10]}): {result['seconds']:.0f} s without installation. One tokenizer budget, one LightningDiT "
        f"budget, three kinds of latents; unguided samples unless it says guided. Real held-out digits have a Fréchet distance of "
        f"{held['frechet']:.1f}.\n\n"
        + _table(head, _demo_lines(result, budgets[-1]))
        + "\n\nThis shows that the pipeline works and what aligned latents do at this size. It is one seed of a toy; stand-ins replace every "
        "pretrained network, and the untrained control tells how much of the gain needs a trained encoder."
    )


def _demo_lines(result: Row, last: str) -> Iterator[tuple[str, ...]]:
    for arm, name in ARMS.items():
        scores = result["arms"][arm]
        cells = [f"{100 * s['unguided']['agreement']:.1f} % / {s['unguided']['frechet']:.1f}" for s in scores["lightningdit"].values()]
        guided = scores["lightningdit"][last]["guided"]["agreement"]
        yield name, f"{scores['reconstruction']['psnr']:.1f} dB", *cells, f"{100 * guided:.1f} %"
