"""A small part of a campaign, for `make test`: the same one each time, another with VAVAE_SEED."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on CPUs; and processes forked after a GPU was used cannot use it")


def campaign(folder: Path, *parts: str, size: float, seconds: int = 600) -> list[dict[str, Any]]:
    """The rows of `parts`, in which nothing was lost, wrong or hung. In a process of its own: pytest's has threads, and must not fork."""
    told = folder / "told.json"
    words = [*parts, "--size", str(size), "--seed", os.environ.get("VAVAE_SEED", "0"), "--folder", str(folder), "--json", str(told)]
    done = subprocess.run([sys.executable, str(Path(__file__).parent), *words], capture_output=True, text=True, timeout=seconds,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-6000:]}{done.stderr[-3000:]}"
    return json.loads(told.read_text())["rows"]


def tried(rows: list[dict[str, Any]]) -> list[int]:
    """How often each row's fault was tried, of those that can be tried here."""
    return [row["tried"] for row in rows if not row["remark"].startswith(("not tried: ", "skipped: "))]
