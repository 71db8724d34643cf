"""The README's numbers are those in benchmarks/results, and its configs exist."""

import re
from pathlib import Path

from vavae_fast.cli import main

ROOT = Path(__file__).parents[1]


def test_measured_numbers_are_generated(capsys):
    assert main(["bench-report", "--root", str(ROOT), "--check"]) == 0, capsys.readouterr().err


def test_every_file_it_names_is_there():
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"configs/\w+\.yaml", text)) | set(re.findall(r"\]\((docs/[^)]+)\)", text)):
        if "LightningDiT/" + name not in text:
            assert (ROOT / name).is_file(), name
