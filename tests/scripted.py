"""Runs that a test file makes in a second interpreter, started on the file itself (see processes.py), before its tests look at them."""

import os
import subprocess
import sys
from pathlib import Path


def made(script: str, folder: Path, *words: str) -> Path:
    """`folder`, after `python script folder words` has ended well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, script, str(folder), *words], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-6000:]
    return folder
