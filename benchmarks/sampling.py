"""Sampling of LightningDiT: whole draws by the published settings, decoding included, and the parts of one of their steps.

    fused            the engine as `vavae-fast sample` runs it: fused operators, compiled blocks, CUDA graphs, bf16; the unconditional half
                     only where guidance acts; decoded on a second stream
    fused fp8        the same with sample.precision=fp8
    compiled bf16    PyTorch's layers with everything else the engine has, but both halves at every step: the strongest baseline
    equal batch      the public code's way at our batch: float32 with TF32 products, 2 n latents through forward_with_cfg, then decoded
    as configured    the same at its own batch of 4
    public code, …   those two by the network of VAVAE_REFERENCE, a checkout of the public repository

A baseline's steps all cost the same, so where "whole" is not in its name it runs a share of them: one in 16 (in 4 at batch 4), and
decodes that share of the batch. Its seconds are counted for the images that this stands for. B/1 runs them whole beside their shares.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.steps import ARMS, MAIN_ARMS, Arm, Settings, Step, arguments, base_model, config, in_the_way_of
from benchmarks.tokenizer_steps import SIZES
from vavae_fast import rng
from vavae_fast.commands.sample import sampler_settings
from vavae_fast.config import SAMPLE_PRESETS, SampleConfig
from vavae_fast.errors import BadInput
from vavae_fast.flow.generate import SamplerSettings, generate_images, generate_latents
from vavae_fast.flow.guidance import guided
from vavae_fast.flow.samplers import time_grid
from vavae_fast.models.autoencoder import AutoencoderKL
from vavae_fast.models.compilation import compile_forward
from vavae_fast.models.fp8 import require_fp8
from vavae_fast.models.inference import decoder, matmul_precision, predictor
from vavae_fast.models.lightningdit_cost import flops_per_image
from vavae_fast.pixels import to_uint8

Call = Callable[[], Any]
Velocity = Callable[[Tensor, Tensor], Tensor]  # (x, t (n,)) -> velocity of x's shape
TOKENIZERS = dict.fromkeys(("XL/1", "B/1"), SIZES["f16d32"]) | dict(tiny=dict(SIZES["tiny"], embed_dim=8, ch_mult=(1, 1, 1)))
PUBLISHED = sampler_settings(replace(SampleConfig(), **SAMPLE_PRESETS["paper-64ep"]))
MOST_ROUNDS = 3  # of draws that take seconds


@dataclass(frozen=True)
class Way:
    """How a draw is made. batch: None = the step's. share: of one in so many steps and images, all of the same cost; 1 = all."""

    precision: str = "bf16"
    fused: bool = False
    reference: bool = False
    batch: int | None = None
    share: int = 1


WAYS = {
    "fused": Way(fused=True),
    "fused fp8": Way("fp8", fused=True),
    "compiled bf16": Way(share=16),
    "compiled bf16, whole": Way(),
    "equal batch": Way("tf32", share=16),
    "equal batch, whole": Way("tf32"),
    "as configured": Way("tf32", batch=4, share=4),
    "as configured, whole": Way("tf32", batch=4),
    "public code, equal batch": Way("tf32", reference=True, share=16),
    "public code, as configured": Way("tf32", reference=True, batch=4, share=4),
}
WHOLE = ", whole"
BASELINES = tuple(WAYS)


@dataclass(frozen=True)
class Draw(Step):
    """A whole draw of `batch` images at a time, `batches` of them one after the other, with so many times."""

    times: int = 250
    batches: int = 1

    @property
    def settings(self) -> SamplerSettings:
        return replace(PUBLISHED, num_steps=self.times)

    @property
    def needs(self) -> float:
        return 240

    def compiles(self, arm: str) -> bool:
        return not arm.endswith(WHOLE)  # it runs what its share has compiled

    def lacking(self, device: torch.device, settings: Settings) -> str | None:
        if any(WAYS[arm].precision == "fp8" for arm in self.arms):
            try:
                require_fp8(device, "the fp8 way", "sample.precision=bf16")
            except BadInput as reason:
                return str(reason)
        return super().lacking(device, settings)

    def timed(self, settings: Settings) -> Settings:
        """A draw is long enough for a round, and its compiling for a warm-up."""
        return replace(settings, rounds=min(settings.rounds, MOST_ROUNDS), seconds=0.0, warm_up=0.0)

    def steps(self, arm: str) -> int:
        """How many of a batch's steps a call of a way runs."""
        return max(1, round((self.times - 1) / WAYS[arm].share))

    def images(self, arm: str) -> float:
        way = WAYS[arm]
        return self.batch * self.batches if way.fused else (way.batch or self.batch) * self.steps(arm) / (self.times - 1)

    def makers(self, device: torch.device, settings: Settings) -> dict[str, Callable[[], Call]]:
        base = base_model(self.size, device).eval()
        make = lambda arm: (engine if WAYS[arm].fused else both_halves)(self, arm, base, device, settings)
        return {arm: lambda arm=arm: make(arm) for arm in self.arms}

    def facts(self, seconds: dict[str, float]) -> dict[str, Any]:
        """How well a share stands for the whole is in `whole_over_share`: seconds an image over seconds an image."""
        per_image = {arm: median / self.images(arm) for arm, median in seconds.items()}
        shares = [arm for arm in per_image if arm + WHOLE in per_image]
        return dict(
            images_per_second={arm: round(1 / each, 3) for arm, each in per_image.items()},
            images_a_call={arm: round(self.images(arm), 3) for arm in per_image},
            steps={arm: self.steps(arm) for arm in per_image},
            whole_over_share={arm: round(per_image[arm + WHOLE] / per_image[arm], 4) for arm in shares},
        )


# -- ways ------------------------------------------------------------------------------------------------------------


def _tokenizer(size: str, fused: bool, device: torch.device) -> AutoencoderKL:
    torch.manual_seed(0)  # the same for every way
    return AutoencoderKL(**TOKENIZERS[size], fused=fused).eval().requires_grad_(False).to(device)


def _copy(base: nn.Module, arm: Arm, step: Draw, settings: Settings) -> nn.Module:
    """A model of its own for a way: engines round and convert weights in place."""
    return in_the_way_of(arm, deepcopy(base), step.size, settings.backend, settings.reference)


def _labels(step: Draw, count: int, device: torch.device) -> tuple[Tensor, int]:
    classes = arguments(step.size)["num_classes"]
    return torch.arange(count, device=device) * 7 % classes, classes


def _shape(step: Draw) -> tuple[int, int, int]:
    known = arguments(step.size)
    return known["in_channels"], known["input_size"], known["input_size"]


def engine(step: Draw, arm: str, base: nn.Module, device: torch.device, settings: Settings) -> Call:
    """What `vavae-fast sample` does for a process's batches, the files aside -> a call that returns uint8 batches on the host."""
    way = WAYS[arm]
    model = _copy(base, Arm(fused=True), step, settings)
    compile_forward(model, "blocks", settings.backend)
    predict = predictor(model, device, way.precision)
    decode = decoder(_tokenizer(step.size, True, device), device, way.precision)
    labels, null = _labels(step, step.batch * step.batches, device)

    def draw() -> list[Tensor]:
        with matmul_precision(way.precision):
            latents = generate_latents(
                predict, labels, _shape(step), step.settings, seed=0, null_label=null, batch_size=step.batch, whole_batches=device.type == "cuda"
            )
            return [images for _, images in generate_images(latents, decode)]

    return draw


def both_halves(step: Draw, arm: str, base: nn.Module, device: torch.device, settings: Settings) -> Call:
    """A way that evaluates both halves at every step, then decodes -> a call that returns uint8 images on the host."""
    way, batch = WAYS[arm], WAYS[arm].batch or step.batch
    labels, null = _labels(step, batch, device)
    tokenizer = _tokenizer(step.size, False, device)
    x0 = rng.normal(0, torch.arange(batch, device=device), like=torch.empty(batch, *_shape(step), device=device))
    if way.precision == "bf16":
        velocity, decode, state = _compiled_velocity(step, base, labels, null, device, settings), decoder(tokenizer, device, "bf16"), x0
    else:
        velocity, decode, state = _public_velocity(step, way, base, labels, null, settings), tokenizer.decode, torch.cat((x0, x0))
    times, decoded = time_grid(step.times, step.settings.shift, device=device)[: step.steps(arm) + 1], max(1, batch // way.share)

    @torch.inference_mode()
    def draw() -> Tensor:
        x = state
        with matmul_precision(way.precision):
            for t, s in pairwise(times):
                x = x + (s - t) * velocity(x, t.expand(len(x)))
            return to_uint8(decode(x[:decoded])).cpu()

    return draw


def _public_velocity(step: Draw, way: Way, base: nn.Module, labels: Tensor, null: int, settings: Settings) -> Velocity:
    """For 2 n latents of which the second half is ignored; the public code's blocks compile themselves."""
    model = _copy(base, Arm(reference=True) if way.reference else ARMS["compiled blocks"], step, settings)
    y, rule = torch.cat((labels, torch.full_like(labels, null))), step.settings
    return lambda x, t: model.forward_with_cfg(x, t, y, rule.cfg_scale, cfg_interval=True, cfg_interval_start=rule.cfg_interval_start)


def _compiled_velocity(step: Draw, base: nn.Module, labels: Tensor, null: int, device: torch.device, settings: Settings) -> Velocity:
    """For n latents; times on the device have both halves evaluated everywhere."""
    model = _copy(base, Arm(), step, settings)
    compile_forward(model, "blocks", settings.backend)
    rule = step.settings
    interval = (rule.cfg_interval_start, rule.cfg_interval_end)
    return guided(predictor(model, device, "bf16"), rule.cfg_scale, labels, null, rule.cfg_channels, interval)


# -- one step, and what follows the network in it --------------------------------------------------------------------


class GuidedStep:
    """One guided Euler step of `batch` images: 2 batch evaluations and the update, in bf16."""

    def __init__(self, arm: Arm, model: nn.Module, batch: int, device: torch.device):
        c, side = model.x_embedder.proj.in_channels, int(model.pos_embed.shape[1] ** 0.5)
        self.model, self.device = model.eval(), device
        self.x = torch.randn(2 * batch, c, side, side, device=device)
        self.t = torch.full((2 * batch,), 0.5, device=device)
        null = model.y_embedder.num_classes
        self.y = torch.cat((torch.randint(null, (batch,), device=device), torch.full((batch,), null, device=device)))

    @torch.no_grad()
    def __call__(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            v = self.model.forward_with_cfg(self.x, self.t, self.y, 10.0)
        return self.x + 0.004 * v


@dataclass(frozen=True)
class OneStep(Step):
    """A guided step in the ways of `steps.ARMS`."""

    def fitting(self, device: torch.device) -> int:
        return self.batch

    def makers(self, device: torch.device, settings: Settings) -> dict[str, Callable[[], Call]]:
        base = base_model(self.size, device)
        model = lambda arm: in_the_way_of(arm, base, self.size, settings.backend, settings.reference)
        return {name: lambda arm=ARMS[name]: GuidedStep(arm, model(arm), self.batch, device) for name in self.arms}

    def facts(self, seconds: dict[str, float]) -> dict[str, Any]:
        flops = 2 * flops_per_image(config(self.size))
        return dict(
            images_per_second={name: round(self.batch / median, 2) for name, median in seconds.items()},
            tflops={name: round(flops * self.batch / median / 1e12, 2) for name, median in seconds.items()},
        )


def update(x: Tensor, v: Tensor, dt: Tensor) -> Tensor:
    """Guidance of 3 channels and Euler's step: x (n, C, H, W), v (2 n, C, H, W) of both halves, dt () on the host."""
    cond, weak = v.chunk(2)
    mixed = weak[:, :3] + PUBLISHED.cfg_scale * (cond[:, :3] - weak[:, :3])
    return x + dt * torch.cat((mixed, cond[:, 3:]), dim=1)


def short_update(x: Tensor, v: Tensor, dt: float) -> Tensor:
    """The same to rounding, in 3 of PyTorch's kernels instead of 6."""
    cond, weak = v.chunk(2)
    mixed = torch.lerp(weak[:, :3], cond[:, :3], PUBLISHED.cfg_scale)
    return x.add(torch.cat((mixed, cond[:, 3:]), dim=1), alpha=dt)


@dataclass(frozen=True)
class Update(Step):
    """What follows the network in a guided step, as written and as one fused kernel: the most that an operator for it could save."""

    def compiles(self, arm: str) -> bool:
        return "compiled" in arm

    def fitting(self, device: torch.device) -> int:
        return self.batch

    def makers(self, device: torch.device, settings: Settings) -> dict[str, Callable[[], Call]]:
        shape = (self.batch, *_shape(self))
        x, v, dt = torch.randn(shape, device=device), torch.randn(2 * shape[0], *shape[1:], device=device), torch.tensor(0.004)
        one = torch.compile(update, dynamic=False, fullgraph=True, backend=settings.backend)
        ways = (lambda: update(x, v, dt), lambda: short_update(x, v, 0.004), lambda: one(x, v, 0.004))
        calls = dict(zip(UPDATE_ARMS, ways))
        return {arm: lambda arm=arm: calls[arm] for arm in self.arms}

    def facts(self, seconds: dict[str, float]) -> dict[str, Any]:
        return {}


WHAT = "250-step sampling"
STEP_ARMS = (*MAIN_ARMS, "fused, one attention kernel, compiled blocks")  # needs no gradient
UPDATE_ARMS = ("as written", "lerp, cat, add", "fused, compiled")
ARMS_WITH_WHOLE = tuple(arm + end for arm in ("compiled bf16", "equal batch", "as configured") for end in ("", WHOLE))
STEPS: tuple[Step, ...] = (  # most valuable first
    Draw(WHAT, "XL/1", 64, ("fused", "compiled bf16", "equal batch", "as configured")),
    Draw(WHAT, "XL/1", 64, ("fused fp8", "as configured"), label="fp8"),
    Draw(WHAT, "B/1", 64, ("fused", *ARMS_WITH_WHOLE), batches=2),
    Update("guided update", "XL/1", 64, UPDATE_ARMS, graph=True),
    Update("guided update", "XL/1", 4, UPDATE_ARMS, graph=True),
    OneStep("sample", "XL/1", 64, ("eager", *STEP_ARMS)),
    OneStep("sample", "XL/1", 4, STEP_ARMS, graph=True),
    OneStep("sample", "B/1", 64, ("eager", *STEP_ARMS)),
    OneStep("sample", "B/1", 4, STEP_ARMS, graph=True),
    Draw(WHAT, "B/1", 64, ("fused fp8", "as configured"), label="fp8", batches=2),
    Draw(WHAT, "XL/1", 64, ("fused", "public code, equal batch", "public code, as configured"), label="public code"),
    Draw(WHAT, "B/1", 64, ("fused", "public code, equal batch", "public code, as configured"), label="public code", batches=2),
)


def rehearsal(step: Step) -> Step:
    """The same at a size for a CPU: fewer steps for a draw."""
    small = replace(step, size="tiny", batch=2)
    return replace(small, times=17) if isinstance(small, Draw) else small


REHEARSED = tuple(rehearsal(STEPS[n]) for n in (2, 1, 3, 6, 10))  # one of each kind, and every way of a draw
