"""Probability paths x_t = alpha(t) x1 + sigma(t) x0 between noise x0 ~ N(0, I) at t = 0 and data x1 at t = 1.

Albergo et al. 2023, "Stochastic interpolants"; Ma et al. 2024 (SiT), section 2 and table 1. A path is one row of
coefficients; everything else (target velocity, score, drift and diffusion of the SDE) follows from them:

    velocity   v = d_alpha x1 + d_sigma x0            score   s = -x0 / sigma            so  v = rate x + spread s
    rate       d_alpha / alpha                        spread  rate sigma^2 - sigma d_sigma

Times are (B,), one per sample, or a () tensor for all of them. A () tensor may stay on the CPU: PyTorch passes it to
GPU operators as a scalar, without a copy and without waiting for the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

import torch
from torch import Tensor

from vavae_fast.errors import BadInput

Named = TypeVar("Named")
_BETA_MIN, _BETA_MAX = 0.1, 20.0  # Song et al. 2021, appendix C


def look_up(table: dict[str, Named], name: str, what: str, any_case: bool = False) -> Named:
    """table[name], or a `BadInput` that names the nearest entry. any_case: the table's keys are lower case, the name any."""
    if isinstance(name, str) and (key := name.lower() if any_case else name) in table:
        return table[key]
    near = get_close_matches(str(name), table, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise BadInput(f"{what}: {name!r} is not one of {', '.join(table)}{hint}")


def like(t: Tensor, x: Tensor) -> Tensor:
    """t () or (B,) -> broadcastable against x (B, ...)."""
    return t if t.ndim == 0 else t.reshape(-1, *[1] * (x.ndim - 1))


def batch_time(t: Tensor, x: Tensor) -> Tensor:
    """t () or (B,) -> (B,) of x's dtype on x's device: what a network takes.

    A () tensor on the CPU is written by a fill, since a copy from pageable memory would wait for the device.
    """
    if t.ndim == 0 and t.device.type == "cpu":
        return x.new_full((x.shape[0],), t.item())
    return t.to(device=x.device, dtype=x.dtype).expand(x.shape[0])


def require_like(pred: Tensor, x: Tensor) -> Tensor:
    """A model's output `pred` for x, or `BadInput` where it has another shape and would broadcast in silence."""
    if not isinstance(pred, Tensor):
        raise BadInput(f"the model returned a {type(pred).__name__} for an input of shape {tuple(x.shape)}; expected a tensor of that shape")
    if pred.shape != x.shape:
        raise BadInput(f"the model returned shape {tuple(pred.shape)} for an input of shape {tuple(x.shape)}; they must agree")
    return pred


@dataclass(frozen=True)
class Path:
    """Coefficients of one path as functions of t, elementwise. `rate` and `spread` are closed forms, finite wherever
    the limit is, so that VP needs no quotient of vanishing terms."""

    alpha: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]
    rate: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]
    starts_at_noise: bool  # alpha(0) = 0: rate and spread are infinite at t = 0

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """x0, x1 (B, ...), t -> x_t (B, ...)."""
        t = like(t, x1)
        return self.alpha(t) * x1 + self.sigma(t) * x0

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """d x_t / dt at fixed (x0, x1): the target of flow matching, (B, ...)."""
        t = like(t, x1)
        return self.d_alpha(t) * x1 + self.d_sigma(t) * x0

    def drift(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift (B, ...) and spread of the noising SDE dx = mean ds + sqrt(2 spread) dW, s = 1 - t (SiT, eq. 10):
        mean = -rate x."""
        t = like(t, x)
        return -self.rate(t) * x, self.spread(t)

    def diffusion(self, x: Tensor, t: Tensor, form: str = "SBDM", norm: float = 1.0) -> Tensor:
        """Diffusion coefficient w(t) >= 0 of the sampling SDE, broadcastable against x. Any w has the same marginals
        (SiT, section 2.4); `form` is a key of `DIFFUSIONS`."""
        return look_up(DIFFUSIONS, form, "diffusion_form")(self, like(t, x), norm)

    def score_from_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Multiplied through by alpha / d_alpha, which vanishes where rate is infinite (SiT, eq. 9)."""
        t = like(t, x)
        ratio, sigma = self.alpha(t) / self.d_alpha(t), self.sigma(t)
        return (ratio * v - x) / (sigma**2 - ratio * self.d_sigma(t) * sigma)

    def noise_from_velocity(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0 = -sigma s, without the division by sigma."""
        t = like(t, x)
        ratio = self.alpha(t) / self.d_alpha(t)
        return (ratio * v - x) / (ratio * self.d_sigma(t) - self.sigma(t))

    def velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = rate x + spread s."""
        t = like(t, x)
        return self.rate(t) * x + self.spread(t) * score

    def velocity_from_noise(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = d_alpha x1 + d_sigma x0 with x1 = (x - sigma x0) / alpha."""
        t = like(t, x)
        return self.rate(t) * x + (self.d_sigma(t) - self.rate(t) * self.sigma(t)) * noise


def _vp_log_alpha(t: Tensor) -> Tensor:
    return -0.25 * (1 - t) ** 2 * (_BETA_MAX - _BETA_MIN) - 0.5 * (1 - t) * _BETA_MIN


def _vp_rate(t: Tensor) -> Tensor:
    """Half of beta(1 - t)."""
    return 0.5 * (_BETA_MIN + (1 - t) * (_BETA_MAX - _BETA_MIN))


def _vp_sigma(t: Tensor) -> Tensor:
    return torch.sqrt(-torch.expm1(2 * _vp_log_alpha(t)))


_HALF_PI = math.pi / 2

# GVP and VP keep alpha^2 + sigma^2 = 1, hence sigma d_sigma = -alpha d_alpha and spread = rate.
PATHS = {
    "Linear": Path(
        alpha=lambda t: t,
        d_alpha=torch.ones_like,
        sigma=lambda t: 1 - t,
        d_sigma=lambda t: -torch.ones_like(t),
        rate=lambda t: 1 / t,
        spread=lambda t: (1 - t) / t,
        starts_at_noise=True,
    ),
    "GVP": Path(
        alpha=lambda t: torch.sin(_HALF_PI * t),
        d_alpha=lambda t: _HALF_PI * torch.cos(_HALF_PI * t),
        sigma=lambda t: torch.cos(_HALF_PI * t),
        d_sigma=lambda t: -_HALF_PI * torch.sin(_HALF_PI * t),
        rate=lambda t: _HALF_PI / torch.tan(_HALF_PI * t),
        spread=lambda t: _HALF_PI / torch.tan(_HALF_PI * t),
        starts_at_noise=True,
    ),
    "VP": Path(
        alpha=lambda t: torch.exp(_vp_log_alpha(t)),
        d_alpha=lambda t: torch.exp(_vp_log_alpha(t)) * _vp_rate(t),
        sigma=_vp_sigma,
        d_sigma=lambda t: -torch.exp(2 * _vp_log_alpha(t)) * _vp_rate(t) / _vp_sigma(t),
        rate=_vp_rate,
        spread=_vp_rate,
        starts_at_noise=False,
    ),
}


def _rise_and_fall(path: Path, t: Tensor, norm: float) -> Tensor:
    return norm * torch.sin(math.pi * t) ** 2


DIFFUSIONS: dict[str, Callable[[Path, Tensor, float], Tensor]] = {
    "constant": lambda path, t, norm: norm * torch.ones_like(t),
    "SBDM": lambda path, t, norm: norm * path.spread(t),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * (1 - t),
    "decreasing": lambda path, t, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": _rise_and_fall,
    "inccreasing-decreasing": _rise_and_fall,  # the reference's spelling
}
