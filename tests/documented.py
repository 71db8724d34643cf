"""Markdown pages as tests read them: fenced blocks, commands, names of config keys and files, links, and the messages of the source.

A block of `sh`, `console` or `python` is run, unless its first line is a comment `# needs: …` that names what a test does not have: a GPU, a
data set, weights. Such a block is checked instead: commands exist, their flags parse, configs are there and take the overrides. In `console`
a line `$ command` is followed by what it prints, where `…` stands for anything.
"""

import ast
import contextlib
import dataclasses
import importlib
import io
import re
import shlex
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vavae_fast.cli import COMMANDS, main
from vavae_fast.commands import invoke
from vavae_fast.config import LightningDiTConfig, TokenizerConfig, load_config
from vavae_fast.errors import BadInput

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"cd", "git"}  # commands of the reader's machine, beside those that are checked
ANY = "…"
_PLACES = set("configs vavae_fast kernels tests benchmarks csrc docs examples scripts train.py constraints.txt Makefile Dockerfile".split())
_FILE = r"\.(py|pt|yaml|md|npz|safetensors|txt|json|jsonl|html|sh)$"
_FENCE = re.compile(r"^(?P<fence>```+)[ ]*(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def needs(self) -> str | None:
        """What the block needs that a test has not; None: it is run."""
        found = re.match(r"# needs: (.+)", self.text)
        return found and found[1]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, m.start()) + 1, m["language"], m["text"]) for m in _FENCE.finditer(text)]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(text: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


# -- commands --------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The words of each command line, continued lines joined, comments left out."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def indented_commands(page: Path) -> list[list[str]]:
    """The words of the commands of this project in blocks that are set off by four blanks."""
    lines = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r" {4}(vavae-fast|torchrun|srun|make|pip|python) ", line)]


def check(words: list[str]) -> None:
    """`BadInput` or an assertion unless a command could be given: it exists, takes its flags, its config takes the overrides."""
    name, *rest = words
    if name == "vavae-fast":
        _check_ours(rest)
    elif name in ("torchrun", "srun", "python"):
        _check_launched(rest)
    elif name == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets or "=" in word for word in rest), words
    elif name in ("pip", "uv"):
        assert set(_extras(rest)) <= _known_extras(), words
    elif name == "sbatch":
        script = next(place for place, word in enumerate(rest) if word.startswith("scripts/"))
        assert (ROOT / rest[script]).is_file(), words
        _check_ours(rest[script + 1 :])
    elif "/" in name:
        assert (ROOT / name).is_file(), f"{name}: no such file"
    elif name == "pytest":
        assert all((ROOT / word).exists() for word in rest if not word.startswith("-") and "/" in word), words
    else:
        assert name in ELSEWHERE, f"{name}: no command that a page's test knows"


def _check_launched(words: list[str]) -> None:
    """After torchrun or python: train.py, one of our modules, or a file of the checkout; its words are checked, the launcher's are not."""
    for place, word in enumerate(words):
        if word == "train.py":
            return _check_ours(["train", *words[place + 1 :]])
        if word == "-m" and words[place + 1] == "vavae_fast":
            return _check_ours(words[place + 2 :])
        if word == "-m" and importlib.util.find_spec(words[place + 1]) is not None:
            return None
        if word.split("/")[0] in _PLACES and (ROOT / word).exists():
            return None
    raise AssertionError(f"{' '.join(words)}: launches nothing of this project")


def _check_ours(words: list[str]) -> None:
    name, *rest = words
    if name in ("--version", "--help"):
        return
    assert name in COMMANDS, f"no command {name}"
    command = importlib.import_module("vavae_fast.commands." + name.replace("-", "_"))
    if ANY in rest:  # some of it is left out: what is there must exist
        _check_pieces(command, name, rest)
        return
    args = invoke.parse(command, name, rest)
    given = getattr(args, "overrides", None) or []
    overrides = tuple(word for word in given if not (name == "sweep" and word.startswith("sample.")))  # lists of values there
    for word in given:
        assert is_key(word.partition("=")[0]), f"{word}: no such config key"
    if getattr(args, "config", None) and str(args.config).startswith("configs/"):
        load_config(ROOT / args.config, overrides, kind=getattr(command, "CONFIG", None))


def _check_pieces(command: types.ModuleType, name: str, words: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        invoke.parse(command, name, ["--help"])
    flags = set(re.findall(r"--[\w-]+", shown.getvalue()))
    for word in words:
        assert not word.startswith("--") or word.partition("=")[0] in flags, f"{name} {word}: no such flag"
        if re.match(r"[\w.]+=", word):
            assert is_key(word.partition("=")[0]), f"{word}: no such config key"


def _extras(words: list[str]) -> list[str]:
    """The extras in `vavae-fast[a,b]` and `.[a]`."""
    return [extra for word in words for inside in re.findall(r"(?:vavae-fast|\.)\[([\w,-]+)\]", word) for extra in inside.split(",")]


def _known_extras() -> set[str]:
    listed = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", listed, re.MULTILINE))


def run(words: list[str]) -> tuple[int, str]:
    """The exit status of a command in this process, and what it printed. `python train.py` is `vavae-fast train`."""
    ours = words[1:] if words[0] == "vavae-fast" else ["train", *words[2:]] if words[:2] == ["python", "train.py"] else None
    assert ours is not None, f"{' '.join(words)}: cannot be run here; say what it needs in a first line `# needs: …`"
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(shown):
        status = main(ours)
    return status, shown.getvalue()


def sessions(text: str) -> Iterator[tuple[list[str], str]]:
    """The commands of a `console` block, each with what it prints."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        joined = re.sub(r"\\\n\s*", " ", part)
        line, _, printed = joined.partition("\n")
        yield shlex.split(line), printed.strip()


def looks_like(printed: str, expected: str) -> bool:
    """Whether `printed` holds `expected`, in which `…` stands for anything and white space for any other."""
    pieces = [r"\s+".join(map(re.escape, piece.split())) for piece in expected.split(ANY)]
    return re.search(r"[\s\S]*?".join(rf"\s*{piece}\s*" for piece in pieces), printed) is not None


# -- names -----------------------------------------------------------------------------------------------------------


@cache
def keys() -> frozenset[str]:
    """Every config key of both kinds, dotted, groups too."""
    return frozenset(_keys_of(LightningDiTConfig)) | frozenset(_keys_of(TokenizerConfig))


def _keys_of(schema: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        hint = hints[field.name]
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from _keys_of(inner, f"{prefix}{field.name}.")


def is_key(name: str) -> bool:
    """Whether a dotted name is a config key; a stage's name may stand in `stages.<name>.<key>`, anything below a free group."""
    if name in keys():
        return True
    if (stage := re.fullmatch(r"stages\.\w+\.(\w+)", name)) is not None:
        return f"stages.{stage[1]}" in keys()
    return any(name.startswith(free) for free in ("data.params.train.params.", "data.params.validation.params.", "lightning.callbacks."))


def wrong_names(spans_of_a_page: list[str]) -> list[str]:
    """Of what stands in backticks: keys, files, commands and flags of this project that are not there."""
    groups = {key.partition(".")[0] for key in keys() if "." in key}
    wrong = []
    for span in spans_of_a_page:
        name = span.partition("=")[0]
        if span.split()[0] in ("vavae-fast", "torchrun", "make"):
            try:
                check(shlex.split(span) if len(span.split()) != 2 or span.startswith("make ") else [*span.split(), ANY])
            except (AssertionError, BadInput, ValueError) as error:
                wrong.append(f"{span}: {error}")
        elif re.fullmatch(r"[a-z_]+(\.\w+)+", name) and name.partition(".")[0] in groups and not re.search(_FILE, name):
            wrong += [] if is_key(name) else [f"{span}: no such config key"]
        elif re.fullmatch(r"[\w./-]+", span) and (span.split("/")[0] in _PLACES) and not (ROOT / span).exists():
            wrong.append(f"{span}: no such file")
        elif re.fullmatch(r"--[a-z][\w-]*", name) and name not in _flags():
            wrong.append(f"{span}: no flag of any command")
    return wrong


@cache
def _flags() -> frozenset[str]:
    """Every flag of every command, and those of torchrun that pages speak of."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for name in COMMANDS:
            invoke.parse(importlib.import_module("vavae_fast.commands." + name.replace("-", "_")), name, ["--help"])
    launcher = {"--nproc-per-node", "--nnodes", "--rdzv-endpoint", "--rdzv-id", "--rdzv-backend", "--signals-to-handle", "--shutdown-timeout",
                "--max-restarts"}  # fmt: skip
    return frozenset(re.findall(r"--[\w-]+", shown.getvalue())) | launcher


def broken_links(page: Path) -> list[str]:
    """Links of a page to files, or to headings of pages, that are not there."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = page.parent / file if file else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    return broken


def anchors(page: Path) -> set[str]:
    """GitHub's and mkdocs' names of a page's headings."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# -- messages --------------------------------------------------------------------------------------------------------


@cache
def source_messages() -> tuple[str, ...]:
    """Every text of the source but docstrings, `…` where a value is put in, white space as one blank."""
    found = set()
    for folder in (ROOT / "vavae_fast", ROOT / "kernels" / "vavae_kernels"):
        for path in folder.rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            texts = (_template(node) for node in nodes if id(node) not in docstrings)
            found |= {" ".join(text.split()) for text in texts if text is not None and len(text) > 8}
    return tuple(sorted(found))


def _template(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else ANY for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _template(node.left), _template(node.right)
        return None if left is None and right is None else (left or ANY) + (right or ANY)
    return None


def in_source(message: str) -> bool:
    """Whether a message, `…` for what varies, is part of a text of the source."""
    message = re.sub(rf"{ANY}(\s*{ANY})+", ANY, " ".join(message.split()))
    return any(message in re.sub(rf"{ANY}(\s*{ANY})+", ANY, text) for text in source_messages())
