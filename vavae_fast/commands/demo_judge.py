"""The demo's scores: an independent judge of digits at 8 x 8, for every arm, budget and guidance."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vavae_fast import artifacts, evaluation
from vavae_fast.commands import build
from vavae_fast.commands.demo_stages import ARMS, GUIDANCE, SHOWN, SIZE, TEST, DemoPlan, Timeline, samples_folder
from vavae_fast.commands.sample import write_samples
from vavae_fast.config import TokenizerConfig, load_config
from vavae_fast.data import digits, digits_from_images, open_images
from vavae_fast.evaluation import RBFClassifier, class_agreement, nearest_distances, pixel_frechet, psnr, spread
from vavae_fast.models import AutoencoderKL
from vavae_fast.pixels import image_grid, to_uint8, to_unit

PROTOCOL = (
    "Digits at 8 x 8, values 0 to 16, by area mean. Agreement: share of samples to which an RBF kernel classifier, fitted on "
    "the 1,437 real training digits, gives the class that was asked for. Fréchet: of pixel Gaussians, to all 1,797 real digits. "
    "Spread: within-class deviation over the real one. Nearest: L2 distance to the nearest training digit."
)


def judge(plan: DemoPlan, timeline: Timeline) -> dict[str, Any]:
    """Every score of the demo; also writes metrics.json, samples.npz, samples_unguided.npz and samples.png."""
    train, train_labels = _digits("train")
    test, test_labels = _digits("test")
    classifier = RBFClassifier().fit(train, train_labels)
    real, real_labels = torch.cat((train, test)), torch.cat((train_labels, test_labels))
    arms = {}
    for arm in ARMS:
        scores = {}
        for budget in plan.budgets:
            for guidance in GUIDANCE:
                images, labels = read_samples(samples_folder(plan, arm, budget, guidance))
                ours = digits_from_images(images, rounded=True)
                scores.setdefault(str(budget), {})[guidance] = _scores(ours, labels, classifier, real, real_labels, train)
        arms[arm] = dict(reconstruction=_reconstruction(plan, arm), lightningdit=scores)
    held_out, _ = nearest_distances(test, train)
    metrics = dict(
        protocol=PROTOCOL,
        arms=arms,
        held_out=dict(
            classifier_accuracy=class_agreement(test, test_labels, classifier).overall,
            nearest_median=float(held_out.median()),
            nearest_min=float(held_out.min()),
            frechet=pixel_frechet(test, real),
        ),
        shown=dict(arm=SHOWN, budget=plan.budgets[1]),
        stages=timeline.stages,
    )
    artifacts.write_json(plan.out / "metrics.json", artifacts.manifest("demo metrics", seed=plan.seed, **metrics))
    _publish(plan)
    return metrics


def _digits(split: str) -> tuple[Tensor, Tensor]:
    images, labels = digits(split)
    return torch.as_tensor(images, dtype=torch.float64), torch.as_tensor(labels)


def read_samples(folder: Path) -> tuple[Tensor, Tensor]:
    """samples.npz -> images (N, 3, H, W) uint8, labels (N,)."""
    return evaluation.read_samples(folder / "samples.npz")


def _scores(samples: Tensor, labels: Tensor, classifier: RBFClassifier, real: Tensor, real_labels: Tensor, train: Tensor) -> dict[str, float]:
    agreement = class_agreement(samples, labels, classifier)
    nearest, _ = nearest_distances(samples, train)
    return dict(
        agreement=agreement.overall,
        worst_class=agreement.worst,
        frechet=pixel_frechet(samples, real),
        spread=spread(samples, labels, real, real_labels),
        nearest_median=float(nearest.median()),
        nearest_min=float(nearest.min()),
    )


def tokenizer(plan: DemoPlan, arm: str) -> AutoencoderKL:
    """The trained tokenizer of an arm."""
    config = load_config(plan.configs / "demo_tokenizer.yaml", kind=TokenizerConfig)
    return build.tokenizer(config, str(plan.out / f"tokenizer-{arm}"))


@torch.inference_mode()
def reconstruct(plan: DemoPlan, arm: str, pixels: Tensor) -> Tensor:
    """uint8 (N, 3, 8, 8) -> its reconstruction from the posterior's mean, uint8."""
    model = tokenizer(plan, arm)
    return to_uint8(model.decode(model.encode(to_unit(pixels)).mode()))


def _reconstruction(plan: DemoPlan, arm: str) -> dict[str, float]:
    """Of the 360 held-out digits."""
    images = open_images(TEST, size=SIZE)
    pixels = images.read(range(len(images)))
    ours = reconstruct(plan, arm, pixels)
    return dict(psnr=float(psnr(ours, pixels).mean()), l1=float((to_unit(ours) - to_unit(pixels)).abs().mean()))


def _publish(plan: DemoPlan) -> None:
    """The arm that is shown, its digits twice as large: samples.npz, samples_unguided.npz, samples.png."""
    for name, guidance in (("samples", "guided"), ("samples_unguided", "unguided")):
        images, labels = read_samples(samples_folder(plan, SHOWN, plan.budgets[1], guidance))
        large = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).permute(0, 2, 3, 1).contiguous().numpy()
        write_samples(plan.out / f"{name}.npz", large.shape, iter([large]), labels.numpy())
        if guidance == "guided":
            with artifacts.replacing(plan.out / "samples.png") as temporary:
                image_grid(large[:100], columns=10).save(temporary, format="PNG")


def table(plan: DemoPlan, metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """The final table, header first."""
    header = ("arm", "PSNR", "steps", "guidance", "agree %", "worst %", "Fréchet", "spread", "nearest")
    rows = [header]
    for arm in ARMS:
        result = metrics["arms"][arm]
        for budget in plan.budgets:
            for guidance in GUIDANCE:
                s = result["lightningdit"][str(budget)][guidance]
                rows.append((
                    arm, f"{result['reconstruction']['psnr']:.1f}", str(budget), guidance, f"{100 * s['agreement']:.1f}",
                    f"{100 * s['worst_class']:.0f}", f"{s['frechet']:.1f}", f"{s['spread']:.2f}", f"{s['nearest_median']:.1f}",
                ))  # fmt: skip
    return rows


def verdict(plan: DemoPlan, metrics: dict[str, Any]) -> list[str]:
    """What the numbers say about the paper's point, whichever way they fall."""
    lines = []
    for budget in map(str, plan.budgets):
        scores = {arm: metrics["arms"][arm]["lightningdit"][budget]["unguided"] for arm in ARMS}
        lines.append(f"after {budget} steps, unguided: " + "; ".join(_comparison(scores, *measure) for measure in _MEASURES))
    return lines


# name, key, factor for display, digits, whether more is better
_MEASURES = (("in the requested class", "agreement", 100, "%", True), ("Fréchet distance", "frechet", 1, "", False))


def _comparison(scores: dict[str, dict[str, float]], name: str, key: str, factor: float, unit: str, more_is_better: bool) -> str:
    """`off` against `on`, and the control against `on`."""
    off, on, control = (scores[arm][key] for arm in ARMS)
    sign = 1 if more_is_better else -1

    def word(a: float, b: float) -> str:
        return "better than" if sign * a > sign * b else "no better than"

    shown = [f"{factor * value:.1f}{unit}" for value in (on, off, control)]
    return f"{name}, {shown[0]} with VF alignment is {word(on, off)} {shown[1]} without and {word(on, control)} {shown[2]} with the untrained control"
