"""The README's numbers are those in benchmarks/results; its configs exist, its commands could be given; so could those of the other READMEs."""

import re
from pathlib import Path

import documented
import pytest

from vavae_fast.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "examples").glob("*.md"))]


def test_measured_numbers_are_generated(capsys):
    assert main(["bench-report", "--root", str(ROOT), "--check"]) == 0, capsys.readouterr().err


def test_every_file_it_names_is_there():
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"configs/\w+\.yaml", text)) | set(re.findall(r"\]\((docs/[^)]+)\)", text)):
        if "LightningDiT/" + name not in text:
            assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_commands_and_names_are_there(page):
    """Every command in it exists with the flags and keys that it is given, every config key and file, every link."""
    assert documented.wrong_names(documented.spans(documented.prose(page))) == []
    assert documented.broken_links(page) == []
    for words in documented.indented_commands(page):
        documented.check(words)
