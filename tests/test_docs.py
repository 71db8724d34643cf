"""The pages of docs/: their commands run or could be given, their names exist, their messages are ours; one page covers the whole reference.

The reference repository is read where `VAVAE_REFERENCE` names a checkout of it.
"""

import ast
import os
import re
from pathlib import Path

import documented
import numpy as np
import pytest
import torch
import yaml
from documented import ROOT, Block, blocks, prose, spans
from PIL import Image
from safetensors.torch import save_file

from vavae_kernels import attention_backends

PAGES = sorted((ROOT / "docs").glob("*.md"))
MOVING = ROOT / "docs" / "from-lightningdit.md"
TROUBLE = ROOT / "docs" / "troubleshooting.md"
NAMED = {page.name: page for page in PAGES}
REFERENCE = Path(os.environ.get("VAVAE_REFERENCE", "/no reference"))


@pytest.fixture
def reader(tmp_path, monkeypatch) -> Path:
    """The folder in which the reader of a page works: a checkout's configs, ten photos, latents, files that went wrong."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    generator = np.random.default_rng(0)
    for k in range(10):
        path = tmp_path / "photos" / ("cats", "dogs")[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), np.uint8)).save(path)
    for folder, channels in (("moments", 64), ("unnormalised", 32)):
        (tmp_path / folder).mkdir()
        shard = dict(latents=torch.randn(4, channels, 16, 16), latents_flip=torch.randn(4, channels, 16, 16), labels=torch.arange(4))
        save_file(shard, tmp_path / folder / "latents_rank00_shard000.safetensors")
    torch.save(dict(mean=torch.zeros(1, 64, 1, 1), std=torch.ones(1, 64, 1, 1)), tmp_path / "moments" / "latents_stats.pt")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.jpg").write_text("<!doctype html>")
    (tmp_path / "page.pt").write_text("<!doctype html><html></html>")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages]


def test_pages_that_others_link_to_are_there():
    assert {"README.md", "start.md", "your-images.md", "from-lightningdit.md", "kernels.md", "several-nodes.md", "small-gpu.md", "evaluation.md",
            "troubleshooting.md", "reproduce.md"} <= NAMED.keys()  # fmt: skip
    index = NAMED["README.md"].read_text()
    assert not [name for name in NAMED if name != "README.md" and f"({name})" not in index]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is(page):
    text = page.read_text()
    assert not re.search(r"^[ \t]+```", text, re.MULTILINE), "a fence that is indented is not read by these tests"
    assert {block.language for block in blocks(page)} <= {"sh", "console", "python", "text"}
    assert not re.search(r"^ {4,}(vavae-fast|torchrun|python) ", prose(page), re.MULTILINE), "a command stands in a block of sh"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_and_links_are_there(page):
    text = prose(page)
    if page == MOVING:  # its first column names what the reference has
        text = re.sub(r"^\|[^|\n]*\|", "|", text, flags=re.MULTILINE)
    assert documented.wrong_names(spans(text)) == []
    assert documented.broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_run(page, reader):
    """In the order of the page, all in one folder; what needs more than a test has is checked."""
    for block in [block for block in blocks(page) if block.language == "sh"]:
        for words in documented.commands(block.text):
            if block.needs:
                documented.check(words)
            else:
                status, printed = documented.run(words)
                assert status == 0, f"{block}: {' '.join(words)}: {printed}"


@pytest.mark.parametrize("block", of("console"), ids=str)
def test_what_commands_are_said_to_print(block, reader):
    assert documented.commands(block.text)
    for words, expected in documented.sessions(block.text):
        status, printed = documented.run(words)
        assert documented.looks_like(printed, expected), f"{' '.join(words)} printed: {printed}"
        assert status == (2 if "error: " in expected else 0)


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python(block, reader, monkeypatch):
    """A snippet runs; one that needs more than a test has compiles, and imports what there is."""
    monkeypatch.setattr(attention_backends, "BACKENDS", dict(attention_backends.BACKENDS))  # one registers its own
    tree = ast.parse(block.text)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    if block.needs:
        imports = [node for node in imports if (getattr(node, "module", None) or "").startswith("vavae")]
        tree = ast.Module(imports, type_ignores=[])
    exec(compile(tree, str(block), "exec"), {})


def test_messages_are_ours():
    """A `text` block of the page holds one message, `…` for what varies; cause and cure follow it."""
    shown = [block for block in blocks(TROUBLE) if block.language == "text"]
    assert len(shown) > 10
    assert [message.text for message in shown if not documented.in_source(message.text)] == []
    parts = re.split(r"^```(?:text|console)\n", TROUBLE.read_text(), flags=re.MULTILINE)[1:]
    assert [part.splitlines()[0] for part in parts if "Cause:" not in part or "Cure:" not in part] == []


def test_a_message_of_nobody_is_noticed():
    assert not documented.in_source("the gradient was not amused in the last … steps")
    assert not documented.looks_like("error: a line", "error: another line")
    with pytest.raises(AssertionError, match="no such config key"):
        documented.check(["vavae-fast", "train", "--config", "configs/demo.yaml", "train.max_step=3"])
    assert documented.wrong_names(["train.max_step=3", "configs/none.yaml", "vavae-fast train --fuse", "--flag-of-nobody"]) != []


# -- from the reference to here --------------------------------------------------------------------------------------


def first_column() -> set[str]:
    """What the page names of the reference: the spans in the first cell of its tables' rows."""
    return {span for cell in re.findall(r"^\|([^|\n]*)\|", MOVING.read_text(), re.MULTILINE) for span in spans(cell)}


@pytest.fixture(scope="module")
def reference() -> Path:
    if not (REFERENCE / "train.py").is_file():
        pytest.skip("no reference repository: VAVAE_REFERENCE names none")
    return REFERENCE


def test_every_flag_of_the_reference_is_there(reference):
    flags = set()
    for path in reference.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                flags |= {f"{path.relative_to(reference)} {arg.value}" for arg in node.args if len(arg.value) > 2}
    for path in reference.rglob("*.sh"):
        flags |= {f"{path.relative_to(reference)} {flag}" for flag in re.findall(r"--[a-z]\w+", path.read_text())}
    named = first_column()
    assert sorted(flag for flag in flags if flag.split()[1] not in named) == []


def test_every_key_of_the_reference_is_there(reference):
    """Those of its YAML files, those that its scripts read beside them, and the arguments that its YAML gives to classes."""
    found = set()

    def collect(value, prefix):
        for key, inner in value.items() if isinstance(value, dict) else ():
            found.add(prefix + key)
            collect(inner, f"{prefix}{key}.")

    for path in reference.rglob("*.yaml"):
        collect(yaml.safe_load(path.read_text()), "")
    for script in ("train.py", "inference.py"):
        for group, key in re.findall(r"train_config\[.(\w+).\]\[.(\w+).\]", (reference / script).read_text()):
            found.add(f"{group}.{key}")
        for key, group in re.findall(r"'(\w+)' in train_config\['(\w+)'\]", (reference / script).read_text()):
            found.add(f"{group}.{key}")
    for file, name, prefix in (("contperceptual.py", "LPIPSWithDiscriminator", "model.params.lossconfig.params."),
                               ("autoencoder.py", "AutoencoderKL", "model.params.")):  # fmt: skip
        path = next(path for path in (reference / "vavae").rglob(file))
        cls = next(node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef) and node.name == name)
        init = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
        found |= {prefix + arg.arg for arg in init.args.args[1:]}
    named = first_column()
    leaves = {key for key in found if not any(other.startswith(key + ".") for other in found)}
    assert sorted(leaves - named) == []


def test_every_file_of_the_reference_is_there(reference):
    named = first_column()
    files = [str(path.relative_to(reference)) for path in reference.rglob("*") if path.is_file() and ".git/" not in str(path)]
    covered = lambda file: file in named or any(name.endswith("/") and file.startswith(name) for name in named)
    assert sorted(file for file in files if not covered(file)) == []
