"""The pipeline in miniature for tests of whole stages: 16 images of 16 pixels, f8 latents of 2 x 2, networks of a few thousand weights."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vavae_fast.cli import main
from vavae_fast.models.standins import StandInEncoder, StandInPerceptual, save_standin

TOKENIZER = """
model:
  base_learning_rate: 1.0e-3
  params:
    embed_dim: 4
    use_vf: standin
    reverse_proj: true
    lossconfig:
      params: {disc_start: 5, kl_weight: 1.0e-6, disc_weight: 0.5, disc_num_layers: 1, disc_ndf: 4, vf_weight: 0.1, adaptive_vf: true,
               distmat_margin: 0.1, cos_margin: 0.2}
    ddconfig: {z_channels: 4, resolution: 16, ch: 8, ch_mult: [1, 1, 1, 1], num_res_blocks: 1, attn_resolutions: []}
data: {image_size: 16}
train: {max_steps: 4, global_batch_size: 4, log_every: 1, ckpt_every: 2}
"""

DIT = """
data: {image_size: 16, num_classes: 2, latent_norm: true, latent_multiplier: 1.0}
vae: {model_name: tiny, downsample_ratio: 8}
model: {model_type: custom, hidden_size: 32, depth: 1, num_heads: 4, patch_size: 1, use_swiglu: true, use_rope: true, use_rmsnorm: true, in_chans: 4}
train: {max_steps: 4, global_batch_size: 4, log_every: 1, ckpt_every: 2, ema_decay: 0.9}
optimizer: {lr: 1.0e-3, max_grad_norm: 1.0}
transport: {use_cosine_loss: true, use_lognorm: true}
sample: {num_sampling_steps: 4, cfg_scale: 1.5, timestep_shift: 0.3, per_proc_batch_size: 4, fid_num: 10}
"""


@dataclass(frozen=True)
class Tiny:
    """Where the pieces of one pipeline lie."""

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def latents(self) -> Path:
        return self.root / "latents"

    @property
    def tokenizer_run(self) -> Path:
        return self.root / "runs" / "tokenizer"

    @property
    def dit_run(self) -> Path:
        return self.root / "runs" / "dit"

    def tokenizer(self, out: Path | None = None, name: str = "tokenizer", *more: str) -> list[str]:
        """Words of `train-tokenizer` with the stand-ins and a run folder under `out`."""
        return ["--config", str(self.root / "tokenizer.yaml"), f"data.path={self.images}",
                f"foundation.standin={self.root / 'encoder.safetensors'}", f"perceptual.standin={self.root / 'perceptual.safetensors'}",
                f"train.output_dir={out or self.root / 'runs'}", f"train.exp_name={name}", *more]  # fmt: skip

    def dit(self, out: Path | None = None, name: str = "dit", *more: str) -> list[str]:
        """Words of `train` and `sample` with latents, tokenizer and a run folder under `out`."""
        return ["--config", str(self.root / "dit.yaml"), f"data.data_path={self.latents}", f"vae.ckpt_path={self.tokenizer_run}",
                f"train.output_dir={out or self.root / 'runs'}", f"train.exp_name={name}", *more]  # fmt: skip


def prepare(root: Path) -> Tiny:
    """Images in two class folders, configs and stand-ins: what a pipeline starts from."""
    tiny = Tiny(root)
    generator = np.random.default_rng(0)
    for label in ("ant", "bee"):
        folder = tiny.images / label
        folder.mkdir(parents=True)
        for k in range(8):
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{k}.png")
    (root / "tokenizer.yaml").write_text(TOKENIZER)
    (root / "dit.yaml").write_text(DIT)
    torch.manual_seed(0)
    save_standin(StandInEncoder(dim=8, depth=1, heads=2), root / "encoder.safetensors")
    save_standin(StandInPerceptual(widths=(8, 8)), root / "perceptual.safetensors")
    return tiny


def done(*words: str) -> None:
    """Run a command; it must succeed."""
    assert main(list(words)) == 0, words


def launched(processes: int, *words: str, success: bool = True) -> subprocess.CompletedProcess:
    """Run a command on several processes, over gloo, as torchrun starts them."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "vavae_fast", *words]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (result.returncode == 0) is success, result.stderr
    return result


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob(pattern))}


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
