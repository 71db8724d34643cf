"""Versions that do not fit: one line with the cure, from what lies on the path; nothing is imported for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from vavae_kernels import _versions

ROOT = Path(__file__).parents[2]


def fake(folder: Path, package: str, version: str, file: str = "version.py") -> None:
    """A package that tells a version, and that must not be imported."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    with (folder / package / file).open("a") as out:
        out.write(f"from typing import Optional\n__version__ = '{version}'\n")


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(folder), str(ROOT), str(ROOT / 'kernels')]}\n{code}"]
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)


@pytest.mark.parametrize("package", ["vavae_fast", "vavae_kernels"])
@pytest.mark.parametrize("version", ["1.13.1", "2.6.0+cu124", "2.10.0", "2.10.0a0+gitabc"])
def test_a_torch_that_is_too_old_is_one_line(package, version, tmp_path):
    fake(tmp_path, "torch", version)
    said = run(f"import {package}", tmp_path).stderr.strip().splitlines()
    assert said[-1] == f"ImportError: torch {version} is too old, 2.11 or newer is needed: pip install 'torch>=2.11'"


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cu130", "2.11.0a0+gitabc", "3.0.1", "unknown"])
def test_other_torches_are_not_even_imported(version, tmp_path):
    fake(tmp_path, "torch", version)
    done = run("import vavae_fast, vavae_kernels; print('torch' in sys.modules, 'importlib.metadata' in sys.modules)", tmp_path)
    assert (done.stdout, done.stderr) == ("False False\n", "")


def test_without_torch_the_help_is_there(tmp_path):
    done = run("sys.modules['torch'] = None\nfrom vavae_fast.cli import main; print(main(['--version']))", tmp_path)
    assert done.stdout.splitlines()[-1] == "0" and not done.stderr


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.9.0", "3.9.0+git1234"])
def test_tritons_that_the_kernels_were_tested_with_say_nothing(version, recwarn):
    _versions.require_triton(version)
    assert not recwarn.list and _versions.triton_misfit(version) is None


def test_other_tritons_are_one_line():
    line = r"^Triton {}: the kernels were tested with 3\.6 to 3\.9; reinstall torch, which brings the one that fits it$"
    with pytest.raises(ImportError, match=line.format(r"3\.3\.0")):
        _versions.require_triton("3.3.0")
    with pytest.warns(UserWarning, match=line.format(r"3\.10\.0")):
        _versions.require_triton("3.10.0")


def test_the_operators_ask_for_tritons_version(tmp_path):
    """Where Triton is used, that is, when the first operator is loaded, and before anything of an old Triton that is not there is touched."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("__version__ = '3.2.0'\n")
    (tmp_path / "triton" / "language.py").write_text("")
    done = run("import vavae_kernels; print('light'); from vavae_kernels import _compat", tmp_path)
    assert done.stdout == "light\n" and done.stderr.strip().splitlines()[-1].startswith("ImportError: Triton 3.2.0: the kernels were tested")


@pytest.mark.parametrize(
    "torch, torchvision, fits",
    [("2.13.0+cpu", "0.28.0+cu130", True), ("2.11.1", "0.26.0", True), ("3.0.0", "0.40", True),
     ("2.13.0", "0.27.0", False), ("2.12.0", "0.28.0", False)],
)
def test_torchvision_belongs_to_one_torch(torch, torchvision, fits, tmp_path, monkeypatch):
    found = {"torch": torch, "torchvision": torchvision}
    monkeypatch.setattr(_versions, "found_version", found.get)
    fitting = int(torch.split(".")[1]) + 15
    line = f"torchvision {torchvision} is not the one for torch {torch}: pip install 'torchvision==0.{fitting}.*'"
    assert _versions.torchvision_misfit() == (None if fits else line)


def test_without_torchvision_nothing_is_amiss(monkeypatch):
    monkeypatch.setattr(_versions, "found_version", {"torch": "2.13.0"}.get)
    assert _versions.torchvision_misfit() is None


def test_where_versions_are_read(tmp_path, monkeypatch):
    """In version.py as torch has it, typed as a build of one's own may, or in __init__.py as Triton has it; or nowhere."""
    fake(tmp_path, "first_package", "2.11.0a0+git12")
    fake(tmp_path, "second_package", "3.9.0", file="__init__.py")
    fake(tmp_path, "third_package", "unknown")
    (tmp_path / "second_package" / "version.py").write_text("__version__: str = '3.8.0'\n")
    (tmp_path / "space").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = [_versions.found_version(name) for name in ("first_package", "second_package", "third_package", "space", "no_such_package")]
    assert found == ["2.11.0a0+git12", "3.8.0", None, None, None]
    (tmp_path / "second_package" / "version.py").unlink()
    assert _versions.found_version("second_package") == "3.9.0"
    monkeypatch.setitem(sys.modules, "first_package", type(sys)("first_package"))
    assert _versions.found_version("first_package") is None


def test_what_is_installed_here_is_read_right():
    import torch
    import triton

    assert _versions.found_version("torch") == torch.__version__
    assert _versions.found_version("triton") == triton.__version__
