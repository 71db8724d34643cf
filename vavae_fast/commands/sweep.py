"""Sample and score over a grid of sampler settings: every combination of the values given; a table, a plot, the best. Continues where it stopped."""

import itertools
import json
import re
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.commands import _html, sample
from vavae_fast.commands.networks import sampler_settings
from vavae_fast.commands.scored_images import in_one_line, made_by
from vavae_fast.config import LightningDiTConfig, load_config
from vavae_fast.errors import BadInput, require

EXAMPLE = (
    "vavae-fast sweep --config configs/lightningdit_xl_64ep.yaml --checkpoint output/lightningdit_xl_64ep --num 5000 --out sweep \\\n"
    "      --reference VIRTUAL_imagenet256_labeled.npz --inception pt_inception.pth sample.cfg_scale=4,7,10 sample.cfg_interval_start=0,0.1"
)

_HIGHER_IS_BETTER = ("is", "precision", "recall")


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML file of a LightningDiT")
    parser.add_argument("--checkpoint", metavar="CKPT", help="as sample's; default: ckpt_path")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of a checkpoint of ours")
    parser.add_argument("--preset", choices=tuple(sample.SAMPLE_PRESETS), help="the settings that are not swept")
    parser.add_argument("--num", "--num-images", type=int, default=5000, metavar="N",
                        help="images a setting (default 5,000: FID-5000, for ranking only); torchrun takes the short form for its own")  # fmt: skip
    parser.add_argument("--seed", type=int, help="default: train.global_seed; every setting starts from the same noise")
    parser.add_argument("--fused", action="store_true", help="run the fused operators (= train.fused=true)")
    parser.add_argument("--reference", metavar="R", help=".npz with arr_0, or statistics .npz (mu sigma)")
    parser.add_argument("--inception", metavar="FILE", help="weights of the FID Inception network")
    parser.add_argument("--metrics", default="fid", help="as evaluate's; the first one ranks (default fid)")
    parser.add_argument("--batch", type=int, default=32, help="images at a time through Inception (default 32)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder a setting, sweep.json, sweep.html")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override config keys; of a sample. key several values: a,b,c")


@dataclass(frozen=True)
class Setting:
    """One combination: its values of the swept keys, the words that make its config, where its images go."""

    values: dict[str, str]
    config: LightningDiTConfig
    out: Path

    @property
    def name(self) -> str:
        return _name(self.values)


def _name(values: dict[str, str]) -> str:
    return ", ".join(f"{key.removeprefix('sample.')}={value}" for key, value in values.items()) or "as configured"


@dataclass(frozen=True)
class SweepPlan:
    """Settings, all checked, and what scores them."""

    settings: list[Setting]
    flags: Namespace
    metrics: list[str]
    reference: Any
    inception: Any  # on the CPU
    out: Path
    batch: int

    def describe(self) -> str:
        names = "\n".join(f"  {setting.name}" for setting in self.settings)
        return f"{len(self.settings)} settings of {self.flags.num:,} images, by {self.metrics[0]}:\n{names}\n-> {self.out}\nnothing was written"


def plan(config: None, args: Namespace) -> SweepPlan:
    """Every setting's numbers and the reference, then the networks of the first setting, then Inception."""
    metrics = args.metrics.split(",")
    require(args.batch > 0, "--batch", args.batch, "above 0")
    if not args.reference:
        raise BadInput("--reference: missing; give an .npz with statistics or images, as evaluate takes it")
    artifacts.require_writable(args.out)
    flags = Namespace(checkpoint=args.checkpoint, weights=args.weights, preset=args.preset, num=args.num, labels=None, seed=args.seed,
                      png=False, fused=args.fused, config=args.config)  # fmt: skip
    settings = [_setting(args, combination) for combination in _grid(args.overrides)]

    from vavae_fast.evaluation import load_inception, load_reference, of_images, require_count, require_metrics

    reference = load_reference(args.reference, args.batch)
    require_metrics(metrics, reference)
    require_count(args.num, metrics, "--num")
    if needed := of_images(metrics, reference):
        require_count(len(reference.images), needed, reference.name)
    for setting in settings:
        sampler_settings(setting.config.sample)
    _planned(flags, settings[0])
    return SweepPlan(settings, flags, metrics, reference, load_inception(args.inception), args.out, args.batch)


def _grid(overrides: list[str]) -> list[dict[str, str]]:
    """{key: value} of each combination of the sample. keys' values, in the order given; other overrides are the same in all."""
    choices, given = [], set()
    for word in overrides:
        key, _, value = word.partition("=")
        require(key not in given, key, word, "given once, its values separated by commas")
        given.add(key)
        several = key.startswith("sample.") and not value.startswith("[")
        choices.append([(key, one) for one in dict.fromkeys(map(str.strip, value.split(",")))] if several else [(key, value)])
    return [dict(combination) for combination in itertools.product(*choices)]


def _setting(args, combination: dict[str, str]) -> Setting:
    config = load_config(args.config, tuple(f"{key}={value}" for key, value in combination.items()), kind=LightningDiTConfig)
    swept = {key: value for key, value in combination.items() if key.startswith("sample.")}
    if args.preset:
        clash = [key for key in swept if key.removeprefix("sample.") in sample.SAMPLE_PRESETS[args.preset]]
        if clash:
            raise BadInput(f"{clash[0]}: --preset {args.preset} sets it for all; leave the preset out, and give its other keys")
    return Setting(swept, config, args.out / re.sub(r"[^\w.,=+-]", "_", _name(swept).replace(", ", ",")))


def _planned(flags: Namespace, setting: Setting) -> sample.SamplePlan:
    return sample.plan(setting.config, Namespace(**vars(flags), out=setting.out))


def run(plan: SweepPlan) -> Path:
    """Draw and score what is missing, then write the table. All processes of the launcher draw, the main one scores."""
    from vavae_fast.distributed import open_world

    with open_world() as world:
        scores = []
        for number, setting in enumerate(plan.settings, 1):
            if world.main:
                print(f"sweep  {number}/{len(plan.settings)}  {setting.name}", flush=True)
            sample.draw(_planned(plan.flags, setting), world)
            if world.main:
                scores.append(_score(plan, setting, world.device))
        if world.main:
            _write(plan, scores)
    return plan.out


def _score(plan: SweepPlan, setting: Setting, device: Any) -> dict[str, float]:
    """{metric: value}; kept in metrics.json beside the samples, and read from there when it is of these samples and this reference."""
    from vavae_fast.evaluation import NpzImages, evaluate_samples

    drawn = artifacts.read_json(setting.out / "manifest.json")["sha256"]
    judged = dict(samples_sha256=drawn, reference=plan.reference.name, reference_sha256=plan.reference.sha256,
                  inception_sha256=getattr(plan.inception, "sha256", None))  # fmt: skip
    path = setting.out / "metrics.json"
    held = artifacts.read_json(path) if path.is_file() else {}
    if held.get("judged") != judged or not set(plan.metrics) <= held.keys():
        images = NpzImages(setting.out / "samples.npz", plan.batch)
        with in_one_line(str(images.path)):
            result = evaluate_samples(images, plan.reference, plan.metrics, plan.inception.to(device))
        held = artifacts.manifest("metrics", judged=judged, made_by=made_by(str(images.path), images), **result)
        artifacts.write_json(path, held)
    return {name: held[name] for name in plan.metrics}


def _write(plan: SweepPlan, scores: list[dict[str, float]]) -> None:
    """sweep.json, sweep.html, and the table on the screen."""
    by = plan.metrics[0]
    sign = -1 if by in _HIGHER_IS_BETTER else 1
    best = min(range(len(scores)), key=lambda k: sign * scores[k][by])
    rows = [dict(setting=setting.values, folder=setting.out.name, **score) for setting, score in zip(plan.settings, scores)]
    result = artifacts.manifest("sweep", num=plan.flags.num, by=by, best=rows[best], settings=rows, reference=plan.reference.name)
    artifacts.write_json(plan.out / "sweep.json", result)
    table = [("setting", *plan.metrics), *((setting.name, *score.values()) for setting, score in zip(plan.settings, scores))]
    caption = f"best by {by} of {plan.flags.num:,} images: {plan.settings[best].name}. Such a value ranks settings; it is no published score."
    page = _html.page("Sampler settings", [("Scores", _html.paragraph(caption) + _html.table(table)), *_plots(plan, scores)])
    artifacts.write_text(plan.out / "sweep.html", page)
    width = max(len(row[0]) for row in table)
    for name, *values in table:
        print(f"{name:<{width}}  " + "  ".join(f"{v:>10.4f}" if isinstance(v, float) else f"{v:>10}" for v in values))
    print(caption)


def _plots(plan: SweepPlan, scores: list[dict[str, float]]) -> list[tuple[str, str]]:
    """The ranking metric over each swept key whose values are numbers: a line for each combination of the others."""
    found = []
    for key in plan.settings[0].values:
        values = [_number(setting.values[key]) for setting in plan.settings]
        if None in values or len(set(values)) < 2:
            continue
        lines: dict[str, list[tuple[float, float]]] = {}
        for setting, value, score in zip(plan.settings, values, scores):
            others = {k: v for k, v in setting.values.items() if k != key}
            lines.setdefault(_name(others), []).append((value, score[plan.metrics[0]]))
        title = f"{plan.metrics[0]} over {key}"
        found.append((title, _html.svg_lines({name: sorted(points) for name, points in lines.items()}, title, x_label=key)))
    return found


def _number(text: str) -> float | None:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
