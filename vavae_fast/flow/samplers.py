"""Samplers: dx/dt = velocity(x, t) from noise at t = 0 to data at t = 1, and the SDEs of the same marginals.

A fixed-step sampler is a function of (velocity, x, times), entered in `SAMPLERS` by its decorator; `times` decides the
steps. `Sampler` binds them to a `Transport` under the reference's names. Times stay on the CPU: () CPU tensors enter GPU
operators as scalars, so that no step waits for the device, and whoever is given one may branch on it (guidance does).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import log, pi
from typing import Any

import torch
from torch import Tensor

from vavae_fast.errors import is_integer, is_number, require
from vavae_fast.flow.dopri5 import ERROR_NORMS, dopri5_states
from vavae_fast.flow.paths import DIFFUSIONS, batch_time, look_up
from vavae_fast.flow.transport import Transport

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x (B, ...), t () or (B,)) -> (B, ...)
Noise = Callable[[int, Tensor], Tensor]  # (step, like (B, ...)) -> standard normals (B, ...)
Solver = Callable[[Velocity, Tensor, Tensor], Tensor]  # (velocity, x at times[0], times (T,)) -> x at times[-1]
SAMPLERS: dict[str, Solver] = {}
SDE_SAMPLERS: dict[str, Callable[..., Tensor]] = {}


def time_grid(num_steps: int, shift: float = 0.0, t0: float = 0.0, t1: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
    """num_steps float32 times from t0 to t1, hence num_steps - 1 steps. shift s > 0 maps t to s t / (1 + (s - 1) t):
    below 1 it is denser near the noise (Esser et al. 2024, eq. 23, with alpha = 1 / s). 0: no shift."""
    require(is_integer(num_steps) and num_steps >= 2, "num_steps", num_steps, "an integer, 2 or more (N times are N - 1 steps)")
    require(is_number(shift) and shift >= 0, "timestep_shift", shift, "a number, 0 (none) or more")
    t = torch.linspace(t0, t1, num_steps)
    if shift > 0:
        t = shift * t / (1 + (shift - 1) * t)
    return t.to(device)


# Fixed steps


def sampler(order: int, *names: str) -> Callable[[Solver], Solver]:
    """Enter a function (velocity, x, times) in `SAMPLERS`, under its own name and `names`."""

    def enter(solve):
        solve.order = order
        for name in (solve.__name__, *names):
            SAMPLERS[name] = solve
        return solve

    return enter


@sampler(order=1)
def euler(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """x (B, ...) at times[0]; times (T,) monotone -> x (B, ...) at times[-1]. T - 1 velocities."""
    for t, s in pairwise(times):
        x = x + (s - t) * velocity(x, t)
    return x


@sampler(2, "heun2")
def heun(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Heun's method: Karras et al. 2022, algorithm 1. torchdiffeq calls it heun2.

    x (B, ...) at times[0]; times (T,) monotone -> x (B, ...) at times[-1]. 2 (T - 1) velocities.
    """
    for t, s in pairwise(times):
        v = velocity(x, t)
        v_end = velocity(x + (s - t) * v, s)
        x = x + (s - t) * (v + v_end) / 2
    return x


@sampler(order=2)
def midpoint(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """The velocity at the middle of an Euler step. Shapes as in `heun`. 2 (T - 1) velocities."""
    for t, s in pairwise(times):
        x_middle = x + (s - t) / 2 * velocity(x, t)
        x = x + (s - t) * velocity(x_middle, t + (s - t) / 2)
    return x


@sampler(order=4)
def rk4(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Kutta's 3/8 rule, which torchdiffeq means by rk4. Shapes as in `heun`. 4 (T - 1) velocities."""
    for t, s in pairwise(times):
        h = s - t
        v1 = velocity(x, t)
        v2 = velocity(x + h / 3 * v1, t + h / 3)
        v3 = velocity(x + h * (v2 - v1 / 3), t + 2 * h / 3)
        v4 = velocity(x + h * (v1 - v2 + v3), s)
        x = x + h / 8 * (v1 + 3 * (v2 + v3) + v4)
    return x


ODE_METHODS = (*SAMPLERS, "dopri5")


# Stochastic: dx = (v + w s) dt + sqrt(2 w) dW has the marginals of dx = v dt for any w(t) >= 0 (SiT, eq. 5)


def _sde_sampler(name: str):
    def enter(solve):
        SDE_SAMPLERS[name] = solve
        return solve

    return enter


@_sde_sampler("euler")
def euler_maruyama(drift: Velocity, diffusion: Velocity, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
    """Yields x (B, ...) at times[1], times[2], ...; noise(step, x) are the increments' standard normals."""
    for step, (t, s) in enumerate(pairwise(times)):
        x = x + (s - t) * drift(x, t) + torch.sqrt(2 * (s - t) * diffusion(x, t)) * noise(step, x)
        yield x


@_sde_sampler("heun")
def heun_sde(drift: Velocity, diffusion: Velocity, x: Tensor, times: Tensor, noise: Noise) -> Iterator[Tensor]:
    """The increment first, then a Heun step of the drift (SiT, appendix; Karras et al. 2022, algorithm 2)."""
    for step, (t, s) in enumerate(pairwise(times)):
        x = x + torch.sqrt(2 * (s - t) * diffusion(x, t)) * noise(step, x)
        v = drift(x, t)
        v_end = drift(x + (s - t) * v, s)
        x = x + (s - t) * (v + v_end) / 2
        yield x


def torch_noise(step: int, like: Tensor) -> Tensor:
    """Increments from torch's global generator."""
    return torch.randn_like(like)


# Bound to a transport


@dataclass(frozen=True)
class OdeSampler:
    """What `Sampler.sample_ode` returns. Calls return (T, B, ...), T = 1 unless the trajectory is kept: [-1] is the end."""

    transport: Transport
    method: str
    times: Tensor
    atol: float
    rtol: float
    error_norm: str
    keep_trajectory: bool

    def __call__(self, x: Tensor, model: Callable[..., Tensor], **model_kwargs: Any) -> Tensor:
        """x (B, ...) noise; model(x, t (B,), **model_kwargs) -> the prediction, (B, ...). No gradients."""
        return self.integrate(lambda x, t: model(x, batch_time(t, x), **model_kwargs), x)

    @torch.no_grad()
    def integrate(self, predict: Velocity, x: Tensor) -> Tensor:
        """The same for predict(x, t), whose t is () on the CPU at fixed steps, (B,) on x's device for dopri5."""
        return self.solve(lambda x, t: self.transport.velocity(predict(x, t), x, t), x)

    def solve(self, velocity: Velocity, x: Tensor) -> Tensor:
        """The same for a velocity, whatever the transport predicts."""
        if self.method == "dopri5":
            times = self.times if self.keep_trajectory else self.times[[0, -1]]
            states = list(dopri5_states(velocity, x, times, self.atol, self.rtol, self.error_norm))
            return torch.stack(states if self.keep_trajectory else states[-1:])
        solve = SAMPLERS[self.method]
        if not self.keep_trajectory:
            return solve(velocity, x, self.times).unsqueeze(0)
        states = [x]
        for step in range(len(self.times) - 1):
            states.append(solve(velocity, states[-1], self.times[step : step + 2]))
        return torch.stack(states)


@dataclass(frozen=True)
class SdeSampler:
    """What `Sampler.sample_sde` returns; calls as `OdeSampler`'s."""

    transport: Transport
    method: str
    times: Tensor
    diffusion: Velocity
    last_step: str
    last_step_size: float
    noise: Noise
    keep_trajectory: bool

    def __call__(self, x: Tensor, model: Callable[..., Tensor], **model_kwargs: Any) -> Tensor:
        """x (B, ...) noise; model(x, t (B,), **model_kwargs) -> the prediction, (B, ...). No gradients."""
        return self.integrate(lambda x, t: model(x, batch_time(t, x), **model_kwargs), x)

    @torch.no_grad()
    def integrate(self, predict: Velocity, x: Tensor) -> Tensor:
        """The same for predict(x, t) with t () on the CPU. One prediction a drift: velocity and score share it."""

        def drift(x: Tensor, t: Tensor) -> Tensor:
            pred = predict(x, t)
            return self.transport.velocity(pred, x, t) + self.diffusion(x, t) * self.transport.score(pred, x, t)

        walk = SDE_SAMPLERS[self.method](drift, self.diffusion, x, self.times, self.noise)
        states = []
        for x in walk:
            if self.keep_trajectory:
                states.append(x)
        end = LAST_STEPS[self.last_step](self.transport, predict, drift, x, self.times[-1], self.last_step_size)
        return torch.stack([*states, end])


def _tweedie(transport: Transport, predict: Velocity, drift: Velocity, x: Tensor, t: Tensor, size: float) -> Tensor:
    """E[x1 | x_t] = (x + sigma^2 s) / alpha: Efron 2011."""
    score = transport.score(predict(x, t), x, t)
    return (x + transport.path.sigma(t) ** 2 * score) / transport.path.alpha(t)


# The step from times[-1] to t = 1, where the SDE itself is singular.
LAST_STEPS: dict[str, Callable[..., Tensor]] = {
    "none": lambda transport, predict, drift, x, t, size: x,
    "Mean": lambda transport, predict, drift, x, t, size: x + size * drift(x, t),
    "Tweedie": _tweedie,
    "Euler": lambda transport, predict, drift, x, t, size: x + size * transport.velocity(predict(x, t), x, t),
}


class Sampler:
    """Sampling functions for one transport, with the reference's names and arguments.

    `num_steps` counts times, so it makes num_steps - 1 steps; dopri5 chooses its own steps and takes `num_steps` only as
    the places of a kept trajectory. Unknown names raise `BadInput` with the nearest known one.
    """

    def __init__(self, transport: Transport):
        self.transport = transport

    def sample_ode(
        self,
        *,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        reverse: bool = False,
        timestep_shift: float = 0.0,
        error_norm: str = "batch",
        keep_trajectory: bool = False,
    ) -> OdeSampler:
        """-> fn(x, model, **model_kwargs); fn(...)[-1] is the final batch. sampling_method: one of `ODE_METHODS`.

        reverse: from data to noise along the same times. error_norm "batch" | "sample": what dopri5 controls;
        "batch" is torchdiffeq's, where an image depends on its batch.
        """
        method = look_up({name: name for name in ODE_METHODS}, sampling_method, "sampling_method", any_case=True)
        look_up(ERROR_NORMS, error_norm, "error_norm")
        for name, tolerance in dict(atol=atol, rtol=rtol).items():
            require(is_number(tolerance) and tolerance > 0, name, tolerance, "a number above 0")
        times = time_grid(num_steps, timestep_shift, *self.transport.interval(sample=True))
        return OdeSampler(self.transport, method, times.flip(0) if reverse else times, atol, rtol, error_norm, keep_trajectory)

    def sample_sde(
        self,
        *,
        sampling_method: str = "Euler",
        diffusion_form: str = "SBDM",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float = 0.04,
        num_steps: int = 250,
        timestep_shift: float = 0.0,
        noise: Noise = torch_noise,
        keep_trajectory: bool = False,
    ) -> SdeSampler:
        """-> fn(x, model, **model_kwargs); fn(...)[-1] is the final batch. sampling_method "Euler" | "Heun".

        num_steps - 1 stochastic steps to t = 1 - last_step_size, then the last step: None | "Mean" | "Tweedie" | "Euler".
        noise(step, like) makes the increments; torch's generator by default.
        """
        method = look_up({name: name for name in SDE_SAMPLERS}, sampling_method, "sampling_method", any_case=True)
        look_up(LAST_STEPS, last_step or "none", "last_step")
        look_up(DIFFUSIONS, diffusion_form, "diffusion_form")
        require(is_number(diffusion_norm), "diffusion_norm", diffusion_norm, "a finite number")
        require(is_number(last_step_size) and 0 <= last_step_size < 1, "last_step_size", last_step_size, "a number in [0, 1)")
        size = last_step_size if last_step else 0.0
        t0, t1 = self.transport.interval(sample=True, sde=True, diffusion_form=diffusion_form, last_step_size=size)
        return SdeSampler(
            transport=self.transport,
            method=method,
            times=time_grid(num_steps, timestep_shift, t0, t1),
            diffusion=partial(self.transport.path.diffusion, form=diffusion_form, norm=diffusion_norm),
            last_step=last_step or "none",
            last_step_size=size,
            noise=noise,
            keep_trajectory=keep_trajectory,
        )

    def sample_ode_likelihood(
        self,
        *,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        timestep_shift: float = 0.0,
        error_norm: str = "batch",
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """-> fn(x, model, **model_kwargs) for data x (B, ...) -> log p(x) in nats (B,), and its noise x0 (B, ...).

        log p_1(x1) = log N(x0; 0, I) - integral of div v over [0, 1] (Chen et al. 2018), the divergence by Hutchinson's
        estimator with one Rademacher probe a call (Grathwohl et al. 2019): unbiased, exact for a diagonal Jacobian.
        """
        ode = self.sample_ode(
            sampling_method=sampling_method,
            num_steps=num_steps,
            atol=atol,
            rtol=rtol,
            reverse=True,
            timestep_shift=timestep_shift,
            error_norm=error_norm,
        )

        def likelihood(x: Tensor, model: Callable[..., Tensor], **model_kwargs: Any) -> tuple[Tensor, Tensor]:
            probe = torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1

            def velocity_and_divergence(state: Tensor, t: Tensor) -> Tensor:
                x = state[:, :-1].reshape(probe.shape)
                with torch.enable_grad():
                    x = x.detach().requires_grad_()
                    v = self.transport.velocity(model(x, batch_time(t, x), **model_kwargs), x, t)
                    (jacobian_probe,) = torch.autograd.grad((v * probe).sum(), x)
                divergence = (jacobian_probe * probe).flatten(1).sum(dim=1, keepdim=True)
                return torch.cat((v.detach().flatten(1), divergence), dim=1)

            with torch.no_grad():
                end = ode.solve(velocity_and_divergence, torch.cat((x.flatten(1), x.new_zeros(x.shape[0], 1)), dim=1))[-1]
            x0, gained = end[:, :-1], end[:, -1]
            prior = -0.5 * x0.pow(2).sum(dim=1) - 0.5 * x0.shape[1] * log(2 * pi)
            return prior + gained, x0.reshape(x.shape)

        return likelihood
