"""doctor: what works here, what is missing, how to get it; never an error, whatever is missing."""

import importlib.util
import sys

import torch

from vavae_fast.cli import main
from vavae_fast.commands import doctor


def test_the_report(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("system ") and f"torch       {torch.__version__}" in lines[1] and "gloo" in lines[2]
    for distribution, *_ in doctor.OPTIONAL:
        assert sum(line.startswith(distribution) for line in lines) == 1
    assert next(line for line in lines if line.startswith("nvcc")).split()[1] in ("present", "missing")
    operators = next(line for line in lines if line.startswith("operators"))
    assert all(name in operators for name in ("vf_loss", "swiglu", "qk_norm_rope"))
    assert lines[-1].startswith("ready: ") and ("GPU" in lines[-1])


def test_what_is_missing_comes_with_its_cure(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "timm" else real(name, *rest))
    line = next(line for line in doctor.report() if line.startswith("timm"))
    assert "missing" in line and "pip install 'vavae-fast[encoders]'" in line


def test_another_package_of_apexs_name_is_not_nvidias(monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('doctor must not import it')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    importlib.invalidate_caches()
    line = next(line for line in doctor.report() if line.startswith("apex (NVIDIA)"))
    assert "not NVIDIA's" in line and "apex" not in sys.modules
    assert any(line.startswith("misfit ") and line.endswith("pip uninstall apex") for line in doctor.report())
    (tmp_path / "apex" / "multi_tensor_apply").mkdir()
    (tmp_path / "apex" / "multi_tensor_apply" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    assert any(line.split()[:3] == ["apex", "(NVIDIA)", "present"] for line in doctor.report())


def test_packages_that_do_not_fit_are_named_with_their_cure(monkeypatch):
    assert not any(line.startswith("misfit") for line in doctor.report())
    monkeypatch.setattr("vavae_kernels._versions.found_version", {"torch": "2.13.0", "torchvision": "0.20.1", "triton": "3.2.0"}.get)
    misfits = [line for line in doctor.report() if line.startswith("misfit")]
    assert len(misfits) == 2 and "Triton 3.2.0" in misfits[0] and misfits[1].endswith("pip install 'torchvision==0.28.*'")
