"""What is shipped: the wheel, the sdist, what they ask for, and the types that a user's checker sees."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from test_layout import FILES, PACKAGES, TREES

from vavae_fast.commands import doctor

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
STUBS = {".".join(path.relative_to(root.parent).parent.parts): path for root in PACKAGES.values() for path in sorted(root.rglob("*.pyi"))}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(wheel, sdist) of a copy of the sources."""
    folder = tmp_path_factory.mktemp("built")
    kept = shutil.ignore_patterns("__pycache__", "*.egg-info", ".git", ".venv", "runs", "output", "build", "dist", ".*_cache")
    shutil.copytree(ROOT, folder / "source", ignore=kept)
    code = f"from setuptools import build_meta as build; build.build_sdist({str(folder)!r}); build.build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder / "source", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if re.search("warning|deprecat", line, re.IGNORECASE)]
    silent = ("no previously-included", "byte-compiling is disabled")  # of a clean copy, and of an environment that writes no bytecode
    assert [line for line in told if not any(words in line for words in silent)] == []
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def sources(*folders: str) -> set[str]:
    """Files of the checkout's folders, as paths from its root, without what is made from them."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts and path.suffix != ".pyc"}


def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(built[0]).namelist() if ".dist-info/" not in name}
    expected = sources("vavae_fast") | {path.removeprefix("kernels/") for path in sources("kernels/vavae_kernels")}
    expected |= {f"vavae_fast/{path}" for path in sources("configs")}
    expected |= {f"vavae_kernels/{path}" for path in sources("csrc") if not path.endswith(".md")}
    assert names == expected
    assert {"vavae_fast/py.typed", "vavae_kernels/py.typed", "vavae_fast/configs/demo.yaml", "vavae_kernels/csrc/storage.h"} <= names


def test_the_sdist_holds_what_building_and_testing_need(built):
    names = {name.partition("/")[2] for name in tarfile.open(built[1]).getnames()}
    needed = sources("vavae_fast", "kernels", "csrc", "configs", "tests", "docs", "scripts", ".github", ".ci")
    needed |= {"Makefile", "constraints.txt", "train.py", "pyproject.toml", "README.md", "LICENSE", "Dockerfile", ".dockerignore", "MANIFEST.in"}
    assert needed - names == set()


def test_an_installed_wheel_finds_its_configs_and_sources(built, tmp_path):
    """With the wheel alone on the path, anywhere: the README's paths of configs, `--version` without torch, csrc."""
    zipfile.ZipFile(built[0]).extractall(tmp_path / "site")
    code = f"""
import sys
sys.path = [{str(tmp_path / "site")!r}, *(p for p in sys.path if p)]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
from vavae_fast.cli import main
import vavae_fast, vavae_kernels, vavae_fast.parsing as parsing
assert all(module.__file__.startswith({str(tmp_path)!r}) for module in (vavae_fast, vavae_kernels))
assert main(["train", "--config", "configs/lightningdit_xl_64ep.yaml", "--print-config"]) == 0
assert main(["train-tokenizer", "--config", "configs/tokenizer_f16d32.yaml", "--print-config"]) == 0
assert main(["train", "--config", "configs/lightningdit_xl_65ep.yaml"]) == 2
assert "torch" not in sys.modules
print(sorted(path.name for path in parsing.shipped_configs().iterdir()))
from vavae_kernels._extension import sources
assert (sources() / "adamw_ema.cu").is_file() and sources().is_relative_to({str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(sorted(path.name for path in (ROOT / "configs").iterdir()))
    assert "lightningdit_xl_65ep.yaml: no such config file; did you mean" in done.stderr


def test_every_package_and_kind_of_file_is_named():
    """setuptools is told the packages one by one: a folder that is forgotten would be missing from the wheel alone."""
    named = set(PYPROJECT["tool"]["setuptools"]["packages"]) - {"vavae_fast.configs", "vavae_kernels.csrc"}
    there = {name.rpartition(".")[0] if FILES[name].name != "__init__.py" else name for name in FILES}
    assert named == there


def test_extras_resolve_into_packages_and_are_those_that_others_name():
    assert {"encoders", "dali", "flash", "xformers", "fp8", "log", "hub", "analyze", "data", "bench", "all", "dev"} == set(EXTRAS)
    every = set(re.search(r"\[(.*)\]", EXTRAS["all"][0])[1].split(","))
    assert every == {"encoders", "log", "hub", "analyze", "data"}, "what installs anywhere: no compiler, no CUDA version"
    asked = {extra: {distribution(word) for word in words} for extra, words in EXTRAS.items()}
    assert "apex" not in set().union(*asked.values()), "the package index's is not NVIDIA's"
    table = re.search(r"\| extra \| for \|\n\|---\|---\|\n((?:\|.*\n)+)", (ROOT / "README.md").read_text())[1]
    assert {name for row in table.splitlines() for name in re.findall(r"`([\w-]+)`", row.split("|")[1])} == set(EXTRAS)
    for name, _, _, cure in doctor.OPTIONAL:
        if extra := re.search(r"vavae-fast\[(\w+)\]", cure):
            assert name in asked[extra[1]], f"{cure} does not install {name}"


def distribution(requirement: str) -> str:
    """Its name as indices write it: "huggingface-hub" of "huggingface_hub>=0.30"."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


# -- types ------------------------------------------------------------------------------------------------------------


def public_functions(name: str) -> list[tuple[str, ast.FunctionDef, bool]]:
    """(qualified name, definition, whether it is bound) of a module's public functions and methods; a kernel's arguments are no Python's."""
    found = []

    def visit(body: list[ast.stmt], owner: str, bound: bool) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                visit(node.body, f"{owner}.{node.name}", True)
            elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name in ("__init__", "__call__")):
                decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
                if "triton.jit" not in decorators:
                    found.append((f"{owner}.{node.name}", node, bound and "staticmethod" not in decorators))

    visit(TREES[name].body, name, False)
    return found


@pytest.mark.parametrize("name", FILES)
def test_public_functions_are_annotated_whole(name):
    for function, node, bound in public_functions(name):
        given = node.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, *(a for a in (given.vararg, given.kwarg) if a)][int(bound) :]
        bare = [argument.arg for argument in arguments if argument.annotation is None]
        bare += ["the result"] if node.returns is None and node.name != "__init__" else []
        assert not bare, f"{function} (line {node.lineno}): no annotation for {', '.join(bare)}"


def test_annotations_are_looked_for_where_they_are():
    found = {function for name in FILES for function, _, _ in public_functions(name)}
    assert {"vavae_kernels.ops.vf_loss.vf_loss", "vavae_fast.pipeline.pipeline.VAVAEPipeline.__call__", "vavae_fast.commands.train.plan"} <= found
    assert len(found) > 500


@pytest.mark.parametrize("package", STUBS)
def test_stubs_name_what_loads_lazily(package):
    """Checkers see a lazy package by its stub: every public name, from where it really comes."""
    real = import_module(package)
    lines = [node for node in ast.parse(STUBS[package].read_text()).body if isinstance(node, ast.ImportFrom)]
    told = {alias.asname: (f"{package}.{node.module}", alias.name) for node in lines for alias in node.names}
    assert set(told) == set(real.__all__) - {"__version__"}
    for name, (module, origin) in told.items():
        assert name == origin and getattr(real, name) is getattr(import_module(module), origin)


def test_every_lazy_package_has_a_stub():
    lazy = {name for name, tree in TREES.items() if any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body)}
    assert lazy == set(STUBS)
