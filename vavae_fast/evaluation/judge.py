"""A judge for small labelled image sets that needs no pretrained network: a stand-in for FID where Inception means nothing.

It scores the demo's 8 x 8 digits. No number of it is comparable with a published one, and no single one of it suffices:
ten class means agree with their labels perfectly, so read agreement together with spread, distance and nearest copies.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vavae_fast.evaluation import distances
from vavae_fast.evaluation.features import feature_statistics
from vavae_fast.evaluation.frechet import frechet_distance
from vavae_fast.evaluation.inputs import Array, finite_tensor, same_kind, to_tensor


class Agreement(NamedTuple):
    """Share of samples that the classifier gives their own label."""

    overall: float
    worst: float  # the lowest share of any class
    per_class: dict[int, float]


def pixel_frechet(samples: Array, reference: Array) -> float:
    """Fréchet distance of the Gaussians of flattened pixels: samples (N, ...), reference (M, ...) -> float, in pixel units squared."""
    return frechet_distance(*feature_statistics(_rows(samples, "samples")), *feature_statistics(_rows(reference, "reference")))


class RBFClassifier:
    """Kernel ridge regression on one-hot labels, one against all, kernel exp(-gamma |a - b|^2): one linear solve, no seed.

    gamma None: 1 / (D var(x)) of the training set, which suits pixels of any range.
    """

    def __init__(self, gamma: float | None = None, ridge: float = 1e-2):
        self.gamma, self.ridge = gamma, ridge
        self.classes: Tensor | None = None

    def fit(self, x: Array, y: Array) -> "RBFClassifier":
        """Training points x (N, ...), labels y (N,) integers; takes N^3 / 3 operations. Returns itself."""
        points = _rows(x, "x")
        labels = _labels(y, len(points))
        variance = points.var(correction=0).item()
        if variance == 0:
            raise ValueError("x: all values are the same, there is nothing to learn from")
        self.scale = self.gamma if self.gamma is not None else 1 / (points.shape[1] * variance)
        self.classes, index = labels.unique(return_inverse=True)
        target = torch.nn.functional.one_hot(index, len(self.classes)).to(torch.float64)
        kernel = self._kernel(points, points)
        kernel.diagonal().add_(self.ridge)
        self.points, self.weights = points, torch.linalg.solve(kernel, target)
        return self

    def predict(self, x: Array) -> Array:
        """x (N, ...) -> labels (N,) int64."""
        if self.classes is None:
            raise ValueError("RBFClassifier: predict before fit")
        points = _rows(x, "x")
        if points.shape[1] != self.points.shape[1]:
            raise ValueError(f"x: {points.shape[1]} values a point, fitted on {self.points.shape[1]}")
        scores = [self._kernel(part, self.points) @ self.weights for part in points.split(distances.BLOCK)]
        return same_kind(self.classes[torch.cat(scores).argmax(dim=1)], x)

    def _kernel(self, a: Tensor, b: Tensor) -> Tensor:
        return distances.expanded(a, b)[0].mul_(-self.scale).exp_()


def class_agreement(samples: Array, labels: Array, classifier: RBFClassifier) -> Agreement:
    """How often `classifier` gives samples (N, ...) the labels (N,) they were drawn for."""
    predicted = torch.as_tensor(classifier.predict(samples)).cpu()
    wanted = _labels(labels, len(predicted))
    right = predicted == wanted
    per_class = {int(c): right[wanted == c].double().mean().item() for c in wanted.unique()}
    return Agreement(right.double().mean().item(), min(per_class.values()), per_class)


def spread(samples: Array, sample_labels: Array, real: Array, real_labels: Array) -> float:
    """Within-class spread of samples (N, ...) over that of real images: 1 as varied as they are, 0 one image a class.

    Spread of a set: the mean over its classes of sqrt(tr cov(class)).
    """
    ours, theirs = _class_spread(samples, sample_labels, "samples"), _class_spread(real, real_labels, "real")
    if theirs == 0:
        raise ValueError("real: every class is one image over and over; there is no spread to compare with")
    return ours / theirs


def nearest_distances(samples: Array, train: Array) -> tuple[Array, Array]:
    """(distances, indices) (N,) of the nearest of train (M, ...) to each of samples (N, ...), L2; 0 for exact copies."""
    points, others = _rows(samples, "samples"), _rows(train, "train")
    if points.shape[1] != others.shape[1]:
        raise ValueError(f"samples have {points.shape[1]} values each, train has {others.shape[1]}")
    squared, indices = distances.nearest(points, others, k=1)
    return same_kind(squared[:, 0].sqrt(), samples), same_kind(indices[:, 0], samples)


def _class_spread(points: Array, labels: Array, name: str) -> float:
    rows = _rows(points, name)
    classes = _labels(labels, len(rows))
    groups = [rows[classes == c] for c in classes.unique()]
    small = min(len(group) for group in groups)
    if small < 2:
        raise ValueError(f"{name}: a class has {small} image; a spread needs 2 or more of every class")
    return torch.stack([group.var(dim=0).sum().sqrt() for group in groups]).mean().item()


def _rows(points: Array, name: str) -> Tensor:
    """Points (N, ...) as fp64 (N, D) on the CPU: these sets are small."""
    return finite_tensor(points, name, "N, ...").to("cpu", torch.float64).flatten(1)


def _labels(labels: Array, count: int) -> Tensor:
    tensor = to_tensor(labels, "labels", "N").cpu()
    if tensor.is_floating_point() or len(tensor) != count:
        raise ValueError(f"labels: expected {count} integers, got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.to(torch.int64)
