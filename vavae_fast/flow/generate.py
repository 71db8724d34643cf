"""From labels to latents to images, batch by batch.

Image i starts from rng.normal(seed, i) and takes its SDE increments from its own counters, so it does not depend on the
batch, the process or the run it is drawn in; what is missing after an interruption is a list of indices.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vavae_fast import rng
from vavae_fast.errors import BadInput, is_integer, is_number, require
from vavae_fast.flow.dopri5 import ERROR_NORMS
from vavae_fast.flow.guidance import Model, guided
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

    def normalise(self, z: Tensor) -> Tensor:
        """The inverse of `denormalise`."""
        return (z - self.mean) / self.std * self.multiplier


def generate_latents(
    model: Model,
    labels: Tensor,
    shape: Sequence[int],
    settings: SamplerSettings,
    *,
    seed: int,
    null_label: int,
    transport: Transport | None = None,
    batch_size: int = 64,
    indices: Sequence[int] | Tensor | None = None,
    guide: Model | None = None,
    whole_batches: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (index (n,) int64 on the CPU, latents (n, *shape) float32), normalised as the model knows them.

    model(x (n, *shape), t (n,), y (n,)) -> its prediction; labels (N,) int64 on the device to sample on: image i is of class
    labels[i]. indices: which images, all N by default; range(k, N) continues, range(rank, N, world) shares the work.
    null_label: the class of the unconditional half (the number of classes). guide: the lesser model of autoguidance, instead of it.
    whole_batches: the model always sees `batch_size` samples, the last one's repeated where fewer are left; for a model that was
    compiled or captured at one size. On a GPU a batch is yielded before it is computed: nothing here waits for the device.
    """
    require(batch_size >= 1, "batch_size", batch_size, "1 or more")
    if labels.ndim != 1 or labels.is_floating_point():
        raise BadInput(f"labels: expected (N,) integers, got {labels.dtype} of shape {tuple(labels.shape)}")
    wanted = torch.arange(len(labels)) if indices is None else torch.as_tensor(indices, dtype=torch.int64).cpu()
    if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(labels):
        raise BadInput(f"indices: must be in [0, {len(labels)}), got {int(wanted.min())} to {int(wanted.max())}")
    transport = transport or create_transport()

    def sample(index: Tensor) -> Tensor:
        missing = batch_size - len(index) if whole_batches else 0
        drawn = torch.cat((index, index[-1:].expand(missing)))
        return _sample(model, guide, labels, _to_device(drawn, labels.device), shape, settings, seed, null_label, transport)[: len(index)]

    return ((index, sample(index)) for index in wanted.split(batch_size) if index.numel())


def _to_device(index: Tensor, device: torch.device) -> Tensor:
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


@torch.inference_mode()
def _sample(model, guide, labels, index, shape, settings: SamplerSettings, seed: int, null_label: int, transport: Transport) -> Tensor:
    interval = (settings.cfg_interval_start, settings.cfg_interval_end)
    predict = guided(model, settings.cfg_scale, labels[index], null_label, settings.cfg_channels, interval, guide)
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
    latents: IndexedBatches, decode: Callable[[Tensor], Tensor], scale: LatentScale | None = None, decode_batch: int = 32
) -> Iterator[tuple[Tensor, Tensor]]:
    """latents: what `generate_latents` yields -> yields (index (n,), images (n, 3, H, W) uint8), on the CPU.

    decode(z (n, C, h, w) denormalised) -> (n, 3, H, W) in [-1, 1]: a tokenizer's decoder, given `decode_batch` latents at a time.
    On a GPU it runs on a stream of its own, and a batch is yielded once the next one's latents are under way.
    """
    scale = scale or LatentScale()

    @torch.inference_mode()
    def pixels(x: Tensor) -> Tensor:
        return torch.cat([to_uint8(decode(scale.denormalise(part))) for part in x.split(decode_batch)])

    pending: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()
    beside = None
    for index, x in latents:
        if not x.is_cuda:
            yield index, pixels(x)
            continue
        beside = beside or torch.cuda.Stream(x.device)
        pending.append((index, _decoded_beside(pixels, x, beside)))
        if len(pending) > 1:
            index, images = pending.popleft()
            yield index, images()
    for index, images in pending:
        yield index, images()


def _decoded_beside(pixels: Callable[[Tensor], Tensor], x: Tensor, stream: torch.cuda.Stream) -> Callable[[], Tensor]:
    """Decode x and copy the pixels to the host on `stream`; the result waits for them."""
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        images = pixels(x)
        host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
        host.copy_(images, non_blocking=True)
        copied = stream.record_event()
    x.record_stream(stream)  # its memory is another stream's

    def images_on_host() -> Tensor:
        copied.synchronize()
        return host

    return images_on_host
