"""Several runs on one static HTML page: curves over each other, what they reached, and the settings in which they differ."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from vavae_fast import artifacts
from vavae_fast.commands import _html
from vavae_fast.commands.report import Run, points, read_run, values_of
from vavae_fast.config import flatten
from vavae_fast.errors import BadInput, is_number, require

EXAMPLE = "vavae-fast compare output/lightningdit_xl output/lightningdit_xl_fused --out compare.html"

# LightningDiT-XL/1, 64 epochs at batch 1,024 on ImageNet 256: the MSE part of the loss in the log that the public repository keeps.
PUBLISHED_MODEL, PUBLISHED_BATCH = "LightningDiT-XL/1", 1024
PUBLISHED_MSE = {10_000: 0.3270, 20_000: 0.3175, 40_000: 0.3109, 60_000: 0.3073, 80_000: 0.3045}
_PUBLISHED = "published LightningDiT-XL/1, batch 1,024"

# One plot each, a line a run: (key, title, logarithmic).
_PLOTS = (
    ("loss", "loss", False), ("mse", "mse", False), ("cos", "cosine loss", False), ("valid_mse", "held-out mse, averaged weights", False),
    ("valid_mse_model", "held-out mse, weights in training", False), ("rec", "reconstruction", False), ("perceptual", "perceptual loss", False),
    ("valid_psnr", "held-out PSNR, dB", False), ("valid_ssim", "held-out SSIM", False), ("valid_perceptual", "held-out perceptual distance", False),
    ("rfid", "rFID of a few thousand held-out images", False),
    ("mcos", "alignment: marginal cosine", False), ("mdms", "alignment: marginal distance matrix", False),
    ("kl", "KL to the prior, nats an image", True), ("g_loss", "adversary: generator", False), ("d_loss", "adversary: discriminator", False),
    ("grad_norm", "gradient norm", True), ("attention_logit", "largest attention logit of any layer", True),
    ("lr", "learning rate", False), ("images_per_second", "images a second", False),
    ("mfu", "MFU", False), ("data_wait", "share of the time spent waiting for data", False), ("memory_gb", "peak memory, GB", False),
)  # fmt: skip
_AXES = {"step": "step", "images": "images seen", "hours": "hours in training"}
_FACTS = ("stage", "device", "processes", "parameters", "data.count", "data.tokenizer", "versions.torch", "versions.vavae_fast")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, as train or train-tokenizer wrote it")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), metavar="FILE", help="the page; default: compare.html")
    parser.add_argument("--reference", action="store_true", help=f"draw the published mse of {PUBLISHED_MODEL} too; drawn anyway when a run is one")
    parser.add_argument("--x", choices=tuple(_AXES), default="step", help="what the curves are drawn over; default: step")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N steps, whose values dwarf the rest")


@dataclass(frozen=True)
class ComparePlan:
    """What was read of every run, by the name it has on the page."""

    runs: dict[str, Run]
    configs: dict[str, dict[str, Any]]  # flattened
    places: dict[str, dict[float, float]]  # step -> place on the x axis
    x: str
    reference: bool
    skip: int
    out: Path

    def describe(self) -> str:
        lines = (f"{name}: {len(run.steps):,} logged steps of {run.folder}" for name, run in self.runs.items())
        return "\n".join([*lines, f"-> {self.out}\nnothing was written"])


def plan(config: None, args: Namespace) -> ComparePlan:
    from vavae_fast.commands.runs import run_config

    require(args.skip >= 0, "--skip", args.skip, "0 or more")
    if args.out.is_dir():
        raise BadInput(f"--out: {args.out} is a folder; give a file, as {args.out / 'compare.html'}")
    runs = dict(zip(_names(args.runs), map(_read, args.runs)))
    artifacts.require_writable(args.out.parent)
    configs = {name: flatten(run_config(run.folder)) if run.config else {} for name, run in runs.items()}
    kinds = {settings.get("model.model_type") for settings in configs.values()}
    reference = args.x != "hours" and (args.reference or PUBLISHED_MODEL in kinds)
    require(args.x != "hours" or not args.reference, "--reference", "--x hours", "with --x step or images: the published log has no comparable time")
    places = {name: _PLACES[args.x](run, configs[name]) for name, run in runs.items()}
    return ComparePlan(runs, configs, places, args.x, reference, args.skip, args.out)


def _read(folder: Path) -> Run:
    run = read_run(folder)
    if not run.steps:
        raise BadInput(f"{folder / 'metrics.jsonl'}: no logged step in it; compare runs that have begun")
    return run


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    whole = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, whole):
        if whole.count(path) > 1:
            raise BadInput(f"{folder}: given twice; give each run once")
    for length in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-length:]) for path in whole]
        if len(set(names)) == len(names):
            break
    return names


def _images(run: Run, settings: dict[str, Any]) -> dict[float, float]:
    batch = settings.get("train.global_batch_size")
    if not is_number(batch):
        raise BadInput(f"{run.folder / 'config.yaml'}: train.global_batch_size is not set, so images cannot be counted; take --x step")
    return {values["step"]: values["step"] * batch for values in run.steps}


def _hours(run: Run, settings: dict[str, Any]) -> dict[float, float]:
    seconds = [values["seconds"] if is_number(values.get("seconds")) else 0.0 for values in run.steps]
    return {values["step"]: total / 3600 for values, total in zip(run.steps, accumulate(seconds))}


_PLACES: dict[str, Callable[[Run, dict[str, Any]], dict[float, float]]] = {
    "step": lambda run, settings: {values["step"]: values["step"] for values in run.steps},
    "images": _images,
    "hours": _hours,
}


def run(plan: ComparePlan) -> Path:
    sections = [("Reached", _reached(plan)), ("Curves", _curves(plan)), ("Settings that differ", _differences(plan))]
    artifacts.write_text(plan.out, _html.page(" · ".join(plan.runs), sections))
    for name, line in _unreadable(plan).items():
        print(f"compare  {name}: {line}")
    print(f"compare  {plan.out}")
    return plan.out


def _unreadable(plan: ComparePlan) -> dict[str, str]:
    said = "{} line(s) of metrics.jsonl could not be read and are left out"
    return {name: said.format(run.unreadable) for name, run in plan.runs.items() if run.unreadable}


def _reached(plan: ComparePlan) -> str:
    """A column a run: how far it came, how fast, how well."""
    last = lambda key: lambda run: (values_of(run.steps, key) or [None])[-1]
    middle = lambda key: lambda run: median(found) if (found := values_of(run.steps, key)) else None
    rows = {
        "steps": lambda run: run.steps[-1]["step"],
        "hours in training": lambda run: sum(values_of(run.steps, "seconds")) / 3600,
        "images a second, median": middle("images_per_second"),
        "MFU, median": middle("mfu"),
        "peak memory, GB": lambda run: max(values_of(run.steps, "memory_gb"), default=None),
        **{f"{key}, last": last(key) for key in ("loss", "mse", "valid_mse", "rec", "perceptual", "mcos", "mdms", "valid_psnr", "rfid", "skipped")},
    }
    table = [(what, *map(of, plan.runs.values())) for what, of in rows.items()]
    notes = "".join(_html.paragraph(f"{name}: {line}.") for name, line in _unreadable(plan).items())
    return _html.table([("", *plan.runs), *(row for row in table if any(cell is not None for cell in row[1:]))]) + notes


def _curves(plan: ComparePlan) -> str:
    drawn = []
    for key, title, log in _PLOTS:
        lines = {name: _line(plan, name, key) for name in plan.runs if values_of(plan.runs[name].steps, key)}
        if key == "mse" and plan.reference:
            scale = PUBLISHED_BATCH if plan.x == "images" else 1
            lines[_PUBLISHED] = [(step * scale, mse) for step, mse in PUBLISHED_MSE.items()]
        if lines:
            drawn.append(_html.svg_lines(lines, title, log, x_label=_AXES[plan.x], dashed=(_PUBLISHED,)))
    return "".join(drawn) or _html.paragraph("No values to draw.")


def _line(plan: ComparePlan, name: str, key: str) -> list[tuple[float, float | None]]:
    return [(plan.places[name][step], value) for step, value in points(plan.runs[name].steps, key) if step > plan.skip]


def _differences(plan: ComparePlan) -> str:
    """A row for each config key, and each fact of the manifest, that is not the same in all runs."""
    facts = {name: {key: value for key, value in flatten(run.manifest).items() if key in _FACTS} for name, run in plan.runs.items()}
    told = {name: {**plan.configs[name], **facts[name]} for name in plan.runs}
    keys = list(dict.fromkeys(key for settings in told.values() for key in settings))
    rows = [(key, *(settings.get(key) for settings in told.values())) for key in keys]
    differing = [row for row in rows if any(cell != row[1] for cell in row[2:])]
    lacking = "".join(_html.paragraph(f"{name}: has no config.yaml.") for name in plan.runs if not plan.configs[name])
    if not differing:
        return _html.paragraph("None." if len(plan.runs) > 1 else "There is one run.") + lacking
    return _html.table([("key", *plan.runs), *differing]) + lacking
