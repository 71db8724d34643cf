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
from pathlib import Path
from typing import Any

import torch

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


def read(path: Path) -> list[Row]:
    """The rows of one file. A last line that a stopped run left unfinished is no row; anything else unreadable is ValueError."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
    return rows


def newest(folder: Path) -> dict[str, dict[str, Row]]:
    """device -> key -> the newest row of all result files in `folder`; rows that hold an error count only where nothing better is."""
    found: dict[str, dict[str, Row]] = {}
    for row in sorted((row for path in sorted(folder.glob("*.jsonl")) for row in read(path)), key=lambda row: row["time"]):
        rows = found.setdefault(row["device"], {})
        if "error" not in row or "error" in rows.get(row["key"], {"error": ""}):
            rows[row["key"]] = row
    return found


class Records:
    """The file that a run writes, and what earlier runs of the same code on this device have done.

    folder: where it is written; earlier files are looked for there and in `benchmarks/results`. A file of the same day goes on.
    """

    def __init__(self, device: torch.device, folder: Path, earlier: Path = RESULTS, rehearsal: bool = False):
        self.stamp = environment(device) | (dict(device="rehearsal") if rehearsal else {})
        name = re.sub(r"\W+", "-", self.stamp["device"]).strip("-")
        self.path = folder / f"{name}-{self.stamp['date']}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() and (earlier / self.path.name).is_file():
            self.path.write_bytes((earlier / self.path.name).read_bytes())
        self.before = [row for where in {earlier, folder} for path in sorted(where.glob(f"{name}-*.jsonl")) for row in read(path)]
        self.rows: list[Row] = []

    def done(self, key: str, any_source: bool = False) -> bool:
        """Whether `key` has been measured on this device, for this code unless `any_source`."""
        own = self.stamp["source"]
        return any(r["key"] == key and "error" not in r and (any_source or r["source"] == own) for r in (*self.before, *self.rows))

    def add(self, section: str, key: str, **values: Any) -> Row:
        """Write a row and keep it; it is on disk when this returns."""
        stamp = {name: self.stamp[name] for name in ("device", "commit", "source")}
        row = dict(section=section, key=key) | values | stamp | dict(time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row
