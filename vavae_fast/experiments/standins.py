"""Small networks, trained here, that stand in for pretrained ones: foundation models, the network of LPIPS, a judge."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vavae_fast.experiments.work import Lab, Work

LEARNS = {
    "contrastive": "self-supervised by two views of an image, and by hidden patches",
    "masked": "self-supervised by hidden patches alone",
    "supervised": "supervised by class labels",
    "untrained": "untrained (control)",
}


@dataclass(frozen=True)
class Images:
    """Where images lie, and at which size they are used."""

    train: str
    valid: str  # not trained on
    size: int

    def read(self) -> tuple[Any, Any]:
        """All training images, (N, 3, size, size) uint8, and labels (N,)."""
        from vavae_fast.data import open_images

        images = open_images(self.train, size=self.size)
        return images.read(range(len(images))), images.labels


@dataclass(frozen=True)
class Encoder(Work):
    """What the VF loss aligns with: a small ViT that learned from one of `LEARNS`."""

    kind = "encoder"
    images: Images
    grid: int  # of the latents
    learns: str
    steps: int
    batch: int
    shape: dict[str, Any]  # of EncoderRecipe: what is not as its defaults
    cpu_seconds: float | None = field(default=None, compare=False)

    def facts(self) -> dict[str, Any]:
        trained = {} if self.learns == "untrained" else dict(steps=self.steps, batch=self.batch)
        return dict(images=self.images.train, size=self.images.size, grid=self.grid, learns=self.learns, shape=self.shape, **trained)

    def do(self, lab: Lab) -> dict[str, Any]:
        from vavae_fast.models.standins import save_standin
        from vavae_fast.training.standins import EncoderRecipe, random_encoder, train_encoder, train_supervised_encoder

        pixels, labels = self.images.read()
        tasks = dict(tasks=("patches",)) if self.learns == "masked" else {}
        recipe, device, say = EncoderRecipe(**self.shape, **tasks), best_device(), progress(f"encoder, {LEARNS[self.learns]}")
        if self.learns == "untrained":
            encoder = random_encoder(pixels, SEED, device, self.grid, recipe)
        elif self.learns == "supervised":
            encoder = train_supervised_encoder(pixels, labels, SEED, self.steps, self.batch, device, self.grid, say, recipe)
        else:
            encoder = train_encoder(pixels, SEED, self.steps, self.batch, device, self.grid, say, recipe)
        save_standin(encoder.cpu(), self.file(lab))
        return {}

    def file(self, lab: Lab) -> Path:
        return lab.folder(self) / "encoder.safetensors"

    def words(self, lab: Lab) -> list[str]:
        """Overrides of a tokenizer's config."""
        return ["model.params.use_vf=standin", f"foundation.standin={self.file(lab)}"]


@dataclass(frozen=True)
class Classifier(Work):
    """A small classifier, in place of VGG in LPIPS; with another seed in place of Inception."""

    kind = "classifier"
    images: Images
    steps: int
    batch: int
    widths: tuple[int, ...]
    seed: int
    cpu_seconds: float | None = field(default=None, compare=False)

    def facts(self) -> dict[str, Any]:
        return dict(images=self.images.train, size=self.images.size, steps=self.steps, batch=self.batch, widths=self.widths, seed=self.seed)

    def do(self, lab: Lab) -> dict[str, Any]:
        from vavae_fast.models.standins import save_standin
        from vavae_fast.training.standins import train_perceptual

        pixels, labels = self.images.read()
        network = train_perceptual(pixels, labels, self.seed, self.steps, self.batch, best_device(), progress("classifier"), self.widths)
        save_standin(network.cpu(), self.file(lab))
        return {}

    def file(self, lab: Lab) -> Path:
        return lab.folder(self) / "classifier.safetensors"

    def words(self, lab: Lab) -> list[str]:
        return [f"perceptual.standin={self.file(lab)}"]


@dataclass(frozen=True)
class Given(Work):
    """Pretrained weights that the user gave, as the overrides of a tokenizer's config that name them."""

    kind = "given"
    overrides: tuple[str, ...]
    cpu_seconds: float | None = 0.0

    def facts(self) -> dict[str, Any]:
        return dict(overrides=self.overrides)

    def do(self, lab: Lab) -> dict[str, Any]:
        return {}

    def words(self, lab: Lab) -> list[str]:
        return list(self.overrides)


SEED = 0  # of stand-ins for pretrained networks: one of each, as there is one DINOv2; arms differ in theirs


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def progress(name: str) -> Callable[[int, int, Any], None]:
    """A line every ten seconds."""
    said = time.perf_counter()

    def say(step: int, steps: int, loss: Any) -> None:
        nonlocal said
        if time.perf_counter() - said > 10:
            said = time.perf_counter()
            print(f"{name}  step {step}/{steps}  loss {loss:.3f}", flush=True)

    return say
