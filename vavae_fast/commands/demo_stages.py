"""The demo's arms, what each stage of one does, and where it leaves its files. Every stage is the command of that name."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vavae_fast.commands.invoke import run_command
from vavae_fast.experiments.standins import best_device, progress

ARMS = {"no-vf": "without VF alignment", "vf": "aligned with a self-supervised stand-in", "random": "aligned with an untrained encoder (control)"}
SHOWN = "vf"  # whose samples are samples.npz
TRAIN, TEST = "builtin:digits/train", "builtin:digits/test"
SAMPLES = 400
SIZE = 8  # pixels of a digit, as they were scanned
GUIDANCE = {"unguided": 1.0, "guided": None}  # None: the config's cfg_scale


@dataclass(frozen=True)
class DemoPlan:
    """The two configs, and how much of each."""

    out: Path
    seed: int
    configs: Path
    tokenizer_steps: int
    budgets: tuple[int, int]  # DiT steps: few, more
    samples: int
    standin_steps: tuple[int, int]  # encoder, perceptual
    processes: int

    def describe(self) -> str:
        few, more = self.budgets
        return (
            f"arms       {', '.join(ARMS)}\n"
            f"tokenizer  {self.tokenizer_steps} steps an arm; LightningDiT {few} and {more} steps; {self.samples} samples each\n"
            f"run        {self.out}, {self.processes} process(es)\nnothing was written"
        )


@dataclass
class Timeline:
    """Seconds and peak memory of every stage, as they finish."""

    started: float = field(default_factory=time.perf_counter)
    stages: list[dict[str, Any]] = field(default_factory=list)

    def add(self, result: dict[str, Any]) -> None:
        self.stages.append(result)


def make_perceptual(plan: DemoPlan) -> None:
    """The stand-in for VGG's LPIPS: a small classifier of digits. Kept when it is there."""
    if (plan.out / "perceptual.safetensors").is_file():
        return
    from vavae_fast.models.standins import save_standin
    from vavae_fast.training.standins import train_perceptual

    pixels, labels = _training_digits()
    network = train_perceptual(pixels, labels, plan.seed, plan.standin_steps[1], device=best_device(), progress=progress("perceptual stand-in"))
    save_standin(network, plan.out / "perceptual.safetensors")


def make_encoders(plan: DemoPlan) -> None:
    """The stand-in for DINOv2, trained without labels, and the same network untrained. Kept when they are there."""
    if (plan.out / "encoder-random.safetensors").is_file():
        return
    from vavae_fast.models.standins import save_standin
    from vavae_fast.training.standins import random_encoder, train_encoder

    pixels, _ = _training_digits()
    trained = train_encoder(pixels, plan.seed, plan.standin_steps[0], device=best_device(), progress=progress("encoder stand-in"))
    save_standin(trained, plan.out / "encoder-vf.safetensors")
    save_standin(random_encoder(pixels, plan.seed), plan.out / "encoder-random.safetensors")


def _training_digits():
    from vavae_fast.data import open_images

    images = open_images(TRAIN, size=SIZE)
    return images.read(range(len(images))), images.labels


def train_arm_tokenizer(plan: DemoPlan, arm: str) -> None:
    """vavae-fast train-tokenizer, then extract."""
    config = str(plan.configs / "demo_tokenizer.yaml")
    vf = ["model.params.use_vf=null"] if arm == "no-vf" else [f"foundation.standin={plan.out / f'encoder-{arm}.safetensors'}"]
    shared = [*vf, f"perceptual.standin={plan.out / 'perceptual.safetensors'}", f"data.path={TRAIN}"]
    run = [f"train.output_dir={plan.out}", f"train.exp_name=tokenizer-{arm}", f"train.global_seed={plan.seed}"]
    steps = [f"train.max_steps={plan.tokenizer_steps}", f"train.ckpt_every={plan.tokenizer_steps}"]
    run_command("train-tokenizer", ["--config", config, *shared, *run, *steps])
    trained, out = str(plan.out / f"tokenizer-{arm}"), str(plan.out / f"latents-{arm}")
    run_command("extract", ["--config", config, "--checkpoint", trained, "--images", TRAIN, "--out", out, "--seed", str(plan.seed)])


def train_arm_dit(plan: DemoPlan, arm: str) -> None:
    """vavae-fast train up to each budget, and sample from its EMA weights."""
    config, folder = str(plan.configs / "demo.yaml"), plan.out / f"lightningdit-{arm}"
    few, more = plan.budgets
    data = [f"data.data_path={plan.out / f'latents-{arm}'}", f"vae.ckpt_path={plan.out / f'tokenizer-{arm}'}"]
    run = [f"train.output_dir={plan.out}", f"train.exp_name={folder.name}", f"train.global_seed={plan.seed}"]
    run_command("train", ["--config", config, *data, *run, f"train.max_steps={more}", f"train.ckpt_every={few}"])
    for budget in plan.budgets:
        for name, scale in GUIDANCE.items():
            guidance = [] if scale is None else [f"sample.cfg_scale={scale}"]
            checkpoint, out = folder / "checkpoints" / f"step_{budget:08d}", samples_folder(plan, arm, budget, name)
            drawn = ["--checkpoint", str(checkpoint), "--num", str(plan.samples), "--seed", str(plan.seed), "--out", str(out)]
            run_command("sample", ["--config", config, *data, *run, *guidance, *drawn])


def samples_folder(plan: DemoPlan, arm: str, budget: int, guidance: str) -> Path:
    """Where the samples of an arm after `budget` steps lie."""
    return plan.out / f"samples-{arm}-{budget}-{guidance}"
