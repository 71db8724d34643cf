"""Dormand-Prince 5(4) with step size control: the adaptive sampler.

Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", sections II.4 (control, first step) and II.5 (the
pair); the interpolant at the middle of a step is Shampine's, 1986. Every sample has its own time and step size, and the
error norm decides what they depend on:

    "sample"   one RMS a sample: a result does not change with the batch it is computed in; the last step ends at the end
    "batch"    one RMS over the batch, hence one step size: what torchdiffeq does, which steps past the end and interpolates
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vavae_fast.flow.paths import like, look_up, require_like

_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # the solution: the last stage is the next first one
)
_FOURTH_ORDER = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
_ERROR = tuple(b - c for b, c in zip((*_STAGES[-1], 0.0), _FOURTH_ORDER, strict=True))
_MIDDLE = (
    6025192743 / 30085553152 / 2,
    0.0,
    51252292925 / 65400821598 / 2,
    -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2,
    -1776094331 / 19743644256 / 2,
    11237099 / 235043384 / 2,
)
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0


def _rms_of_sample(x: Tensor) -> Tensor:
    return x.flatten(1).pow(2).mean(dim=1).sqrt().double()


def _rms_of_batch(x: Tensor) -> Tensor:
    return x.pow(2).mean().sqrt().double().expand(x.shape[0])


ERROR_NORMS: dict[str, Callable[[Tensor], Tensor]] = {"sample": _rms_of_sample, "batch": _rms_of_batch}


def dopri5(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    times: Tensor,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    error_norm: str = "sample",
) -> Tensor:
    """x (B, ...) at times[0] -> x at times[-1]; velocity(x, t (B,)) -> (B, ...). Times between do not matter."""
    _, x = dopri5_states(velocity, x, times[[0, -1]], atol, rtol, error_norm)
    return x


def dopri5_states(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor, atol: float, rtol: float, error_norm: str
) -> Iterator[Tensor]:
    """Yields x at every time of `times` (T,), monotone, by interpolation inside the steps. One host synchronisation a step.

    Raises ArithmeticError when the step size underflows: a velocity that is not finite, or tolerances beyond the dtype.
    """
    norm = look_up(ERROR_NORMS, error_norm, "error_norm")
    sign = 1.0 if times[-1] > times[0] else -1.0  # descending times: integrate -velocity in -t
    ends = [sign * t for t in times.double().tolist()]

    def f(x: Tensor, t: Tensor) -> Tensor:
        return sign * require_like(velocity(x, (sign * t).to(x.dtype)), x)

    t = torch.full((x.shape[0],), ends[0], dtype=torch.float64, device=x.device)
    slope = f(x, t)
    h = _first_step(f, x, slope, t, norm, atol, rtol)
    begun, before, middle, slope_before = t, x, x, slope  # the last accepted step, kept for interpolation
    yield x
    for end in ends[1:]:
        while True:
            active = t < end
            stuck = active & ~(t + h > t)
            go_on, failed = torch.stack((active.any(), stuck.any())).tolist()
            if failed:
                raise ArithmeticError(
                    "dopri5: the step size underflows; the velocity is not finite (error_norm 'batch' also evaluates it past "
                    "the end, 'sample' does not), or atol and rtol are too small"
                )
            if not go_on:
                break
            landing = t + h
            if error_norm == "sample":
                landing = landing.clamp(max=ends[-1])
                h = landing - t
            x_new, slopes = _stages(f, x, slope, t, h)
            error = _combine(slopes, _ERROR, h) / (atol + rtol * torch.maximum(x.abs(), x_new.abs()))
            ratio = norm(error)
            accept = active & (ratio <= 1)
            row = like(accept, x)
            middle = torch.where(row, x + _combine(slopes, _MIDDLE, h), middle)
            before, begun = torch.where(row, x, before), torch.where(accept, t, begun)
            slope_before, slope = torch.where(row, slope, slope_before), torch.where(row, slopes[-1], slope)
            x, t = torch.where(row, x_new, x), torch.where(accept, landing, t)
            least = (ratio < 1).double().clamp(min=_SHRINK)  # an accepted step is not followed by a smaller one
            factor = torch.maximum(_SAFETY / ratio.pow(0.2), least).clamp(max=_GROW)
            h = torch.where(active, h * factor, h)
        yield torch.where(like(t == end, x), x, _interpolate(before, middle, x, slope_before, slope, begun, t, end))


def _first_step(f, x: Tensor, slope: Tensor, t: Tensor, norm, atol: float, rtol: float) -> Tensor:
    """(B,) float64: Hairer et al., II.4, "Starting step size", for an error estimate of order 4."""
    scale = atol + rtol * x.abs()
    d0, d1 = norm(x / scale), norm(slope / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    ahead = f(x + like(h0, x).to(x.dtype) * slope, t + h0)
    d2 = norm((ahead - slope) / scale) / h0
    flat = (d1 <= 1e-15) & (d2 <= 1e-15)
    h1 = torch.where(flat, (h0 * 1e-3).clamp(min=1e-6), (0.01 / torch.maximum(d1, d2)).pow(1 / 5))
    return torch.minimum(100 * h0, h1)


def _stages(f, x: Tensor, slope: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One trial step -> (x at t + h, the seven slopes)."""
    slopes = [slope]
    for node, weights in zip(_NODES, _STAGES, strict=True):
        x_stage = x + _combine(slopes, weights, h)
        slopes.append(f(x_stage, t + node * h))
    return x_stage, slopes


def _combine(slopes: list[Tensor], weights: tuple[float, ...], h: Tensor) -> Tensor:
    total = sum(w * k for w, k in zip(weights, slopes, strict=True) if w != 0)
    return like(h, total).to(total.dtype) * total


def _interpolate(before, middle, after, slope_before, slope, begun: Tensor, t: Tensor, end: float) -> Tensor:
    """The quartic through both ends, both slopes and the middle of each sample's last step, at time `end`."""
    h = (t - begun).clamp(min=torch.finfo(torch.float64).tiny)
    u = like((end - begun) / h, after).to(after.dtype)
    h = like(h, after).to(after.dtype)
    a = 2 * h * (slope - slope_before) - 8 * (after + before) + 16 * middle
    b = h * (5 * slope_before - 3 * slope) + 18 * before + 14 * after - 32 * middle
    c = h * (slope - 4 * slope_before) - 11 * before - 5 * after + 16 * middle
    return before + u * (h * slope_before + u * (c + u * (b + u * a)))
