"""Fréchet distance of two Gaussians (Dowson & Landau 1982; FID: Heusel et al. 2017, eq. 6), in fp64, without SciPy's `sqrtm`.

    d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2

For any factors S = A A^T the eigenvalues of S1 S2 are the squared singular values of A1^T A2, so

    tr (S1 S2)^1/2 = sum of the singular values of A1^T A2.

Singular values carry an absolute error of eps |A1||A2|; square roots of eigenvalues near zero would carry sqrt(eps).
"""

import torch
from torch import Tensor

from vavae_fast.evaluation.inputs import Array, finite_tensor

_SYMMETRY = 1e-5  # relative to the largest entry: what sums in fp32 may leave between mirrored entries
_NEGATIVE = 1e-3  # relative to the largest: how far below zero they may leave a variance or an eigenvalue
_EPS = torch.finfo(torch.float64).eps


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """d^2 above, the number that FID reports: means (D,), covariances (D, D) -> float, 0 or more.

    Exact to rounding on rank-deficient and on ill-conditioned covariances. `ValueError`: other shapes, NaN or infinity,
    a covariance that is not symmetric or not positive semi-definite.
    """
    m1, s1 = _gaussian(mu1, sigma1, "1")
    m2, s2 = _gaussian(mu2, sigma2, "2")
    if m1.shape != m2.shape:
        raise ValueError(f"mu1 has {len(m1)} dimensions, mu2 has {len(m2)}: they come from different features")
    difference = m1 - m2
    distance = difference @ difference + s1.trace() + s2.trace() - 2 * _trace_sqrt_product(s1, s2)
    return max(distance.item(), 0.0)  # never negative in exact arithmetic


def _gaussian(mu: Array, sigma: Array, which: str) -> tuple[Tensor, Tensor]:
    """Mean and symmetric covariance in fp64, on the CPU, so that no value depends on the device."""
    mean = finite_tensor(mu, f"mu{which}", "D").to("cpu", torch.float64)
    covariance = finite_tensor(sigma, f"sigma{which}", "D, D").to("cpu", torch.float64)
    if covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"sigma{which}: expected shape {(len(mean), len(mean))} beside mu{which}, got {tuple(covariance.shape)}")
    asymmetry, largest = (covariance - covariance.mT).abs().max().item(), covariance.abs().max().item()
    if asymmetry > _SYMMETRY * largest:
        raise ValueError(f"sigma{which}: not symmetric, mirrored entries differ by up to {asymmetry:.3g} (largest entry {largest:.3g})")
    variance = covariance.diagonal()
    if variance.min() < -_NEGATIVE * largest:
        raise ValueError(f"sigma{which}: a negative variance, {variance.min().item():.3g}: not a covariance")
    if (covariance.abs() * (variance <= 0)).max() > _NEGATIVE * largest:
        raise ValueError(f"sigma{which}: a dimension without variance has covariances: not positive semi-definite")
    return mean, (covariance + covariance.mT) / 2


def _trace_sqrt_product(s1: Tensor, s2: Tensor) -> Tensor:
    """tr (S1 S2)^1/2, in coordinates where both have the same variances.

    T S1 T and T^-1 S2 T^-1 have a product similar to S1 S2; T = (diag S2 / diag S1)^1/4 gives both the diagonal
    (diag S1 diag S2)^1/2. Features whose variances span many orders thus lose no digits; a dimension without variance in
    one of the two adds nothing.
    """
    d1, d2 = s1.diagonal(), s2.diagonal()
    alive = (d1 > 0) & (d2 > 0)
    if not alive.any():
        return s1.new_zeros(())
    t = (d2[alive].log() - d1[alive].log()).div(4).exp()
    a1 = _factor(s1[alive][:, alive] * t * t[:, None], "sigma1")
    a2 = _factor(s2[alive][:, alive] / t / t[:, None], "sigma2")
    return torch.linalg.svdvals(a1.mT @ a2).sum()


def _factor(s: Tensor, name: str) -> Tensor:
    """A (D, R) with S = A A^T: Cholesky; where a pivot is lost in rounding, eigenvectors without the eigenvalues that are."""
    rounding = len(s) * _EPS
    lower, failed = torch.linalg.cholesky_ex(s)
    if not failed and (lower.diagonal().square() > 100 * rounding * s.diagonal()).all():
        return lower
    values, vectors = torch.linalg.eigh(s)
    if values[0] < -_NEGATIVE * values[-1]:
        raise ValueError(f"{name}: not positive semi-definite, eigenvalues from {values[0].item():.3g} to {values[-1].item():.3g}")
    kept = values > rounding * values[-1]
    return vectors[:, kept] * values[kept].sqrt()
