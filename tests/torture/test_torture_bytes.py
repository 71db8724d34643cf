"""A quick part of the campaigns `bits`, `inputs` and `hostility`, which share a pipeline in miniature."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_flips_malformed_inputs_and_payloads(tmp_path):
    """In a process of their own: pytest's has threads, and must not fork."""
    names, told = ("bits", "inputs", "hostility"), tmp_path / "told.json"
    words = [sys.executable, str(TESTS / "torture"), *names, "--size", "0.01", "--folder", str(tmp_path), "--json", str(told)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(told.read_text())["rows"]
    assert {row["campaign"] for row in rows} == set(names) and len(rows) > 30
    assert all(row["tried"] or row["remark"].startswith("skipped: ") for row in rows)
    assert not any(row["lost"] or row["wrong"] or row["hung"] for row in rows)
