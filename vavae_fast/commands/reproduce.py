"""The paper's experiments, and those it leaves to future work: arms trained, scored, shown beside the paper's numbers. Continues where it stopped."""

import difflib
import os
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.errors import BadInput, require
from vavae_fast.experiments.catalogue import FUTURE_WORK, NAMES, PAPER, SCALES
from vavae_fast.parsing import shipped_configs

EXAMPLE = "vavae-fast reproduce dilemma --scale demo --dry-run"

_ARM_BYTES = 30 << 20  # what an arm on digits leaves: its last checkpoint, above all


def arguments(parser: ArgumentParser) -> None:
    names = f"all, or one or more: of the paper {', '.join(PAPER)}; of its future work {', '.join(FUTURE_WORK)}"
    parser.add_argument("names", nargs="+", metavar="NAME", help=names)
    parser.add_argument("--scale", choices=SCALES, default="demo", help="embedded digits on a CPU (default), CIFAR-10, ImageNet")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="seeds 0 to N - 1 of every arm (default 2)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/reproduce-<scale>; arms that are there are used again")
    parser.add_argument("--budget", type=float, default=1.0, metavar="FACTOR", help="all steps times FACTOR (default 1)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs; the numbers mean nothing")
    parser.add_argument("--processes", type=int, metavar="N", help="pieces of work side by side; default: one a core, with a GPU one")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="each stage on N GPUs of this machine, by torchrun (default 1)")
    parser.add_argument("--configs", type=Path, help="folder of the scales' configs; default: the shipped ones")
    parser.add_argument("--data", metavar="DIR", help="training images, for scales cifar and imagenet")
    parser.add_argument("--valid", metavar="DIR", help="images that are not trained on, for those scales")
    parser.add_argument("--foundation", action="append", default=[], metavar="NAME=FILE", help="weights of dinov2, mae, sam, clip or timm:<name>")
    parser.add_argument("--vgg", metavar="FILE", help="VGG16 weights for LPIPS (imagenet)")
    parser.add_argument("--lpips", metavar="FILE", help="LPIPS v0.1 linear weights for VGG (imagenet)")
    parser.add_argument("--inception", metavar="FILE", help="weights of FID's Inception (imagenet; for cifar in place of a small classifier)")
    parser.add_argument("--reference", metavar="R", help=".npz of images or statistics, for Inception")
    parser.add_argument("--published", action="append", default=[], metavar="NAME=PATH",
                        help="for system: 64ep=, 800ep= (LightningDiT), vavae= (tokenizer), latents= (folder of latents_stats.pt)")  # fmt: skip


@dataclass(frozen=True)
class ReproducePlan:
    """Experiments with all their arms, checked."""

    lab: Any
    scale: Any
    planned: list[Any]
    seeds: int
    processes: int | None  # None: as many as suit the machine

    def describe(self) -> str:
        from vavae_fast.experiments.runner import all_works

        lines = [_told(self), f"protocol   {self.scale.says}"]
        works, users = all_works(self.planned), {}
        for one in self.planned:
            lines.append(f"\n{one.experiment.name}: {one.needs or one.experiment.title}")
            for name, over_seeds in one.arms.items():
                lines.append(f"  {name:<42}{', '.join(work.key for works in over_seeds for work in works)}")
            for work in one.works():
                users.setdefault(work.key, []).append(one.experiment.name)
        shared = {key: names for key, names in users.items() if len(names) > 1}
        lines.append(f"\nshared     {len(shared)} of {len(works)} pieces of work are used by several experiments:")
        lines += [f"  {key:<28}{', '.join(names)}" for key, names in shared.items()]
        return "\n".join((*lines, "nothing was written"))


def plan(config: None, args: Namespace) -> ReproducePlan:
    """Names, numbers, files, then every arm's config."""
    from vavae_fast.experiments import scales
    from vavae_fast.experiments.catalogue import experiment
    from vavae_fast.experiments.runner import plan_experiments
    from vavae_fast.experiments.scale import Files
    from vavae_fast.experiments.work import Lab

    for flag, value in (("--seeds", args.seeds), ("--gpus", args.gpus), ("--processes", args.processes)):
        require(value is None or value >= 1, flag, value, "1 or more")
    require(args.budget > 0, "--budget", args.budget, "above 0")
    for name in args.names:
        if name != "all" and name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            raise BadInput(f"NAME: no experiment {name!r}{f', did you mean {near[0]}?' if near else ';'} give all, or some of {', '.join(NAMES)}")
    chosen = list(NAMES) if "all" in args.names else list(dict.fromkeys(args.names))
    configs = args.configs or shipped_configs()
    if not configs.is_dir():
        raise BadInput(f"{configs}: no such folder; give the folder of the scale's configs with --configs, or leave it out")
    files = Files(args.data, args.valid, args.inception, args.reference, args.vgg, args.lpips,
                  _pairs(args.foundation, "--foundation"), _pairs(args.published, "--published"))  # fmt: skip
    scale = scales.SCALES[args.scale](configs, files, args.budget, args.quick)
    out = (args.out or Path("runs") / f"reproduce-{scale.name}{'-quick' if args.quick else ''}").absolute()
    artifacts.require_writable(out)
    planned = plan_experiments([experiment(name) for name in chosen], scale, range(args.seeds))
    for one in planned:
        if one.needs and len(planned) == 1:
            raise BadInput(f"{one.experiment.name}: {one.needs}")
    _require_space(out, planned)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.gpus)) if args.gpus > 1 else ()
    return ReproducePlan(Lab(out, launcher), scale, planned, args.seeds, args.processes)


def _require_space(out: Path, planned: list[Any]) -> None:
    """For the arms of the smallest scale; a stage that needs more says so itself."""
    from vavae_fast.experiments.runner import all_works
    from vavae_fast.experiments.stages import LightningDiT
    from vavae_fast.experiments.work import Lab

    missing = sum(isinstance(work, LightningDiT) and Lab(out).result(work) is None for work in all_works(planned))
    artifacts.require_space(out, missing * _ARM_BYTES)


def _pairs(words: list[str], flag: str) -> dict[str, str]:
    """NAME=PATH words; each path is there."""
    from vavae_fast.config import given_path

    found = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not name or not path:
            raise BadInput(f"{flag}: expected NAME=PATH, got {word!r}")
        found[name] = str(given_path(path, f"{flag} {name}", "a file or folder").absolute())
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _told(plan: ReproducePlan) -> str:
    """One line: how much, how long."""
    from vavae_fast.experiments.runner import all_works, seconds_left

    works = all_works(plan.planned)
    done = sum(plan.lab.result(work) is not None for work in works)
    seconds = seconds_left(plan.lab, works)
    hours = "its time on this machine is not yet measured" if seconds is None else f"about {seconds / 3600:.1f} CPU hours"
    cores = plan.processes or _cores()
    hours += "" if seconds is None else f", {seconds / 3600 / cores:.1f} h on {cores} cores"
    arms = sum(len(one.arms) for one in plan.planned)
    return (f"reproduce  {plan.lab.out}: {len(plan.planned)} experiments, {arms} arms x {plan.seeds} seeds at {plan.scale.name} scale; "
            f"{len(works)} pieces of work, {done} done; predicted: {hours}")  # fmt: skip


def run(plan: ReproducePlan) -> Path:
    """Run what is missing."""
    import torch

    from vavae_fast.commands.run_lock import locked
    from vavae_fast.experiments.runner import run_experiments

    print(_told(plan), flush=True)
    processes = plan.processes or (1 if torch.cuda.is_available() else _cores())
    with locked(plan.lab.out, "choose another --out"):
        page = run_experiments(plan.lab, plan.scale, plan.planned, processes)
    print(f"reproduce  done; open {page}, or read {plan.lab.out / 'summary.md'}", flush=True)
    return page
