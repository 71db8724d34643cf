"""Latents as pictures, and how they are organised: visualising them is the paper's future work."""

from pathlib import Path
from typing import Any

from vavae_fast.commands import _html
from vavae_fast.experiments import dilemma
from vavae_fast.experiments.experiment import Arms, Claim, Experiment, Results
from vavae_fast.experiments.judges import Score
from vavae_fast.experiments.scale import Scale
from vavae_fast.experiments.stages import Uniformity
from vavae_fast.experiments.uniformity import DENSITY

SHOWN, POINTS = 20, 700  # images of a row, points of a plot
CLASSES = Score("class_share", "variance between classes, % of all", True, 100)
DIMENSION = Score("effective_dimension", "effective dimension of a token", True, digits=2)


def arms(scale: Scale, seed: int) -> Arms:
    every = (None, *scale.foundations)
    return {dilemma.name(scale, scale.middle, f): scale.uniformity_of(scale.tokenizer(seed, scale.middle, f)) for f in every}


def claims(scale: Scale) -> list[Claim]:
    named = lambda found: dilemma.name(scale, scale.middle, found)
    return [Claim("aligned latents hold classes further apart (asked by this project)", named(scale.main), named(None), CLASSES)]


def pictures(results: Results) -> list[tuple[str, str]]:
    """Of the first seed: images and their latents in colours, principal components by class, t-SNE."""
    latents, points, embedded = "", "", ""
    for name, over_seeds in results.arms.items():
        work = over_seeds[0][0]
        assert isinstance(work, Uniformity)
        if results.lab.result(work) is None:
            continue
        folder = work.latents.path(results.lab)
        size = results.scale.images.size
        latents += _html.figure(_html.png_grid(_coloured(folder, size), SHOWN, max(1, 32 // size), name), name)
        points += _html.scatter(*_components(folder), name)
        embedded += _picture(work.path(results.lab) / "tsne.png", name)
    if not latents:
        return []
    caption = (
        "Training images above, below them their latents: each token's first three principal components over all tokens as red, green and blue. "
        "Colours are an arm's own."
    )
    said = "Images on the first two principal components of their latents; colours are classes."
    return [("Latents in colours", _html.paragraph(caption) + latents), ("Principal components", _html.paragraph(said) + points),
            ("t-SNE of tokens, the lighter the denser", embedded)]  # fmt: skip


def _coloured(folder: Path, size: int) -> Any:
    """(2 SHOWN, size, size, 3) uint8: a row of images, a row of latents."""
    import torch

    from vavae_fast.data import open_images, open_latents

    latents = open_latents(folder)
    images = open_images(latents.manifest["facts"]["images"], size=size).read(range(SHOWN))
    rows = latents.read(range(min(len(latents), 4 * POINTS))).sub(latents.mean).div(latents.std)
    tokens = rows.permute(0, 2, 3, 1).flatten(0, 2)
    _, _, axes = torch.linalg.svd(tokens - tokens.mean(dim=0), full_matrices=False)
    colours = torch.einsum("nchw,kc->nkhw", rows[:SHOWN], axes[:3])
    spread = (tokens @ axes[:3].T).std(dim=0)[:, None, None]
    pixels = (128 + 48 * colours / spread).clamp(0, 255).to(torch.uint8)
    large = torch.nn.functional.interpolate(pixels, size=(size, size), mode="nearest")
    return torch.cat((images, large)).permute(0, 2, 3, 1).contiguous().numpy()


def _components(folder: Path) -> tuple[Any, list[str]]:
    """(POINTS, 2) and the class of each."""
    import torch

    from vavae_fast.data import open_latents

    latents = open_latents(folder)
    rows = latents.read(range(min(len(latents), POINTS))).sub(latents.mean).div(latents.std).flatten(1)
    _, _, axes = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    return (rows @ axes[:2].T).numpy(), [str(int(label)) for label in latents.labels[: len(rows)]]


def _picture(path: Path, caption: str) -> str:
    from PIL import Image

    with Image.open(path) as image:
        size = image.size
    return _html.figure(_html.png_image(path.read_bytes(), (min(size[0], 320), min(size[0], 320) * size[1] // size[0]), caption), caption)


EXPERIMENT = Experiment(
    name="latents",
    title="Latents as pictures",
    look_at="What alignment does to the latents themselves: classes apart or mixed, how many directions are used, how even the density is.",
    arms=arms,
    scores=lambda scale: (CLASSES, DIMENSION, DENSITY),
    claims=claims,
    sections=pictures,
)
