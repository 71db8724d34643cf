"""What importing the package does, and what the names `kernels` and `tests` mean outside the repository."""

import subprocess
import sys

import pytest


def python(code: str, cwd) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_imports_nothing_and_an_operator_little(tmp_path):
    """Not torch before a name is used; then torch and Triton, but neither the engine, nor the second and a half of torch._dynamo."""
    code = """
import sys, vavae_kernels
assert not {"torch", "triton"} & set(sys.modules)
from vavae_kernels import *
loaded = {name.split(".")[0] for name in sys.modules}
print(sorted(loaded & {"vavae_fast", "torchvision", "timm", "scipy", "diffusers"}), "torch._dynamo" in sys.modules)
"""
    assert python(code, tmp_path) == "[] False"


def test_operators_work_without_triton(tmp_path):
    """On a machine without it, everything imports, "auto" is the reference, and "triton" says what is missing."""
    code = """
import sys
sys.modules["triton"] = None
import torch, vavae_kernels
from vavae_kernels import *
x = torch.randn(2, 3, 8)
print(rms_norm(x, None).shape)
try:
    rms_norm(x, None, impl="triton")
except ValueError as error:
    print(error)
"""
    expected = "torch.Size([2, 3, 8])\nrms_norm: impl='triton', but Triton is not installed: pip install triton, or impl='auto'"
    assert python(code, tmp_path) == expected


@pytest.mark.parametrize("name", ["kernels", "tests"])
def test_source_folders_are_no_packages_outside_the_repository(name, tmp_path):
    """A package `kernels` at the root would shadow the Hugging Face package of that name in whatever is installed beside us."""
    code = f"""
import importlib.util, vavae_fast, vavae_kernels
spec = importlib.util.find_spec({name!r})
root = vavae_fast.__file__.rsplit("/", 2)[0]
places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
print([place for place in places if place.startswith(root)])
"""
    assert python(code, tmp_path) == "[]"


def test_every_exported_name_is_there():
    import vavae_kernels

    for name in vavae_kernels.__all__:
        assert callable(getattr(vavae_kernels, name)) and name in dir(vavae_kernels)
    with pytest.raises(AttributeError, match="rms_norn"):
        _ = vavae_kernels.rms_norn


def test_the_models_names_load_their_file_when_used(tmp_path):
    code = """
import sys, vavae_fast.models
assert "torch" not in sys.modules
from vavae_fast.models import LightningDiT
print(sorted(name for name in sys.modules if name.startswith("vavae_fast.models.")))
"""
    loaded = ["vavae_fast.models.activation_checkpointing", "vavae_fast.models.lightningdit", "vavae_fast.models.lightningdit_layers"]
    assert python(code, tmp_path) == str(loaded)
