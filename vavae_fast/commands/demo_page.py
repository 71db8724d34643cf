"""The demo's page: scores, pictures, curves, the latent space, time and memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vavae_fast import artifacts
from vavae_fast.commands import demo_judge
from vavae_fast.commands._html import figure, page, paragraph, png_grid, scatter, svg_lines, table
from vavae_fast.commands.demo_stages import ARMS, SHOWN, SIZE, TEST, TRAIN, DemoPlan, Timeline, samples_folder
from vavae_fast.data import digits_from_images, open_images, open_latents
from vavae_fast.evaluation import nearest_distances
from vavae_fast.pixels import image_grid

ABOUT = (
    "A VA-VAE (f4, 16 channels) and a LightningDiT, trained here from nothing on 1,797 handwritten digits (UCI Optical Recognition of "
    "Handwritten Digits) by the commands that train them on ImageNet. Where the paper uses pretrained networks this page uses stand-ins: "
    "a small ViT, trained on the same digits without labels, for DINOv2; a small classifier of digits for VGG16 in LPIPS; a kernel "
    "classifier for Inception. No number here compares with a published one."
)


def write_page(plan: DemoPlan, metrics: dict[str, Any], timeline: Timeline) -> Path:
    """<out>/report.html, one self-contained file."""
    files = (
        f"samples.npz: guided, {ARMS[SHOWN]}, {plan.budgets[1]} steps; samples_unguided.npz: the same labels without guidance; each pixel "
        "of a digit is twice as wide and high there. metrics.json: all scores; tokenizer-*, latents-*, lightningdit-*, samples-*: every run."
    )
    sections = [
        ("What this is", paragraph(ABOUT)),
        ("Scores", _scores(plan, metrics)),
        ("Generated digits", _generated(plan)),
        ("Reconstructions", _reconstructions(plan)),
        ("Curves", _curves(plan)),
        ("The latent space", _latent_space(plan)),
        ("Time and memory", _times(metrics, timeline)),
        ("Files", paragraph(files)),
    ]
    artifacts.write_text(plan.out / "report.html", page("vavae-fast demo", sections))
    return plan.out / "report.html"


def write_overview(plan: DemoPlan) -> Path:
    """<out>/overview.png: held-out digits and their reconstructions, then guided samples, a row a class."""
    images = open_images(TEST, size=SIZE)
    pixels = images.read(range(20))
    samples, labels = demo_judge.read_samples(samples_folder(plan, SHOWN, plan.budgets[1], "guided"))
    rows = [samples[(labels == digit).nonzero()[:20, 0]] for digit in range(10)]
    sheet = image_grid(_nhwc(torch.cat((pixels, demo_judge.reconstruct(plan, SHOWN, pixels), *rows))), columns=20, border=1)
    with artifacts.replacing(plan.out / "overview.png") as temporary:
        sheet.resize((4 * sheet.width, 4 * sheet.height), resample=0).save(temporary, format="PNG", optimize=True)
    return plan.out / "overview.png"


def _scores(plan: DemoPlan, metrics: dict[str, Any]) -> str:
    held = metrics["held_out"]
    real = (
        f"For comparison, real held-out digits: classifier accuracy {100 * held['classifier_accuracy']:.1f} %, Fréchet {held['frechet']:.1f}, "
        f"median distance to the nearest training digit {held['nearest_median']:.1f}, smallest {held['nearest_min']:.1f}."
    )
    findings = "".join(paragraph(line[0].upper() + line[1:] + ".") for line in demo_judge.verdict(plan, metrics))
    return table(demo_judge.table(plan, metrics)) + findings + paragraph(real) + paragraph(metrics["protocol"])


def _generated(plan: DemoPlan) -> str:
    """A block a class: generated digits, below them the nearest training digit of each, below real ones."""
    images, labels = demo_judge.read_samples(samples_folder(plan, SHOWN, plan.budgets[1], "guided"))
    training = open_images(TRAIN, size=SIZE)
    real = training.read(range(len(training)))
    columns, blocks = 10, []
    _, nearest = nearest_distances(digits_from_images(images), digits_from_images(real))
    for digit in range(10):
        ours = (labels == digit).nonzero()[:columns, 0]
        theirs = (training.labels == digit).nonzero()[: len(ours), 0]
        rows = torch.cat((images[ours], real[torch.as_tensor(nearest)[ours]], real[theirs]))
        blocks.append(png_grid(_nhwc(rows), max(len(ours), 1), 4, f"digit {digit}"))
    caption = "For each digit: generated with guidance (top), the nearest training digit of each (middle), real training digits (bottom)."
    unguided, _ = demo_judge.read_samples(samples_folder(plan, SHOWN, plan.budgets[1], "unguided"))
    freely = png_grid(_nhwc(unguided[:100]), 10, 4, "unguided samples")
    return figure("".join(blocks), caption) + figure(freely, "Without guidance, one column a digit.")


def _reconstructions(plan: DemoPlan) -> str:
    images = open_images(TEST, size=SIZE)
    pixels = images.read(range(20))
    rows = [pixels, *(demo_judge.reconstruct(plan, arm, pixels) for arm in ARMS)]
    caption = "Held-out digits (top), then reconstructed: " + "; ".join(ARMS.values()) + "."
    return figure(png_grid(_nhwc(torch.cat(rows)), len(pixels), 4, "reconstructions"), caption)


def _curves(plan: DemoPlan) -> str:
    plots = ""
    for stage, key, title in (
        ("lightningdit", "mse", "LightningDiT: velocity error (not comparable between arms: each has its own latents)"),
        ("tokenizer", "rec", "tokenizer: mean absolute reconstruction error"),
        ("tokenizer", "mcos", "tokenizer: VF loss, marginal cosine part"),
        ("tokenizer", "mdms", "tokenizer: VF loss, marginal distance-matrix part"),
    ):
        series = {arm: [(row["step"], row[key]) for row in _logged(plan.out / f"{stage}-{arm}") if key in row] for arm in ARMS}
        plots += svg_lines(series, title)
    return plots


def _logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _latent_space(plan: DemoPlan) -> str:
    """The first two principal components of each arm's latents, coloured by class."""
    plots = ""
    for arm, name in ARMS.items():
        latents = open_latents(plan.out / f"latents-{arm}")
        rows = latents.read(range(len(latents))).sub(latents.mean).div(latents.std).flatten(1)
        rows = rows - rows.mean(dim=0)
        _, _, axes = torch.linalg.svd(rows, full_matrices=False)
        points = rows @ axes[:2].T
        plots += scatter(points[:700].numpy(), [str(int(label)) for label in latents.labels[:700]], name)
    return figure(plots, "700 training latents of each arm on their first two principal components; colours are digits.")


def _times(metrics: dict[str, Any], timeline: Timeline) -> str:
    rows = [("stage", "seconds", "peak memory of its process, GB")]
    rows += [(s["stage"], f"{s['seconds']:.0f}", f"{s['memory_gb']:.2f}") for s in timeline.stages]
    return table(rows) + paragraph("Stages run side by side; a process keeps the peak of the stages before.")


def _nhwc(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).contiguous().numpy()
