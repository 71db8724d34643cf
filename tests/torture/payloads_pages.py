"""Text that would be code on a page, in a terminal or in a model card: wherever a report shows what a file says, it shows it as text."""

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tiny import copy
from torture.arena import FOLDER, HOSTILE, Arena, only_text
from torture.boxed import Wrong

from vavae_fast import artifacts
from vavae_fast.cli import main
from vavae_fast.commands._html import page, png_grid, scatter, svg_lines, table
from vavae_fast.experiments import pages as experiment_pages
from vavae_fast.pipeline.folder import CARD

_STEER = "\x1b]0;owned\x07\x1b[2J\x1b[31m"  # what would rename, clear and colour a terminal


def _run(arena: Arena, name: str = FOLDER) -> Path:
    """A run folder whose every word is hostile: its name, keys and values of metrics, manifest, config and scores, pictures' names."""
    folder = arena.box / name
    (folder / "samples").mkdir(parents=True)
    values = [{"step": k, "loss": 1.0 / (k + 1), HOSTILE: float(k), "mse": HOSTILE} for k in range(5)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, values)) + "\n")
    (folder / "config.yaml").write_text(f"train: {{exp_name: {json.dumps(HOSTILE)}}}\n{json.dumps(HOSTILE)}: {json.dumps(HOSTILE)}\n")
    (folder / "manifest.json").write_text(json.dumps({"stage": HOSTILE, "device": HOSTILE, HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]}))
    (folder / "metrics.json").write_text(json.dumps({HOSTILE: HOSTILE, "fid": 1.0, "list": [HOSTILE]}))
    Image.new("RGB", (4, 4)).save(folder / "samples" / f"{FOLDER}.png")
    (folder / "samples" / "x onerror=alert(1).png").write_bytes(HOSTILE.encode())
    return folder


def _report(arena: Arena) -> None:
    folder = _run(arena)
    arena.done("report", folder)
    only_text(folder / "report.html")


def _compare(arena: Arena) -> None:
    folders = [_run(arena, f"{FOLDER}{k}") for k in range(2)]
    (folders[1] / "config.yaml").write_text(f"{json.dumps(HOSTILE)}: 3\n")
    arena.done("compare", *folders, "--out", arena.box / "compare.html")
    only_text(arena.box / "compare.html")


def _analysis(arena: Arena) -> None:
    latents = copy(arena.tiny.latents, arena.box / FOLDER)
    manifest = artifacts.read_json(latents / "manifest.json")
    manifest["facts"] |= {"tokenizer": HOSTILE, "classes": [HOSTILE, FOLDER]}
    (latents / "manifest.json").write_text(json.dumps({key: value for key, value in manifest.items() if key not in ("format", "seal")}))
    arena.done("analyze", "--latents", latents, "--repeats", "0", "--tokens", "20", "--out", arena.box / "analysis")
    only_text(arena.box / "analysis" / "analysis.html")


def _class_folders(arena: Arena) -> None:
    """Class and file names go through extraction into manifests, and are names of nothing else."""
    for name in (FOLDER, "$(touch 'it ran')", "; touch 'it ran'"):
        (arena.box / "images" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(arena.box / "images" / name / f"{FOLDER}.png")
    config = ("--config", arena.tiny.root / "tokenizer.yaml", "--checkpoint", arena.tiny.tokenizer_run)
    arena.done("extract", *config, "--images", arena.box / "images", "--out", arena.box / "latents")
    if FOLDER not in artifacts.read_json(arena.box / "latents" / "manifest.json")["facts"]["classes"]:
        raise Wrong("the class is not named")


def _pieces(arena: Arena) -> None:
    """What every other page is made of: the sweep's, the gallery's, the demo's, the experiments'."""
    body = table([(HOSTILE, HOSTILE), (HOSTILE, HOSTILE)]) + svg_lines({HOSTILE: [(1, 2.0), (2, 1.0)]}, HOSTILE, x_label=HOSTILE)
    body += scatter(np.eye(2), [HOSTILE, "1"], HOSTILE) + png_grid(np.zeros((1, 2, 2), np.uint8), 1, alt=HOSTILE)
    (arena.box / "page.html").write_text(page(HOSTILE, [(HOSTILE, body)]))
    only_text(arena.box / "page.html")


def _reproduce(arena: Arena) -> None:
    """The overview of `reproduce` with an experiment that cannot be done here, for a hostile reason."""
    scale = SimpleNamespace(name=HOSTILE, says=HOSTILE, quick=False, marks=(1,))
    planned = [SimpleNamespace(experiment=SimpleNamespace(name=HOSTILE, title=HOSTILE), needs=HOSTILE, arms={})]
    (arena.box / "out").mkdir()
    experiment_pages.write_overview(SimpleNamespace(out=arena.box / "out"), scale, planned, {})
    only_text(arena.box / "out" / "report.html")


def _card(arena: Arena) -> None:
    """A model card is Markdown, whose HTML and links a hub would show; its example is code that people run."""
    run = arena.tiny.dit_run
    metrics = arena.box / "fid.json"
    metrics.write_text(json.dumps({"fid": 2.0, HOSTILE: 3.0, "protocol": {"features": HOSTILE, HOSTILE: "x"}}))
    out = arena.box / f'{FOLDER}"); import os; os.system("true'
    arena.done("export", "--run", run, "--pipeline", "--out", out, "--metrics", metrics)
    text = (out / CARD).read_text()
    if "<img" in text.partition("```")[0] or "<script" in text or re.search(r"(?<!\\)\[x\]\(javascript", text):
        raise Wrong("the card holds HTML or a link of the file")
    code = text.split("```python")[1].split("```")[0]
    compiled = compile(code, "card", "exec")
    if any(name in compiled.co_names for name in ("os", "system")):
        raise Wrong("the card's example runs what a name says")


def _terminal(arena: Arena) -> None:
    """Names with escape sequences in refusals and in what is printed: a line is a line, and steers nothing."""
    (arena.box / _STEER).mkdir()
    (arena.box / _STEER / f"{_STEER}.png").write_bytes(b"no image")
    scores = arena.box / "a.json"
    scores.write_text(json.dumps({"fid": 1.0, _STEER: 2.0, "protocol": {_STEER: _STEER}}))
    for words in (["report", _STEER], ["train", "--config", _STEER], ["evaluate", "--samples", _STEER, "--reference", _STEER],
                  ["evaluate", "--compare", str(scores), str(scores)], [_STEER], ["train", "--config", "x.yaml", f"{_STEER}=1"]):  # fmt: skip
        out, said = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            main(words)
        if "\x1b" in out.getvalue() + said.getvalue() or "\x07" in out.getvalue() + said.getvalue():
            raise Wrong(f"{words[0]!r} printed an escape sequence")


PAGES: dict[str, Callable[[Arena], None]] = {
    "report.html of a hostile run": _report, "compare.html of two": _compare, "analysis.html of hostile latents": _analysis,
    "class folders and file names": _class_folders, "the pieces of every page": _pieces, "the overview of reproduce": _reproduce,
    "a model card": _card, "escape sequences for the terminal": _terminal,
}  # fmt: skip
