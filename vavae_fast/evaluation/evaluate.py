"""ADM's evaluation (Dhariwal & Nichol 2021) in one process: FID, sFID, IS, precision, recall of any iterable of images.

Images stream through Inception once; nothing goes by way of PNG files. Every value comes with the protocol that made it. One more
is ours: fd, the Fréchet distance in the space of another network, of the user's choice.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
FRECHET_ELSEWHERE = "fd"
FEWEST_FOR_FID = 2048  # a covariance of 2,048 features has no more rank than it has images
NEIGHBOURS = 3  # k of precision and recall
SPLIT = 5000  # samples a split of the inception score
FULL_FID = 50_000  # with fewer the value is biased upwards, so its name says how many
Extractor = Callable[[Tensor], InceptionFeatures]
Embedding = Callable[[Tensor], Tensor]  # uint8 (n, 3, H, W) -> (n, D); with `name` and `sha256` for the protocol


def evaluate_samples(
    samples: Iterable[Array],
    reference: ReferenceStatistics,
    metrics: Sequence[str],
    inception: Extractor | None,
    bootstrap: int = 0,
    seed: int = 0,
    embedding: Embedding | None = None,
) -> dict[str, Any]:
    """Score uint8 batches (n, 3, H, W) against `reference`: {metric: value, ..., "protocol": {...}}, ready for JSON.

    `inception` is what `load_inception` gives; None where only fd is asked for, of the features that `embedding` makes. `bootstrap`
    resamples of the samples (of FID about 10 s each at 50,000) add <metric>_standard_error; an interval of 95 % is the value
    plus or minus 1.96 of them. `BadInput`: unknown metrics, too few images for one, a reference without what a metric needs.
    `ValueError`: batches of another dtype, shape or size, images all of one colour, features that are not finite, a reference
    of other features. No value moves with the order of the images but IS, which is defined by it.
    """
    require_metrics(metrics, reference, embedding is not None)
    sample = _Measured("samples", metrics, reference, keep_rows=bootstrap > 0).add(samples, inception, embedding)
    require_count(sample.count, metrics)
    others = _reference_features(reference, metrics, inception, embedding)
    values: dict[str, Any] = {}
    for name in ("fid", "sfid", FRECHET_ELSEWHERE):
        if name in metrics:
            values[name] = frechet_distance(*sample.moments[name].result(), *others.moments[name])
            if bootstrap:
                values[f"{name}_standard_error"] = frechet_standard_error(sample.rows(name), *others.moments[name], bootstrap, seed)
    if "is" in metrics:
        values["is"] = inception_score(torch.cat(sample.logits), SPLIT)
        if bootstrap:
            values["is_standard_error"] = _resampled(torch.cat(sample.logits), lambda rows: inception_score(rows, SPLIT), bootstrap, seed)
    if {"precision", "recall"} & set(metrics):
        found = dict(zip(("precision", "recall"), precision_recall(others.pool, sample.rows("fid"), NEIGHBOURS)))
        for name, judged in (("precision", sample.count), ("recall", len(others.pool))):
            if name in metrics:
                values[name] = found[name]
                if bootstrap:  # of the points judged, the other set's manifold held: a share's resampling has this spread
                    values[f"{name}_standard_error"] = (found[name] * (1 - found[name]) / judged) ** 0.5
    return {**values, "protocol": _protocol(sample, others.measured, reference, inception, embedding, bootstrap)}


def require_metrics(metrics: Sequence[str], reference: ReferenceStatistics, embedded: bool = False) -> None:
    """`BadInput` unless every metric is known and `reference` holds what it needs; fd is known with an embedding. Reads no image."""
    known = (*METRICS, FRECHET_ELSEWHERE) if embedded else METRICS
    unknown = [name for name in metrics if name not in known]
    if unknown or not metrics:
        raise BadInput(f"--metrics: {', '.join(unknown) or 'none given'}; choose among {','.join(known)}")
    if reference.images is not None:
        return
    held = {"fid": reference.mu, "sfid": reference.mu_s, "precision": None, "recall": None, "is": True, FRECHET_ELSEWHERE: None}
    lacking = [name for name in metrics if held[name] is None]
    if lacking:
        raise BadInput(f"{reference.name}: has no images (arr_0) and no statistics for {', '.join(lacking)}; "
                       f"give a reference with images, or leave {','.join(lacking)} out of --metrics")  # fmt: skip


def require_count(count: int, metrics: Sequence[str], what: str = "samples") -> None:
    """`BadInput` when FID or sFID is asked of fewer than 2,048 images, precision or recall of no more than a point has neighbours."""
    for names, fewest in ((("fid", "sfid"), FEWEST_FOR_FID), (("precision", "recall"), NEIGHBOURS + 1)):
        if count < fewest and set(names) & set(metrics):
            called = "FID and sFID" if "fid" in names else "precision and recall"
            raise BadInput(f"{what}: {count} images, {called} need {fewest} or more; add images, or leave them out of --metrics")


def of_images(metrics: Sequence[str], reference: ReferenceStatistics) -> list[str]:
    """Those of `metrics` for which the reference's images are looked at; of the others it has stored moments, or they need none."""
    stored = {"fid": reference.mu, "sfid": reference.mu_s}
    return [name for name in metrics if name != "is" and stored.get(name) is None]


def fid_name(count: int) -> str:
    """What a FID over `count` samples is called: FID at 50,000 or more, else FID-N."""
    return "FID" if count >= FULL_FID else f"FID-{count}"


def frechet_standard_error(features: Array, mu: Array, sigma: Array, repeats: int, seed: int = 0) -> float:
    """Bootstrap standard error of the Fréchet distance of `features` (N, D) to (mu, sigma), over `repeats` resamples.

    The spread is what resampling tells; its mean is above the value, since a resample has fewer distinct rows.
    """
    rows = to_tensor(features, "features", "N, D")
    return _resampled(rows, lambda drawn: frechet_distance(*feature_statistics(drawn), mu, sigma), repeats, seed)


def _resampled(rows: Tensor, score: Callable[[Tensor], float], repeats: int, seed: int) -> float:
    """Standard deviation of `score` over resamples of the rows, with replacement."""
    if repeats < 2:
        raise ValueError(f"repeats: a standard error needs 2 resamples or more, got {repeats}")
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(rows), (len(rows),), generator=generator).to(rows.device) for _ in range(repeats))
    return torch.tensor([score(rows[drawn]) for drawn in draws], dtype=torch.float64).std().item()


@dataclass
class _Measured:
    """What one pass over images leaves, no more than `metrics` need; `keep_rows`: features too, not only their moments."""

    name: str
    metrics: Sequence[str]
    reference: ReferenceStatistics  # whose stored moments, where there are any, are of the same features
    keep_rows: bool = False
    moments: dict[str, FeatureStatistics] = field(default_factory=lambda: defaultdict(FeatureStatistics))
    kept: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    logits: list[Tensor] = field(default_factory=list)
    size: tuple[int, int] | None = None
    one_colour: int = 0
    count: int = 0
    digests: list[bytes] = field(default_factory=list)

    def add(self, batches: Iterable[Array], inception: Extractor | None, embedding: Embedding | None) -> "_Measured":
        manifolds = bool({"precision", "recall"} & set(self.metrics))
        for images in self._checked(batches):
            found = {FRECHET_ELSEWHERE: embedding(images)} if FRECHET_ELSEWHERE in self.metrics else {}
            if set(self.metrics) - {FRECHET_ELSEWHERE}:
                features = inception(images)
                found |= {"fid": features.pool, "sfid": features.spatial}
                if "is" in self.metrics:
                    self.logits.append(features.logits)
            for name, rows in found.items():
                if name in self.metrics:
                    self._require_stored_width(name, rows.shape[1])
                    self.moments[name].update(rows)
                if (self.keep_rows and name in self.metrics) or (manifolds and name == "fid"):
                    self.kept[name].append(rows)
        if self.count == self.one_colour:
            found = f"all {self.count} images are of one colour each" if self.count else "no images"
            raise ValueError(f"{self.name}: {found}; look at what was decoded")
        return self

    def rows(self, name: str) -> Tensor:
        return torch.cat(self.kept[name])

    def pixels_sha256(self) -> str:
        """Of all images, whatever their order and the file they came in."""
        return hashlib.sha256(b"".join(sorted(self.digests))).hexdigest()

    def _require_stored_width(self, name: str, width: int) -> None:
        mu = {"fid": self.reference.mu, "sfid": self.reference.mu_s}.get(name)
        if mu is not None and len(mu) != width:
            raise ValueError(f"{self.name}: features of {width} dimensions for {name}, {self.reference.name} holds moments of {len(mu)}; "
                             "give statistics of the same network")  # fmt: skip

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
            flat = images.flatten(2).contiguous()
            self.one_colour += _one_colour(flat)
            self.digests.extend(hashlib.sha256(row).digest() for row in flat.cpu().numpy())  # which processors compute, at 1 GB a second
            yield images

    def warnings(self) -> list[str]:
        lines = []
        if self.one_colour:
            lines.append(f"{self.name}: {self.one_colour} of {self.count} images are of one colour")
        if copies := self.count - len(set(self.digests)):
            lines.append(f"{self.name}: {copies} of {self.count} images are copies of others")
        return lines


def _one_colour(flat: Tensor) -> int:
    """How many of `flat` (n, 3, pixels) have one value a channel; nearly all are told by their first pixels."""
    perhaps = (flat[..., :64] == flat[..., :1]).flatten(1).all(dim=1)
    return int((flat[perhaps] == flat[perhaps][..., :1]).flatten(1).all(dim=1).sum())


class _Others(NamedTuple):
    """Of the reference: (mu, sigma) by metric, pool rows for precision and recall, and the pass over its images, if one was needed."""

    moments: dict[str, tuple[Array, Array]]
    pool: Tensor | None
    measured: "_Measured | None"


def _reference_features(
    reference: ReferenceStatistics, metrics: Sequence[str], inception: Extractor | None, embedding: Embedding | None
) -> _Others:
    """Stored moments where there are any, else computed from the images."""
    stored = {"fid": (reference.mu, reference.sigma), "sfid": (reference.mu_s, reference.sigma_s)}
    moments = {name: pair for name, pair in stored.items() if pair[0] is not None}
    needed = of_images(metrics, reference)
    if not needed:
        return _Others(moments, None, None)
    measured = _Measured(reference.name, needed, reference).add(reference.images, inception, embedding)
    require_count(measured.count, needed, reference.name)
    manifolds = {"precision", "recall"} & set(needed)
    computed = {name: measured.moments[name].result() for name in needed if name not in manifolds}
    return _Others(moments | computed, measured.rows("fid") if manifolds else None, measured)


def _protocol(
    sample: _Measured,
    real: _Measured | None,
    reference: ReferenceStatistics,
    inception: Extractor | None,
    embedding: Embedding | None,
    bootstrap: int,
) -> dict[str, Any]:
    warnings = sample.warnings()
    if real is not None and real.size != sample.size:
        sizes = [" x ".join(map(str, measured.size)) for measured in (real, sample)]
        warnings.append(f"{reference.name}: images of {sizes[0]} pixels, the samples have {sizes[1]}")
    if inception is not None and not getattr(inception, "recognised", False):
        warnings.append("Inception weights are not the known ones; values compare only with others of the same weights")
    return {
        "name": "adm",
        "fid_name": fid_name(sample.count),
        "samples": sample.count,
        "samples_sha256": sample.pixels_sha256(),
        "image_size": list(sample.size),
        "inception_sha256": getattr(inception, "sha256", None),
        "fd_features": None if embedding is None else getattr(embedding, "name", type(embedding).__name__),
        "fd_sha256": getattr(embedding, "sha256", None),
        "reference": reference.name,
        "reference_sha256": reference.sha256 or (real and real.pixels_sha256()),
        "precision_recall_k": NEIGHBOURS,
        "inception_score_split": SPLIT,
        "bootstrap": bootstrap,
        "warnings": warnings,
    }
