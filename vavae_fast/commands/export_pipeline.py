"""export --pipeline: a LightningDiT's run, its tokenizer and statistics as the folder that `VAVAEPipeline.from_pretrained` reads."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.config import SAMPLE_PRESETS
from vavae_fast.errors import require

_OWN = ("tokenizer", "latents_stats", "preset", "metrics", "license")  # flags that mean nothing without --pipeline


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--pipeline", action="store_true", help="write a folder for VAVAEPipeline.from_pretrained, with a model card")
    parser.add_argument("--tokenizer", type=Path, metavar="CKPT", help="with --pipeline; default: what the run's config names")
    parser.add_argument("--latents-stats", type=Path, metavar="FILE", help="with --pipeline; default: latents_stats.pt of the run's latents")
    parser.add_argument("--preset", choices=tuple(SAMPLE_PRESETS), help="with --pipeline: published sampler settings, in place of the run's")
    parser.add_argument("--metrics", type=Path, metavar="JSON", action="append", help="with --pipeline: what evaluate --json wrote, for the card")
    parser.add_argument("--license", metavar="NAME", help="with --pipeline: by the hub's list, as apache-2.0")


def check(args: Namespace) -> None:
    """Flags that need --pipeline are given with it."""
    for name in _OWN:
        value = getattr(args, name)
        require(args.pipeline or value is None, "--" + name.replace("_", "-"), str(value), "given with --pipeline")


@dataclass(frozen=True)
class PipelinePlan:
    """A pipeline that was put together, and where it goes."""

    pipeline: Any
    checkpoint: Path
    out: Path
    metrics: list[Any]  # read
    license: str | None

    def describe(self) -> str:
        return f"{self.pipeline!r} of {self.checkpoint} -> {self.out}\nnothing was written"


def plan(checkpoint: Path, args: Namespace) -> PipelinePlan:
    """Everything is loaded and checked, so that writing is all that is left."""
    from vavae_fast.pipeline import VAVAEPipeline
    from vavae_fast.pipeline.folder import check_writable

    metrics = [artifacts.read_json(path) for path in args.metrics or ()]
    check_writable(args.out, args.license, metrics)
    pipeline = VAVAEPipeline.from_pretrained(
        checkpoint, device="cpu", preset=args.preset, tokenizer=args.tokenizer, latents_stats=args.latents_stats, weights=args.weights
    )
    return PipelinePlan(pipeline, checkpoint, args.out, metrics, args.license)


def run(plan: PipelinePlan) -> Path:
    plan.pipeline.save_pretrained(plan.out, license=plan.license, metrics=plan.metrics)
    print(f"export  {plan.checkpoint} -> {plan.out}")
    return plan.out
