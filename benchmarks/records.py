"""The results file: one JSON object a line, one line a measurement, stamped with what was measured and where.

`benchmarks/results/<device>-<date>.jsonl`. A measurement has a key; a line holds under "source" a digest of the code that it
measures, so that a second call of the bench does only what is missing for the same code on the same device.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from vavae_fast.commands.bench_report import REHEARSAL, read

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = (("kernels", ("*.py", "*.json")), ("csrc", ("*.cu", "*.cpp", "*.h")), ("vavae_fast", ("*.py",)))  # what "source" covers

Row = dict[str, Any]


def source_digest() -> str:
    """Twelve digits of a hash of the code that is measured. A copy of the tree without .git has the same."""
    content = hashlib.sha256()
    for folder, patterns in MEASURED:
        for path in sorted(p for pattern in patterns for p in (ROOT / folder).rglob(pattern)):
            content.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:12]


def commit() -> str | None:
    """The commit of the checkout, marked where files differ from it; None in a copy without .git."""
    run = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if not (ROOT / ".git").exists() or run("rev-parse").returncode:
        return None
    changed = run("status", "--porcelain", "--untracked-files=no", "--", *(folder for folder, _ in MEASURED)).stdout.strip()
    return run("rev-parse", "--short", "HEAD").stdout.strip() + ("+changes" if changed else "")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}"


def smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where there is none. It only asks."""
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.strip().splitlines()[0].split(", ") if done.returncode == 0 and done.stdout.strip() else []
    return dict(zip(fields, values)) if len(values) == len(fields) else {}


def environment(device: torch.device) -> Row:
    """The stamp of a run: device, software, date, code."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    stamp: Row = dict(
        device=device_name(device), torch=torch.__version__, triton=triton_version, python=platform.python_version(),
        date=time.strftime("%Y-%m-%d", time.gmtime()), commit=commit(), source=source_digest(), cpus=len(os.sched_getaffinity(0)),
    )  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        stamp |= dict(
            cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), memory_gb=round(properties.total_memory / 2**30, 1),
            processors=properties.multi_processor_count, l2_mb=round(properties.L2_cache_size / 2**20, 1),
            **smi("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit"),
        )  # fmt: skip
    return stamp


class Records:
    """The file that a run writes, and what earlier runs of the same code on this device have done.

    folder: where it is written; earlier files are looked for there and in `benchmarks/results`. A file of the same day goes on.
    """

    def __init__(self, device: torch.device, folder: Path, earlier: Path = RESULTS, rehearsal: bool = False):
        self.stamp = environment(device) | (dict(device=REHEARSAL) if rehearsal else {})
        name = re.sub(r"\W+", "-", self.stamp["device"]).strip("-")
        self.path = folder / f"{name}-{self.stamp['date']}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() and (earlier / self.path.name).is_file():
            self.path.write_bytes((earlier / self.path.name).read_bytes())
        if self.path.exists():  # a stopped run may have left half a line
            whole, newline, _ = self.path.read_bytes().rpartition(b"\n")
            self.path.write_bytes(whole + newline)
        self.before = [row for where in {earlier, folder} for path in sorted(where.glob(f"{name}-*.jsonl")) for row in read(path)]
        self.rows: list[Row] = []

    def done(self, key: str, any_source: bool = False) -> bool:
        """Whether `key` has been measured on this device, for this code unless `any_source`."""
        own = self.stamp["source"]
        return any(r["key"] == key and "error" not in r and (any_source or r["source"] == own) for r in (*self.before, *self.rows))

    def add(self, section: str, key: str, **values: Any) -> Row:
        """Write a row and keep it; it is on disk when this returns."""
        stamp = {name: self.stamp[name] for name in ("device", "torch", "triton", "commit", "source")}
        row = dict(section=section, key=key) | values | stamp | dict(time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


def lines(rows: Iterable[Row]) -> Iterator[str]:
    """Measurements in a few words each; the file holds all of them."""
    for row in rows:
        if "error" in row:
            yield f"FAILED   {row['key']}: {row['error'][:150]}"
        elif row["section"] in ("ceilings", "unknowns") and "us" in row:
            rates = "  ".join(f"{row[unit]} {word}" for unit, word in (("tbps", "TB/s"), ("tflops", "TFLOP/s")) if unit in row)
            yield f"{row['section']:9s}{row['name'][:48]:50s}{rates}"
        elif row["section"] == "correctness":
            unfinished = "" if row["complete"] else ", not all run"
            yield f"correct  {row['name'][:30]:32s}{row['cases']} cases, worst {row['worst']:.2f} of what is allowed{unfinished}"
        elif row["section"] == "steps":
            rates = row.get("images_per_second") or row["us"]
            yield f"{row['name']} (at {row['batch']}): " + ", ".join(f"{name} {value:g}" for name, value in rates.items())
            ratios = ", ".join(f"{value:.3f} x {name}" for name, value in row["ratio"].items())
            yield f"         {row['ours']} is {ratios}" if ratios else f"         alone: {row['left_out']}"
        elif row["section"] == "ops":
            ratios = ", ".join(f"{value:.2f} x {name}" for name, value in row["ratio"].items())
            rates = [f"{1e3 * row['tbps']:.0f} GB/s"] if "tbps" in row else []
            rates += [f"{row['tflops']:.0f} TFLOP/s"] if "tflops" in row else []
            rates += [f"{100 * row['roofline']:.0f} % of copy"] if "roofline" in row else []
            case = f"{row['op']} {row['shape']} {row['variant']}"
            spread = f" +- {50 * row['spread']['ours']:.0f} %" if "spread" in row else ""
            yield f"{case[:44]:45s}{row['mode']:17s}{row['us']['ours']:10.1f} us{spread}  {', '.join(rates)}; {ratios}"
        elif row["section"] == "configs" and row.get("proposed"):
            best, shipped = (row["us"].get(row[which]) for which in ("best", "shipped"))
            yield f"config   {row['kernel']} {row['launch_key']}: {row['best']} {best} us, shipped {shipped} us"
