"""Write a run's weights as one file: .safetensors, or .pt in the reference's layout; or with its tokenizer as a pipeline's folder."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from vavae_fast import artifacts
from vavae_fast.commands import export_pipeline
from vavae_fast.errors import BadInput, require

EXAMPLE = "vavae-fast export --run output/lightningdit_xl --weights ema --out lightningdit_xl.safetensors"


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--step", type=int, help="checkpoint of this step; default: the newest complete one")
    parser.add_argument("--stage", help="checkpoint at the end of this stage of a tokenizer's run")
    parser.add_argument("--weights", choices=("ema", "model"), default=None, help="default: ema where there is one")
    parser.add_argument("--out", type=Path, required=True, help="file to write: .safetensors or .pt; with --pipeline a folder")
    export_pipeline.arguments(parser)


@dataclass(frozen=True)
class ExportPlan:
    """Which checkpoint goes where."""

    checkpoint: Path
    weights: str
    out: Path

    def describe(self) -> str:
        return f"{self.weights} weights of {self.checkpoint} -> {self.out}\nnothing was written"


def plan(config: None, args: Namespace) -> "ExportPlan | export_pipeline.PipelinePlan":
    require(args.step is None or args.stage is None, "--step", args.step, "left out with --stage")
    export_pipeline.check(args)
    require(args.pipeline or args.out.suffix in (".safetensors", ".pt"), "--out", str(args.out), "a .safetensors or .pt file, or --pipeline")
    if not args.run.is_dir():
        raise BadInput(f"{args.run}: no such run folder")
    artifacts.require_writable(args.out.parent)
    from vavae_fast.commands.build import checkpoint_folder
    from vavae_fast.training.checkpoint import holds, step_folder

    step = args.step if args.stage is None else _stage_end(checkpoint_folder(args.run), args.stage)
    folder = checkpoint_folder(args.run) if step is None else step_folder(args.run / "checkpoints", step)
    if not folder.is_dir():
        steps = ", ".join(str(int(p.name[5:])) for p in sorted((args.run / "checkpoints").glob("step_????????")))
        raise BadInput(f"{args.run}: no checkpoint of step {step}; there are: {steps or 'none'}")
    if args.pipeline:
        return export_pipeline.plan(folder, args)
    artifacts.require_space(args.out.parent, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    weights = args.weights or ("ema" if holds(folder, "ema") else "model")
    return ExportPlan(folder, weights, args.out)


def _stage_end(checkpoint: Path, stage: str) -> int:
    """The steps done at the end of a stage of the run that wrote `checkpoint`."""
    stages = artifacts.read_json(checkpoint / "manifest.json").get("stages") or {}
    if stage not in stages:
        raise BadInput(f"{checkpoint}: no stage {stage!r}; it has {', '.join(stages) or 'none'}")
    return stages[stage]


def run(plan: "ExportPlan | export_pipeline.PipelinePlan") -> Path:
    """The folder of a pipeline, or one file. The reference reads {"ema": ...} of a LightningDiT .pt and {"state_dict": ...} of a tokenizer's."""
    if isinstance(plan, export_pipeline.PipelinePlan):
        return export_pipeline.run(plan)
    import torch

    from vavae_fast.training.checkpoint import load_checkpoint, write_tensors

    groups, manifest = load_checkpoint(plan.checkpoint, plan.weights)
    state = dict(groups[plan.weights])
    facts = dict(weights=plan.weights, step=str(manifest["step"]), stage=str(manifest.get("stage")))
    with artifacts.replacing(plan.out) as temporary:
        if plan.out.suffix == ".safetensors":
            write_tensors(temporary, state, facts)
        else:
            key = "state_dict" if manifest.get("architecture") else plan.weights
            try:
                torch.save({key: state, "step": manifest["step"]}, temporary)
            except RuntimeError as error:  # how its writer reports a full disk
                raise BadInput(f"{plan.out}: cannot be written ({str(error).splitlines()[0]}); make room, or choose another folder") from None
    print(f"export  {plan.weights} weights of {plan.checkpoint} -> {plan.out}")
    return plan.out
