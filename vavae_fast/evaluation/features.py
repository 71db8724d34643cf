"""Mean and covariance of features, streaming: the two moments that the Fréchet distance compares (Heusel et al. 2017).

Batches are merged by Chan, Golub & LeVeque 1983: every batch is centred on its own mean before it is squared, and all
means are kept relative to the first, so that a large mean costs no digits and the result does not move with the batch
size beyond the rounding of fp64.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from vavae_fast.evaluation.inputs import Array, finite_tensor, same_kind

_ROWS = 4096  # rows turned to fp64 at a time: 64 MB at 2,048 dimensions


def feature_statistics(features: Array | Iterable[Array]) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D) in fp64, divided by N - 1, of `features` (N, D) or of an iterable of such batches.

    NumPy gives NumPy, tensors give tensors. `ValueError`: NaN or infinity, fewer than 2 rows, batches of different D.
    """
    statistics = FeatureStatistics()
    for batch in [features] if isinstance(features, np.ndarray | Tensor) else _batches(features):
        statistics.update(batch)
    return statistics.result()


def _batches(features: Iterable[Array]) -> Iterable[Array]:
    if not isinstance(features, Iterable):
        raise ValueError(f"features: expected an array (N, D) or an iterable of them, got {type(features).__name__}")
    return features


class FeatureStatistics:
    """Running moments of the rows seen: `update(batch)`, `merge(other)`, `result()`; fp64, on the device of the first batch."""

    def __init__(self) -> None:
        self.count = 0
        self._origin: Tensor | None = None  # (D,): the mean of the first rows; means are kept relative to it
        self._mean: Tensor | None = None  # (D,)
        self._scatter: Tensor | None = None  # (D, D): sum over rows of (x - mean)(x - mean)^T
        self._kind: Array = torch.empty(0)  # `result` answers in the kind of the first batch: NumPy or tensor

    def update(self, batch: Array) -> None:
        """Add the rows of `batch` (n, D). `ValueError` leaves the statistics as they were."""
        rows = finite_tensor(batch, "features", "N, D")
        self._require_width(rows.shape[1])
        if self.count == 0 and isinstance(batch, np.ndarray):
            self._kind = np.empty(0)
        for part in rows.split(_ROWS):
            x = part.to(torch.float64)
            self._origin = x.mean(dim=0) if self._origin is None else self._origin
            x = x - self._origin
            mean = x.mean(dim=0)
            centred = x - mean
            self._add(len(x), mean)
            centred = centred.to(self._scatter.device)
            self._scatter.addmm_(centred.mT, centred)  # in place: another (D, D) for each batch would take longer than the product

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the rows that `other` has seen, as if they had come through `update`."""
        if other.count:
            self._require_width(other._mean.numel())
            if self.count == 0:
                self._kind, self._origin = other._kind, other._origin
            self._add(other.count, other._mean + (other._origin - self._origin.to(other._origin.device)))
            self._scatter += other._scatter.to(self._scatter.device)

    def result(self) -> tuple[Array, Array]:
        """Mean (D,) and covariance (D, D) of the rows so far."""
        if self.count < 2:
            raise ValueError(f"features: a covariance needs 2 rows or more, got {self.count}")
        return same_kind(self._origin + self._mean, self._kind), same_kind(self._scatter / (self.count - 1), self._kind)

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` takes: fp64 tensors by name, the count among them; none before the first row."""
        if self.count == 0:
            return {}
        return {"count": torch.tensor(self.count), "origin": self._origin, "mean": self._mean, "scatter": self._scatter}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from where `state_dict` was taken; `result` gives tensors from here on."""
        self.__init__()
        if state:
            self.count, self._origin, self._mean, self._scatter = int(state["count"]), state["origin"], state["mean"], state["scatter"].clone()

    def _add(self, count: int, mean: Tensor) -> None:
        """Rows but for their own scatter, which the caller adds: what their mean's distance adds is in."""
        if self.count == 0:
            self.count, self._mean, self._scatter = count, mean.clone(), mean.new_zeros(len(mean), len(mean))
            return
        total = self.count + count
        step = mean.to(self._mean.device) - self._mean
        self._scatter.addr_(step, step, alpha=self.count * count / total)
        self._mean += step * (count / total)
        self.count = total

    def _require_width(self, width: int) -> None:
        if self._mean is not None and width != self._mean.numel():
            raise ValueError(f"features: {width} dimensions after batches of {self._mean.numel()}")
