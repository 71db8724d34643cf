"""A run folder as one static HTML page: curves, samples, scores, config. Nothing is loaded from elsewhere."""

import io
import json
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.commands import _html
from vavae_fast.errors import BadInput, is_number

EXAMPLE = "vavae-fast report output/lightningdit_xl"

# Plots, each of the keys that are there: (title, keys, logarithmic). Keys named nowhere get a plot of their own.
_PLOTS = (
    ("loss", ("loss", "mse", "cos"), False),
    ("held-out loss: averaged weights, weights in training", ("valid_mse", "valid_mse_model"), False),
    ("held-out loss by t: from 0.0 to 0.1, …", tuple(f"valid_mse_t{n / 10:.1f}" for n in range(10)), False),
    ("FID of a few thousand samples, averaged weights: for its trend", ("fid",), False),
    ("negative log-likelihood, per image", ("nll",), True),
    ("reconstruction", ("rec", "perceptual", "valid_rec", "valid_perceptual"), False),
    ("PSNR of held-out images, dB", ("valid_psnr",), False),
    ("SSIM of held-out images", ("valid_ssim",), False),
    ("rFID of a few thousand held-out images: for its trend", ("rfid",), False),
    ("KL to the prior, nats an image", ("kl", "valid_kl"), True),
    ("alignment (VF)", ("mdms", "mcos", "vf_loss", "valid_mdms", "valid_mcos", "valid_vf_loss"), False),
    ("adversary", ("g_loss", "d_loss", "logits_real", "logits_fake"), False),
    ("adaptive weights", ("vf_weight", "d_weight"), True),
    ("gradient norm", ("grad_norm",), True),
    ("largest attention logit of any layer", ("attention_logit",), True),
    ("largest RMS of the residual stream", ("residual_rms",), True),
    ("learning rate", ("lr",), False),
    ("images a second", ("images_per_second",), False),
    ("MFU: share of the device's peak", ("mfu",), False),
    ("share of the time spent waiting for data", ("data_wait",), False),
    ("peak memory, GB", ("memory_gb",), False),
    ("skipped steps", ("skipped",), False),
)
# Folders of PNG files, and what stands over them; of `samples` in a tokenizer's run.
_PICTURES = {
    "samples": ("Samples", "Images, each with its reconstruction at its right."),
    "similarity": ("Similarity maps", "The cosine of the framed token with every place, in the latents and in the foundation model's features: "
                   "red 1, white 0, blue -1."),
    "gallery": ("Gallery", ""),
}  # fmt: skip
_FILES = ("metrics.jsonl", "metrics.json", "manifest.json", "config.yaml")
_LAST_LOGGED = ("loss", "mse", "valid_mse", "valid_mse_model", "rec", "perceptual", "mcos", "mdms", "valid_psnr", "valid_ssim", "valid_perceptual",
                "rfid")  # fmt: skip
_NOT_PLOTTED = ("step", "seconds", "attention_logit_layer")
_MOST_PICTURES, _LARGEST_PICTURE = 6, 8 << 20  # bytes of one embedded file
_PICTURE_WIDTH = 360  # pixels on the page that a small picture is enlarged to, about


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run folder, as train or train-tokenizer wrote it")


@dataclass(frozen=True)
class Run:
    """A run folder, and what was read from it."""

    folder: Path
    steps: list[dict[str, Any]]  # metrics.jsonl
    unreadable: int  # lines of it
    manifest: dict[str, Any]
    config: str
    scores: Any  # metrics.json

    @property
    def out(self) -> Path:
        return self.folder / "report.html"

    def describe(self) -> str:
        return f"{len(self.steps):,} logged steps of {self.folder} -> {self.out}\nnothing was written"


def plan(config: None, args: Namespace) -> Run:
    run = read_run(args.run_dir)
    artifacts.require_writable(run.folder)
    return run


def run(plan: Run) -> Path:
    print(f"report  {write(plan)}")
    return plan.out


def read_run(folder: Path) -> Run:
    """What a run folder holds of values, settings and scores. `BadInput` names what is no run folder, or is damaged beyond reading."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such run folder")
    if not any((folder / name).is_file() for name in _FILES):
        raise BadInput(f"{folder}: not a run folder, it has none of {', '.join(_FILES)}; give <train.output_dir>/<train.exp_name>")
    steps, unreadable = _logged_steps(folder / "metrics.jsonl")
    manifest, scores = (artifacts.read_json(folder / name) if (folder / name).is_file() else None for name in ("manifest.json", "metrics.json"))
    if not isinstance(manifest, dict | None):
        raise BadInput(f"{folder / 'manifest.json'}: expected an object, got {type(manifest).__name__}; it is damaged, or not ours")
    config_file = folder / "config.yaml"
    text = config_file.read_text(encoding="utf-8", errors="replace") if config_file.is_file() else ""
    return Run(folder, steps, unreadable, manifest or {}, text, scores)


def _logged_steps(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl in order of their step, the last one of each step, and how many lines a kill cut short."""
    if not path.is_file():
        return [], 0
    steps, unreadable = {}, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            values = None
        if isinstance(values, dict) and is_number(values.get("step")):
            steps[values["step"]] = values
        else:
            unreadable += 1
    return [steps[step] for step in sorted(steps)], unreadable


def write(run: Run) -> Path:
    """report.html in the run's folder, whole or not at all."""
    sections = [("Summary", _summary(run)), ("Curves", _curves(run.steps))]
    for folder, (heading, note) in _PICTURES.items():
        if pictures := _pictures(run.folder / folder):
            sections.append((heading, (_html.paragraph(note) if run.manifest.get("stage") == "tokenizer" else "") + pictures))
    if run.scores is not None:
        sections.append(("Scores", _html.table([("score", "value"), *flat(run.scores)])))
    if run.manifest:
        sections.append(("What made it", _html.table([("fact", "value"), *flat(run.manifest)])))
    if run.config:
        sections.append(("Config", _html.preformatted(run.config, "config.yaml, every key")))
    artifacts.write_text(run.out, _html.page(f"{run.manifest.get('stage', 'run')}: {run.folder.resolve().name}", sections))
    return run.out


def _summary(run: Run) -> str:
    if not run.steps:
        return _html.paragraph("No step has been logged yet.")
    seconds, rates, memory = (values_of(run.steps, key) for key in ("seconds", "images_per_second", "memory_gb"))
    last = lambda key: (values_of(run.steps, key) or [None])[-1]
    rows = [
        ("steps", run.steps[-1]["step"]),
        ("hours in training", sum(seconds) / 3600 if seconds else None),
        ("images a second, median", sorted(rates)[len(rates) // 2] if rates else None),
        ("peak memory, GB", max(memory, default=None)),
        *((f"{key}, last logged", last(key)) for key in _LAST_LOGGED),
        ("steps skipped, gradient not finite", last("skipped")),
    ]
    note = f"{run.unreadable} line(s) of metrics.jsonl could not be read and are left out."
    return _html.table([("", "value"), *(row for row in rows if is_number(row[1]))]) + (_html.paragraph(note) if run.unreadable else "")


def values_of(steps: list[dict[str, Any]], key: str) -> list[float]:
    """The numbers that were logged under a key."""
    return [s[key] for s in steps if is_number(s.get(key))]


def _curves(steps: list[dict[str, Any]]) -> str:
    present = {key for values in steps for key, value in values.items() if is_number(value)} - {*_NOT_PLOTTED}
    named = {key for _, keys, _ in _PLOTS for key in keys}
    plots = [(title, [key for key in keys if key in present], log) for title, keys, log in _PLOTS]
    plots += [(key, [key], False) for key in sorted(present - named)]
    drawn = [_html.svg_lines({key: points(steps, key) for key in keys}, title, log) for title, keys, log in plots if keys]
    return "".join(drawn) or _html.paragraph("No values to draw.")


def points(steps: list[dict[str, Any]], key: str) -> list[tuple[float, float | None]]:
    """(step, value) of the lines that have the key: a line without it, between two held-out losses, is no gap."""
    return [(s["step"], s[key] if is_number(s[key]) else None) for s in steps if key in s]


def _pictures(folder: Path) -> str:
    """The PNG files of `folder`: the newest and, evenly spread, some before it."""
    from PIL import Image, UnidentifiedImageError

    files = sorted(folder.glob("*.png"))
    if len(files) > _MOST_PICTURES:
        files = [files[round(i * (len(files) - 1) / (_MOST_PICTURES - 1))] for i in range(_MOST_PICTURES)]
    parts = []
    for file in reversed(files):
        data = file.read_bytes()
        if len(data) > _LARGEST_PICTURE:
            parts.append(_html.paragraph(f"{file.name} is {artifacts.readable_bytes(len(data))}, too large for this page."))
            continue
        try:
            with Image.open(io.BytesIO(data)) as image:
                size = image.size
        except (UnidentifiedImageError, OSError):
            parts.append(_html.paragraph(f"{file.name} is not a readable image."))
            continue
        enlarged = max(1, _PICTURE_WIDTH // size[0])  # grids of small images: whole multiples, pixels stay sharp
        parts.append(_html.figure(_html.png_image(data, (size[0] * enlarged, size[1] * enlarged), file.stem, exact=enlarged > 1), file.stem))
    return "".join(parts)


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Nested objects as rows: {"a": {"b": 1}} -> [("a.b", 1)]; a list is one row."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in flat(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list):
        return [(name, ", ".join(map(str, value)))]
    return [(name, value)]
