"""A problem with known answers: data x1 ~ N(MEAN, STD^2) in each coordinate, so that every x_t is Gaussian."""

from torch import Tensor

from vavae_fast.flow import Path

MEAN, STD = 1.5, 0.4


def moments(path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x_t."""
    return path.alpha(t) * MEAN, (path.alpha(t) * STD) ** 2 + path.sigma(t) ** 2


def predictions(path: Path, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """What a perfect network answers at x (B, D), t (B,): E[v | x_t = x], the score, E[x0 | x_t = x]."""
    t = t.reshape(-1, 1)
    mean, variance = moments(path, t)
    score = -(x - mean) / variance
    slope = path.d_alpha(t) * path.alpha(t) * STD**2 + path.d_sigma(t) * path.sigma(t)  # half of d variance / dt
    return {"velocity": path.d_alpha(t) * MEAN - slope * score, "score": score, "noise": -path.sigma(t) * score}
