"""The stages of an arm, each the command of that name: tokenizer, latents, LightningDiT with its samples, uniformity."""

import shutil
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.config import LightningDiTConfig, TokenizerConfig, load_config
from vavae_fast.experiments.judges import Judge
from vavae_fast.experiments.standins import Classifier, Encoder, Given, Images
from vavae_fast.experiments.work import Lab, Work, given_keys


@dataclass(frozen=True)
class Tokenizer(Work):
    """`train-tokenizer` with `overrides` over `config`; scored by its reconstructions of held-out images."""

    kind = "tokenizer"
    config: Path
    overrides: tuple[str, ...]
    images: Images
    foundation: Encoder | Given | None
    perceptual: Classifier | Given
    judge: Judge
    seed: int
    cpu_seconds: float | None = field(default=None, compare=False)

    def needs(self) -> tuple[Work, ...]:
        aligned = (self.foundation,) if self.foundation else ()
        return (*aligned, self.perceptual, *self.judge.needs())

    def facts(self) -> dict[str, Any]:
        images = dict(train=self.images.train, valid=self.images.valid)
        return dict(config=given_keys(self.config, self._own), images=images, judge=self.judge.facts(), seed=self.seed)

    @property
    def _own(self) -> tuple[str, ...]:
        alone = () if self.foundation else ("model.params.use_vf=null",)
        return (*self.overrides, f"data.image_size={self.images.size}", f"model.params.ddconfig.resolution={self.images.size}", *alone)

    def check(self) -> None:
        """`BadInput` unless its config loads."""
        load_config(self.config, self._own, kind=TokenizerConfig)

    def do(self, lab: Lab) -> dict[str, Any]:
        run = self.run_folder(lab)
        where = [f"data.path={self.images.train}", f"train.output_dir={run.parent}", f"train.exp_name={run.name}", f"train.global_seed={self.seed}"]
        networks = [*(self.foundation.words(lab) if self.foundation else ()), *self.perceptual.words(lab)]
        lab.run("train-tokenizer", "--config", self.config, *self._own, *where, *networks)
        return self.judge.reconstructions(lab, run, self.images)

    def run_folder(self, lab: Lab) -> Path:
        return lab.folder(self) / "tokenizer"


@dataclass(frozen=True)
class Latents(Work):
    """`extract` of a tokenizer: of the images it was trained on, or of others."""

    kind = "latents"
    tokenizer: Tokenizer
    images: "str | FlatImages | None" = None  # None: the tokenizer's own
    cpu_seconds: float | None = field(default=None, compare=False)

    def needs(self) -> tuple[Work, ...]:
        return (self.tokenizer, *((self.images,) if isinstance(self.images, FlatImages) else ()))

    def facts(self) -> dict[str, Any]:
        return dict(images=None if isinstance(self.images, FlatImages) else self.images)

    def do(self, lab: Lab) -> dict[str, Any]:
        images = self.images.path(lab) if isinstance(self.images, FlatImages) else self.images or self.tokenizer.images.train
        run = self.tokenizer.run_folder(lab)
        lab.run("extract", "--config", run / "config.yaml", "--checkpoint", run, "--images", images, "--out", self.path(lab),
                "--seed", self.tokenizer.seed)  # fmt: skip
        return {}

    def path(self, lab: Lab) -> Path:
        return lab.folder(self) / "latents"


@dataclass(frozen=True)
class FlatImages(Work):
    """The training images once more as PNG files of one folder, which has no classes."""

    kind = "images"
    images: Images
    cpu_seconds: float | None = field(default=None, compare=False)

    def facts(self) -> dict[str, Any]:
        return dict(images=self.images.train, size=self.images.size)

    def do(self, lab: Lab) -> dict[str, Any]:
        from PIL import Image

        pixels, _ = self.images.read()
        self.path(lab).mkdir(exist_ok=True)
        for index, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(self.path(lab) / f"{index:06d}.png")
        return {}

    def path(self, lab: Lab) -> Path:
        return lab.folder(self) / "images"


@dataclass(frozen=True)
class LightningDiT(Work):
    """`train` on latents, and `sample` without guidance from its averaged weights at every one of `marks`, the last being its length."""

    kind = "lightningdit"
    config: Path
    overrides: tuple[str, ...]
    latents: Latents
    marks: tuple[int, ...]
    samples: int
    judge: Judge
    labelled: bool
    seed: int
    cpu_seconds: float | None = field(default=None, compare=False)

    def needs(self) -> tuple[Work, ...]:
        return (self.latents, *self.judge.needs())

    def facts(self) -> dict[str, Any]:
        budget = dict(marks=self.marks, samples=self.samples)
        return dict(config=given_keys(self.config, self._own), judge=self.judge.facts(), labelled=self.labelled, seed=self.seed, **budget)

    @property
    def _own(self) -> tuple[str, ...]:
        return (*self.overrides, f"train.max_steps={self.marks[-1]}", f"data.image_size={self.latents.tokenizer.images.size}")

    def check(self) -> None:
        """`BadInput` unless its config loads."""
        load_config(self.config, self._own, kind=LightningDiTConfig)

    def do(self, lab: Lab) -> dict[str, Any]:
        run = self.run_folder(lab)
        where = [f"data.data_path={self.latents.path(lab)}", f"vae.ckpt_path={self.latents.tokenizer.run_folder(lab)}",
                 f"train.output_dir={run.parent}", f"train.exp_name={run.name}", f"train.global_seed={self.seed}"]  # fmt: skip
        words = ["--config", self.config, *self._own, *where]
        lab.run("train", *words, f"train.ckpt_every={gcd(*self.marks)}")
        for mark in self.marks:
            if not (self.samples_folder(lab, mark) / "manifest.json").is_file():
                lab.run("sample", *words, "sample.cfg_scale=1.0", "--checkpoint", run / "checkpoints" / f"step_{mark:08d}", "--num", self.samples,
                        "--seed", self.seed, "--out", self.samples_folder(lab, mark))  # fmt: skip
        self._drop_checkpoints(run)
        return {str(mark): self.judge.generations(lab, self.samples_folder(lab, mark), self.labelled) for mark in self.marks}

    def _drop_checkpoints(self, run: Path) -> None:
        """All but the last: what the others were kept for is drawn."""
        for folder in sorted((run / "checkpoints").glob("step_????????"))[:-1]:
            shutil.rmtree(folder)

    def run_folder(self, lab: Lab) -> Path:
        return lab.folder(self) / "lightningdit"

    def samples_folder(self, lab: Lab, mark: int) -> Path:
        return lab.folder(self) / f"samples-{mark:08d}"


@dataclass(frozen=True)
class Uniformity(Work):
    """`analyze` of latents: the paper's Table 6."""

    kind = "uniformity"
    latents: Latents
    tokens: int
    repeats: int
    cpu_seconds: float | None = field(default=None, compare=False)

    def needs(self) -> tuple[Work, ...]:
        return (self.latents,)

    def facts(self) -> dict[str, Any]:
        return dict(tokens=self.tokens, repeats=self.repeats)

    def do(self, lab: Lab) -> dict[str, Any]:
        words = ("--tokens", self.tokens, "--repeats", self.repeats, "--seed", self.latents.tokenizer.seed)
        Lab(lab.out).run("analyze", "--latents", self.latents.path(lab), *words, "--out", self.path(lab))  # one process, whatever the launcher
        found = artifacts.read_json(self.path(lab) / "analysis.json")
        return {name: value for name, value in found.items() if isinstance(value, float) and not name.endswith("_std")} | self._organisation(lab)

    def _organisation(self, lab: Lab) -> dict[str, float]:
        """Of the normalised latents: the share of an image's variance that lies between classes; the participation ratio of tokens' directions."""
        import torch

        from vavae_fast.data import open_latents

        latents = open_latents(self.latents.path(lab))
        rows = latents.read(range(min(len(latents), 10_000))).sub(latents.mean).div(latents.std).double()
        labels, images = latents.labels[: len(rows)], rows.flatten(1)
        within = sum(float((of := images[labels == c]).sub(of.mean(dim=0)).square().sum()) for c in labels.unique())
        tokens = rows.permute(0, 2, 3, 1).flatten(0, 2)
        spectrum = torch.linalg.eigvalsh(tokens.T.cov().reshape(tokens.shape[1], -1))
        total = float(images.sub(images.mean(dim=0)).square().sum())
        return dict(class_share=1 - within / total, effective_dimension=float(spectrum.sum() ** 2 / spectrum.square().sum()))

    def path(self, lab: Lab) -> Path:
        return lab.folder(self) / "analysis"


@dataclass(frozen=True)
class Published(Work):
    """`sample` from a published checkpoint by one of its presets, or without guidance, and `evaluate`."""

    kind = "published"
    config: Path
    preset: str
    checkpoint: str
    tokenizer: str
    statistics: str  # folder of latents_stats.pt
    guided: bool
    samples: int
    judge: Judge
    seed: int
    cpu_seconds: float | None = field(default=None, compare=False)

    def facts(self) -> dict[str, Any]:
        files = dict(checkpoint=self.checkpoint, tokenizer=self.tokenizer, statistics=self.statistics)
        how = dict(preset=self.preset, guided=self.guided, samples=self.samples, seed=self.seed, judge=self.judge.facts())
        return dict(config=given_keys(self.config, ()), files=files, **how)

    def do(self, lab: Lab) -> dict[str, Any]:
        out = lab.folder(self) / "samples"
        # Without guidance the preset's grid and shift stay: only its scale and interval are those of cfg_scale 1.
        how = ["--preset", self.preset] if self.guided else ["sample.cfg_scale=1.0", "sample.num_sampling_steps=250", "sample.timestep_shift=0.3"]
        lab.run("sample", "--config", self.config, f"vae.ckpt_path={self.tokenizer}", f"data.data_path={self.statistics}", *how,
                "--checkpoint", self.checkpoint, "--num", self.samples, "--seed", self.seed, "--out", out)  # fmt: skip
        return {"final": self.judge.generations(lab, out, labelled=True)}
