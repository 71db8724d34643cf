"""What the syntax trees say: no import cycles, no import against the rooms, no unpickling, a docstring in every file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"vavae_fast": ROOT / "vavae_fast", "vavae_kernels": ROOT / "kernels" / "vavae_kernels"}
FILES = {
    ".".join((package, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
    for package, root in PACKAGES.items()
    for path in sorted(root.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

BASE = {"config", "parsing", "schema", "tokenizer_schema", "errors", "rng", "artifacts", "distributed", "launched", "pixels", "torch_files", ""}
# Room -> the rooms that it may import. commands, experiments, pipeline, cli and __main__ are the top: they may import everything.
ALLOWED = {
    "base": {"base"},
    "data": {"base", "data", "kernels"},  # kernels: to compile csrc
    "evaluation": {"base", "evaluation"},
    "models": {"base", "models", "kernels"},
    "flow": {"base", "flow", "kernels"},
    "losses": {"base", "losses", "kernels"},
    "training": {"base", "data", "models", "losses", "flow", "training", "kernels"},
    "kernels": {"kernels"},
}
TOP = {"commands", "experiments", "pipeline", "cli", "__main__"}


def room(module: str) -> str:
    package, _, rest = module.partition(".")
    first = rest.split(".")[0]
    if package == "vavae_kernels":
        return "kernels"
    return "base" if first in BASE else first


def imported(name: str) -> set[str]:
    """Our own modules that a module imports, at its top or inside its functions."""
    found = set()
    is_package = FILES[name].name == "__init__.py"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = name.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                origin = ".".join([*parts, *([origin] if origin else [])])
            found |= {f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in FILES else origin for alias in node.names}
    return {module for module in found if module in FILES} - {name}


IMPORTS = {name: imported(name) for name in FILES}


def test_the_trees_were_found():
    assert len(FILES) > 60 and "vavae_fast.training.loop" in FILES and "vavae_kernels.patching" in FILES
    assert "vavae_fast.parsing" in IMPORTS["vavae_fast.config"] and "vavae_fast.commands.build" in IMPORTS["vavae_fast.commands.train"]


def test_no_import_cycles():
    """Function-level imports count: a cycle hidden in a function is a cycle all the same."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        state[name] = 1
        path.append(name)
        for other in sorted(IMPORTS[name]):
            if state.get(other) == 1:
                pytest.fail("import cycle: " + " -> ".join([*path[path.index(other) :], other]))
            if other not in state:
                visit(other)
        path.pop()
        state[name] = 2

    for name in FILES:
        if name not in state:
            visit(name)


@pytest.mark.parametrize("name", FILES)
def test_rooms_import_only_what_the_table_allows(name):
    here = room(name)
    if here in TOP:
        return
    if name == "vavae_fast":
        assert IMPORTS[name] == {"vavae_kernels"}, "the package itself imports only the kernels, whose check of torch's version it shares"
        return
    for other in IMPORTS[name]:
        assert room(other) in ALLOWED[here], f"{name} imports {other}: {here} may import {sorted(ALLOWED[here])}"


@pytest.mark.parametrize("name", FILES)
def test_files_say_what_they_are(name):
    if FILES[name].read_text(encoding="utf-8").strip():
        assert ast.get_docstring(TREES[name]), f"{FILES[name]}: no module docstring"


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: word.value for word in node.keywords}, node.lineno


def is_true(value: ast.AST | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


@pytest.mark.parametrize("name", FILES)
def test_nothing_unpickles(name):
    """`torch.load` only with weights_only=True; no pickle.load, no allow_pickle, no yaml.load, no eval or exec."""
    for function, words, line in calls(TREES[name]):
        where = f"{FILES[name]}:{line}"
        if function == "torch.load":
            assert is_true(words.get("weights_only")), f"{where}: torch.load without weights_only=True"
        assert function not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load", "eval", "exec"), where
        assert not is_true(words.get("allow_pickle")), f"{where}: allow_pickle=True"
        if function in ("np.load", "numpy.load"):
            assert "allow_pickle" in words, f"{where}: say allow_pickle=False"


def test_importing_is_lazy_about_heavy_and_optional_packages():
    """At the top of a module only torch, NumPy and what is always installed; the rest when it is used."""
    heavy = {"torchvision", "timm", "scipy", "sklearn", "tensorboard", "PIL", "matplotlib", "pyarrow", "triton", "nvidia", "huggingface_hub"}
    for name, tree in TREES.items():
        for node in tree.body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong = {module.split(".")[0] for module in modules} & (heavy - {"PIL"} if name.startswith("vavae_fast.data") else heavy)
            assert not wrong, f"{FILES[name]}: imports {sorted(wrong)} when it is imported"
