"""How evenly latents fill their space: VA-VAE's table 6, after t-SNE to two dimensions and a kernel density estimate.

The paper's "density std" is std(p) / mean(p), here `density_cv`. t-SNE moves with its seed: read the mean over repeats, or beside it the
spread of the distances to near neighbours, which needs no t-SNE.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from vavae_fast.errors import BadInput
from vavae_fast.evaluation import distances
from vavae_fast.evaluation.inputs import Array, finite_tensor, integer

PERPLEXITY = 30
NEIGHBOUR = 10  # whose distance `neighbour_distance_cv` looks at
_SEEDS = 1 << 32  # those of NumPy's RandomState, which t-SNE starts from


class Embedding(NamedTuple):
    """One t-SNE of latents: points (N, 2) and the density (N,) at each."""

    points: np.ndarray
    density: np.ndarray


def uniformity(latents: Array, seed: int = 0, repeats: int = 1) -> dict[str, float]:
    """density_cv, normalized_entropy and gini of `latents` (N, D): means over `repeats` seeds from `seed` on; *_std over them.

    Evenly spread: density_cv and gini towards 0, normalized_entropy towards 1. `ValueError`: NaN or infinity, 30 rows or
    fewer, repeats or seeds that are not integers, or seeds outside [0, 2**32). Needs scikit-learn and SciPy.
    """
    return summary(density_statistics(found.density) for found in embeddings(latents, seed, repeats))


def summary(runs: Iterable[dict[str, float]]) -> dict[str, float]:
    """Each name's mean over `runs`, and under name_std its standard deviation (population)."""
    columns: dict[str, list[float]] = {}
    for run in runs:
        for name, value in run.items():
            columns.setdefault(name, []).append(value)
    return {key: value for name, values in columns.items() for key, value in ((name, float(np.mean(values))), (f"{name}_std", float(np.std(values))))}


def embeddings(latents: Array, seed: int = 0, repeats: int = 1) -> Iterator[Embedding]:
    """The t-SNE of `latents` (N, D) for each of the `repeats` seeds from `seed` on, as it is computed. Errors as of `uniformity`, at once."""
    points = finite_tensor(latents, "latents", "N, D").float().cpu().numpy()
    if len(points) <= PERPLEXITY:
        raise ValueError(f"latents: t-SNE at perplexity {PERPLEXITY} needs more than {PERPLEXITY} rows, got {len(points)}")
    repeats = integer(repeats, "repeats", 1, _SEEDS)
    seed = integer(seed, "seed", 0, _SEEDS - repeats)
    placed = (embed(points, seed + i) for i in range(repeats))
    return (Embedding(places, density_at_points(places)) for places in placed)


def neighbour_distance_cv(latents: Array, k: int = NEIGHBOUR) -> float:
    """std / mean of the distances from each of `latents` (N, D) to its k-th neighbour: 0 on a lattice, larger the more they cluster.

    Exact, a function of the latents alone. It depends on D as much as on evenness: compare latents of one width. `ValueError`: NaN or
    infinity, k rows or fewer, latents of which more than k coincide everywhere.
    """
    points = finite_tensor(latents, "latents", "N, D")
    if integer(k, "k", 1) >= len(points):
        raise ValueError(f"latents: the distance to neighbour {k} needs more than {k} rows, got {len(points)}")
    distance = distances.nearest(points, points, k, skip_self=True)[0][:, -1].sqrt()
    if not distance.any():
        raise ValueError(f"latents: every one has {k} copies or more, so no distance is above 0; are they all the same?")
    return float(distance.std(correction=0) / distance.mean())


def embed(points: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE (van der Maaten & Hinton 2008): points (N, D) -> (N, 2). scikit-learn's default is 1,000 iterations."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise BadInput(_MISSING.format("scikit-learn")) from None
    return TSNE(n_components=2, perplexity=PERPLEXITY, init="random", random_state=seed).fit_transform(points)


def density_at_points(points: np.ndarray) -> np.ndarray:
    """Gaussian kernel density, Scott's bandwidth, of points (N, 2) at themselves: (N,)."""
    try:
        from scipy.stats import gaussian_kde
    except ImportError:
        raise BadInput(_MISSING.format("scipy")) from None
    columns = points.astype(np.float64).T
    try:
        return gaussian_kde(columns)(columns)
    except np.linalg.LinAlgError:
        raise ValueError("latents: their t-SNE lies on a line or a point, so it has no density; are they all the same?") from None


def density_statistics(p: np.ndarray) -> dict[str, float]:
    """p (N,) positive -> std(p) / mean(p); entropy of p / sum(p) over log N; Gini coefficient of p."""
    n = len(p)
    share = p / p.sum()
    positive = share[share > 0]
    rank = np.arange(1, n + 1)
    return {
        "density_cv": float(share.std() * n),
        "normalized_entropy": float(-(positive * np.log(positive)).sum() / np.log(n)),
        "gini": float(((2 * rank - n - 1) * np.sort(share)).sum() / n),
    }


_MISSING = "uniformity: {} is not installed; pip install 'vavae-fast[analyze]'"
