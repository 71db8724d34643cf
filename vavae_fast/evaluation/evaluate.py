"""ADM's evaluation (Dhariwal & Nichol 2021) in one process: FID, sFID, IS, precision, recall of any iterable of images.

Images stream through Inception once; nothing goes by way of PNG files. Every value comes with the protocol that made it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vavae_fast.errors import BadInput
from vavae_fast.evaluation.features import FeatureStatistics, feature_statistics
from vavae_fast.evaluation.frechet import frechet_distance
from vavae_fast.evaluation.inception import InceptionFeatures
from vavae_fast.evaluation.inception_score import inception_score
from vavae_fast.evaluation.inputs import Array, to_tensor
from vavae_fast.evaluation.precision_recall import precision_recall
from vavae_fast.evaluation.reference import ReferenceStatistics

METRICS = ("fid", "sfid", "is", "precision", "recall")
FEWEST_FOR_FID = 2048  # a covariance of 2,048 features has no more rank than it has images
NEIGHBOURS = 3  # k of precision and recall
SPLIT = 5000  # samples a split of the inception score
FULL_FID = 50_000  # with fewer the value is biased upwards, so its name says how many
Extractor = Callable[[Tensor], InceptionFeatures]


def evaluate_samples(
    samples: Iterable[Array],
    reference: ReferenceStatistics,
    metrics: Sequence[str],
    inception: Extractor,
    bootstrap: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Score uint8 batches (n, 3, H, W) against `reference`: {metric: value, ..., "protocol": {...}}, ready for JSON.

    `inception` is what `load_inception` gives. `bootstrap` resamples of the samples (about 10 s each at 50,000) add
    fid_standard_error. `BadInput`: unknown metrics, too few images for FID, a reference without what a metric needs.
    `ValueError`: batches of another dtype, shape or size, images all of one colour.
    """
    require_metrics(metrics, reference)
    sample = _Measured("samples", metrics, keep_pool=bootstrap > 0 and "fid" in metrics).add(samples, inception)
    require_count(sample.count, metrics)
    mu, sigma, mu_s, sigma_s, reference_pool = _reference_features(reference, metrics, inception)
    values: dict[str, Any] = {}
    if "fid" in metrics:
        values["fid"] = frechet_distance(*sample.pool.result(), mu, sigma)
    if "fid" in metrics and bootstrap:
        values["fid_standard_error"] = frechet_standard_error(torch.cat(sample.pool_rows), mu, sigma, bootstrap, seed)
    if "sfid" in metrics:
        values["sfid"] = frechet_distance(*sample.spatial.result(), mu_s, sigma_s)
    if "is" in metrics:
        values["is"] = inception_score(torch.cat(sample.logits), SPLIT)
    if {"precision", "recall"} & set(metrics):
        precision, recall = precision_recall(reference_pool, torch.cat(sample.pool_rows), NEIGHBOURS)
        values |= {name: value for name, value in (("precision", precision), ("recall", recall)) if name in metrics}
    return {**values, "protocol": _protocol(sample, reference, inception)}


def require_metrics(metrics: Sequence[str], reference: ReferenceStatistics) -> None:
    """`BadInput` unless every metric is known and `reference` holds what it needs. Reads no image."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise BadInput(f"--metrics: {', '.join(unknown) or 'none given'}; choose among {','.join(METRICS)}")
    if reference.images is not None:
        return
    held = {"fid": reference.mu, "sfid": reference.mu_s, "precision": None, "recall": None, "is": True}
    lacking = [name for name in metrics if held[name] is None]
    if lacking:
        raise BadInput(f"{reference.name}: has no images (arr_0) and no statistics for {', '.join(lacking)}; "
                       f"give a reference with images, or leave {','.join(lacking)} out of --metrics")  # fmt: skip


def require_count(count: int, metrics: Sequence[str], what: str = "samples") -> None:
    """`BadInput` when FID or sFID is asked of fewer than 2,048 images."""
    if count < FEWEST_FOR_FID and {"fid", "sfid"} & set(metrics):
        raise BadInput(f"{what}: {count} images, FID and sFID need {FEWEST_FOR_FID} or more; add images, or leave them out of --metrics")


def fid_name(count: int) -> str:
    """What a FID over `count` samples is called: FID at 50,000 or more, else FID-N."""
    return "FID" if count >= FULL_FID else f"FID-{count}"


def frechet_standard_error(features: Array, mu: Array, sigma: Array, repeats: int, seed: int = 0) -> float:
    """Bootstrap standard error of the Fréchet distance of `features` (N, D) to (mu, sigma), over `repeats` resamples.

    The spread is what resampling tells; its mean is above the value, since a resample has fewer distinct rows.
    """
    rows = to_tensor(features, "features", "N, D")
    if repeats < 2:
        raise ValueError(f"repeats: a standard error needs 2 resamples or more, got {repeats}")
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(rows), (len(rows),), generator=generator).to(rows.device) for _ in range(repeats))
    values = [frechet_distance(*feature_statistics(rows[drawn]), mu, sigma) for drawn in draws]
    return torch.tensor(values, dtype=torch.float64).std().item()


@dataclass
class _Measured:
    """What one pass over images leaves, no more than `metrics` need."""

    name: str
    metrics: Sequence[str]
    keep_pool: bool = False
    pool: FeatureStatistics = field(default_factory=FeatureStatistics)
    spatial: FeatureStatistics = field(default_factory=FeatureStatistics)
    pool_rows: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    size: tuple[int, int] | None = None
    one_colour: int = 0
    count: int = 0
    digests: set[bytes] = field(default_factory=set)

    def add(self, batches: Iterable[Array], inception: Extractor) -> "_Measured":
        keep_pool = self.keep_pool or bool({"precision", "recall"} & set(self.metrics))
        for images in self._checked(batches):
            features = inception(images)
            if "fid" in self.metrics:
                self.pool.update(features.pool)
            if "sfid" in self.metrics:
                self.spatial.update(features.spatial)
            if "is" in self.metrics:
                self.logits.append(features.logits)
            if keep_pool:
                self.pool_rows.append(features.pool)
        if self.count == self.one_colour:
            found = f"all {self.count} images are of one colour each" if self.count else "no images"
            raise ValueError(f"{self.name}: {found}; look at what was decoded")
        return self

    def _checked(self, batches: Iterable[Array]) -> Iterator[Tensor]:
        for batch in batches:
            images = to_tensor(batch, self.name, "N, 3, H, W")
            if images.dtype != torch.uint8 or images.shape[1] != 3:
                raise ValueError(f"{self.name}: expected uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
            size = tuple(images.shape[2:])
            if self.size not in (None, size):
                raise ValueError(f"{self.name}: image {self.count} is {size}, those before it are {self.size}; bring all to one size")
            self.size = size
            self.count += len(images)
            flat = images.flatten(2)
            self.one_colour += int((flat.amax(dim=2) == flat.amin(dim=2)).all(dim=1).sum())
            self.digests.update(hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in images.cpu().numpy())
            yield images

    def warnings(self) -> list[str]:
        lines = []
        if self.one_colour:
            lines.append(f"{self.name}: {self.one_colour} of {self.count} images are of one colour")
        if len(self.digests) < self.count:
            lines.append(f"{self.name}: {self.count - len(self.digests)} of {self.count} images are copies of others")
        return lines


def _reference_features(
    reference: ReferenceStatistics, metrics: Sequence[str], inception: Extractor
) -> tuple[Array, Array, Array, Array, Tensor | None]:
    """(mu, sigma, mu_s, sigma_s, pool rows): stored moments where there are any, else computed from the images."""
    computed = [name for name, held in (("fid", reference.mu), ("sfid", reference.mu_s)) if name in metrics and held is None]
    passed = computed + [name for name in ("precision", "recall") if name in metrics]
    moments, spatial, pool = (reference.mu, reference.sigma), (reference.mu_s, reference.sigma_s), None
    if passed:
        measured = _Measured(reference.name, passed).add(reference.images, inception)
        require_count(measured.count, computed, reference.name)
        moments = measured.pool.result() if "fid" in computed else moments
        spatial = measured.spatial.result() if "sfid" in computed else spatial
        pool = torch.cat(measured.pool_rows) if measured.pool_rows else None
    return *moments, *spatial, pool


def _protocol(sample: _Measured, reference: ReferenceStatistics, inception: Extractor) -> dict[str, Any]:
    sha256 = getattr(inception, "sha256", None)
    warnings = sample.warnings()
    if not getattr(inception, "recognised", False):
        warnings.append("Inception weights are not the known ones; values compare only with others of the same weights")
    return {
        "name": "adm",
        "fid_name": fid_name(sample.count),
        "samples": sample.count,
        "image_size": list(sample.size),
        "inception_sha256": sha256,
        "reference": reference.name,
        "reference_sha256": reference.sha256,
        "precision_recall_k": NEIGHBOURS,
        "inception_score_split": SPLIT,
        "warnings": warnings,
    }
