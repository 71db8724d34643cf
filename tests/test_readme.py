"""The README's numbers are those in benchmarks/results, and its configs exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_measured_numbers_are_generated():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, "README.md differs from benchmarks/results: run python benchmarks/readme.py"


def test_every_file_it_names_is_there():
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"configs/\w+\.yaml", text)) | set(re.findall(r"\]\((docs/[^)]+)\)", text)):
        if "LightningDiT/" + name not in text:
            assert (ROOT / name).is_file(), name
