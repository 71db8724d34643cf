"""From labels to latents to images, batch by batch.

Image i starts from rng.normal(seed, i) and takes its SDE increments from its own counters, so it does not depend on the
batch, the process or the run it is drawn in; what is missing after an interruption is a list of indices.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vavae_fast import rng
from vavae_fast.errors import BadInput, is_integer, is_number, require
from vavae_fast.flow.dopri5 import ERROR_NORMS
from vavae_fast.flow.guidance import guided
from vavae_fast.flow.paths import DIFFUSIONS, look_up
from vavae_fast.flow.samplers import LAST_STEPS, ODE_METHODS, SDE_SAMPLERS, OdeSampler, Sampler, SdeSampler
from vavae_fast.flow.transport import Transport, create_transport
from vavae_fast.pixels import to_uint8
from vavae_fast.rng import Stream

IndexedBatches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SamplerSettings:
    """How to sample. The defaults are Euler over 250 times without shift or guidance; a published result needs
    shift 0.3, cfg_scale 6.7 and cfg_interval_start 0.125 (800 epochs), or 10.0 and 0.10 (64 epochs)."""

    mode: str = "ODE"  # or "SDE"
    method: str = "euler"  # ODE: a name of ODE_METHODS; SDE: "euler" or "heun"
    num_steps: int = 250  # times, hence num_steps - 1 steps
    shift: float = 0.0  # t -> s t / (1 + (s - 1) t); 0 = none
    cfg_scale: float = 1.0  # 1 = no guidance
    cfg_interval_start: float = 0.0  # in shifted time, 0 = noise
    cfg_interval_end: float = 1.0
    cfg_channels: int | str = 3  # guided channels: the reference's 3, or "all"
    atol: float = 1e-6  # dopri5
    rtol: float = 1e-3
    error_norm: str = "sample"  # "batch" = torchdiffeq's, where an image depends on its batch
    diffusion_form: str = "SBDM"  # SDE
    diffusion_norm: float = 1.0
    last_step: str | None = "Mean"
    last_step_size: float = 0.04

    def __post_init__(self):
        require(self.mode in ("ODE", "SDE"), "sample.mode", self.mode, "ODE or SDE")
        methods = dict.fromkeys(ODE_METHODS if self.mode == "ODE" else SDE_SAMPLERS)
        look_up(methods, self.method, "sample.sampling_method", any_case=True)
        steps = is_integer(self.num_steps) and self.num_steps >= 2
        require(steps, "sample.num_sampling_steps", self.num_steps, "an integer, 2 or more (N times are N - 1 steps)")
        numbers = dict(timestep_shift=self.shift, cfg_scale=self.cfg_scale, atol=self.atol, rtol=self.rtol)
        numbers |= dict(cfg_interval_start=self.cfg_interval_start, cfg_interval_end=self.cfg_interval_end)
        numbers |= dict(diffusion_norm=self.diffusion_norm, last_step_size=self.last_step_size)
        for key, value in numbers.items():
            require(is_number(value), f"sample.{key}", value, "a finite number")
        require(self.shift >= 0, "sample.timestep_shift", self.shift, "0 (none) or more")
        require(self.cfg_scale >= 1, "sample.cfg_scale", self.cfg_scale, "1 (no guidance) or more")
        require(self.cfg_interval_start <= self.cfg_interval_end, "sample.cfg_interval_start", self.cfg_interval_start, "at most the end")
        known = self.cfg_channels == "all" or (isinstance(self.cfg_channels, int) and self.cfg_channels >= 1)
        require(known, "sample.cfg_channels", self.cfg_channels, 'a count from 1 or "all"')
        require(self.atol > 0, "sample.atol", self.atol, "above 0")
        require(self.rtol > 0, "sample.rtol", self.rtol, "above 0")
        look_up(ERROR_NORMS, self.error_norm, "sample.error_norm")
        look_up(DIFFUSIONS, self.diffusion_form, "sample.diffusion_form")
        look_up(LAST_STEPS, self.last_step or "none", "sample.last_step")
        require(0 <= self.last_step_size < 1, "sample.last_step_size", self.last_step_size, "in [0, 1)")


@dataclass(frozen=True)
class LatentScale:
    """The normalisation that training applied, (z - mean) / std * multiplier, to be undone. mean, std (1, C, 1, 1); the
    defaults where training did not normalise."""

    mean: Tensor | float = 0.0
    std: Tensor | float = 1.0
    multiplier: float = 1.0

    def denormalise(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) as the model makes it -> latents as the tokenizer made them. Move mean and std to x's device first."""
        return x * self.std / self.multiplier + self.mean


def generate_latents(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    shape: Sequence[int],
    settings: SamplerSettings,
    *,
    seed: int,
    null_label: int,
    transport: Transport | None = None,
    batch_size: int = 64,
    indices: Sequence[int] | Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (index (n,) int64 on the CPU, latents (n, *shape) float32), normalised as the model knows them.

    model(x (n, *shape), t (n,), y (n,)) -> its prediction; labels (N,) int64 on the device to sample on: image i is of class
    labels[i]. indices: which images, all N by default; range(k, N) continues, range(rank, N, world) shares the work.
    null_label: the class of the unconditional half (the number of classes).
    """
    require(batch_size >= 1, "batch_size", batch_size, "1 or more")
    if labels.ndim != 1 or labels.is_floating_point():
        raise BadInput(f"labels: expected (N,) integers, got {labels.dtype} of shape {tuple(labels.shape)}")
    wanted = torch.arange(len(labels)) if indices is None else torch.as_tensor(indices, dtype=torch.int64).cpu()
    if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(labels):
        raise BadInput(f"indices: must be in [0, {len(labels)}), got {int(wanted.min())} to {int(wanted.max())}")
    return _batches(model, labels, shape, settings, seed, null_label, transport or create_transport(), wanted.split(batch_size))


def _batches(model, labels, shape, settings, seed, null_label, transport, batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The generator behind `generate_latents`, which checks its arguments when called, not when first iterated."""
    for index in batches:
        if index.numel():
            yield index, _sample(model, labels, index.to(labels.device), shape, settings, seed, null_label, transport)


@torch.inference_mode()
def _sample(model, labels, index, shape, settings: SamplerSettings, seed: int, null_label: int, transport: Transport) -> Tensor:
    interval = (settings.cfg_interval_start, settings.cfg_interval_end)
    predict = guided(model, settings.cfg_scale, labels[index], null_label, settings.cfg_channels, interval)
    x0 = rng.normal(seed, index, like=torch.empty(len(index), *shape, device=labels.device))
    return bind_sampler(transport, settings, seed, index).integrate(predict, x0)[-1]


def bind_sampler(transport: Transport, settings: SamplerSettings, seed: int, index: Tensor) -> OdeSampler | SdeSampler:
    """The sampler that `settings` describe; an SDE's increments are functions of (seed, index (n,), step)."""
    sampler = Sampler(transport)
    if settings.mode == "ODE":
        return sampler.sample_ode(
            sampling_method=settings.method,
            num_steps=settings.num_steps,
            atol=settings.atol,
            rtol=settings.rtol,
            timestep_shift=settings.shift,
            error_norm=settings.error_norm,
        )
    return sampler.sample_sde(
        sampling_method=settings.method,
        diffusion_form=settings.diffusion_form,
        diffusion_norm=settings.diffusion_norm,
        last_step=settings.last_step,
        last_step_size=settings.last_step_size,
        num_steps=settings.num_steps,
        timestep_shift=settings.shift,
        noise=lambda step, like: rng.normal(seed, index, like, stream=Stream.SDE + step),
    )


def generate_images(
    latents: IndexedBatches, decode: Callable[[Tensor], Tensor], scale: LatentScale | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """latents: what `generate_latents` yields -> yields (index (n,), images (n, 3, H, W) uint8), on the latents' device.

    decode(z (n, C, h, w) denormalised) -> (n, 3, H, W) in [-1, 1]: a tokenizer's decoder.
    """
    scale = scale or LatentScale()
    for index, x in latents:
        with torch.inference_mode():
            images = to_uint8(decode(scale.denormalise(x)))
        yield index, images
