"""The tokenizer's training step, encoding and decoding in every way to run them, on weights of one seed and random images.

    plain fp32   the objectives as they are written, PyTorch's layers: the public code's arithmetic, convolutions in TF32 on a GPU
    naive bf16   the same under autocast, networks and images with channels last: what a port of a few lines gives
    fused        one pass, fused layers, bf16; compiled: LPIPS too, as `train.compile` has it on a GPU; fp32: what a CPU runs
    public code  networks and losses of VAVAE_REFERENCE, a checkout of the public repository

The foundation model is DINOv2-L with random weights, LPIPS is random; all ways but fused ones step with torch's fused Adam too.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.steps import Settings, Step, rehearsal
from vavae_fast import losses
from vavae_fast.data.images import ImageBatch
from vavae_fast.distributed import World
from vavae_fast.losses import LossWeights
from vavae_fast.models.autoencoder import AutoencoderKL, DiagonalGaussian
from vavae_fast.models.autoencoder_layers import FusedUpsample, Upsample
from vavae_fast.models.compilation import compile_in_training
from vavae_fast.models.discriminator import PatchDiscriminator
from vavae_fast.models.foundation import FoundationModel, create_foundation_model
from vavae_fast.models.inference import round_weights
from vavae_fast.models.perceptual import LPIPS
from vavae_fast.models.standins import StandInEncoder
from vavae_fast.training.guard import Guard
from vavae_fast.training.one_pass import one_pass_gradients
from vavae_fast.training.tokenizer import Stage, TokenizerState, plain_gradients, tokenizer_step

SIZES: dict[str, dict[str, Any]] = {
    "f16d32": dict(embed_dim=32, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,), resolution=256),
    "small": dict(embed_dim=8, ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=64),
    "tiny": dict(embed_dim=4, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, attn_resolutions=(2,), resolution=16),
}
PUBLISHED = LossWeights(kl_weight=1e-6, disc_weight=0.5, vf_weight=0.1, adaptive_vf=True, distmat_margin=0.25, cos_margin=0.5)
NEVER = 10**9  # disc_start of a step without the GAN
ADAM = dict(lr=1e-4, betas=(0.5, 0.9), fused=True)

TRAINING_ARMS = ("plain fp32", "naive bf16", "fused", "fused, compiled LPIPS")
WAYS = ("plain fp32", "naive bf16", "compiled bf16", "fused", "fused, compiled")
DOUBLING_ARMS = ("upsampled map", "2x2 convolution, shuffled", "fused, transposed convolution")
BASELINES = (*dict.fromkeys((*TRAINING_ARMS, *WAYS, *DOUBLING_ARMS, "public code")),)

Call = Callable[[], Any]


@dataclass(frozen=True)
class TokenizerStep(Step):
    """what: "tokenizer" (a training step), "encode", "decode" or "doubling" (the decoder's largest, forward and backward)."""

    gan: bool = False

    def compiles(self, arm: str) -> bool:
        return "compiled" in arm

    def fitting(self, device: torch.device) -> int:
        return self.batch  # halved by `compare` where an arm runs out of memory

    def makers(self, device: torch.device, settings: Settings) -> dict[str, Callable[[], Call]]:
        make = dict(tokenizer=_training, encode=_encoding, decode=_decoding, doubling=_doubling)[self.what]

        def seeded(arm: str) -> Call:
            torch.manual_seed(0)  # the same weights and images for every way
            return make(self, arm, device, settings)

        return {arm: lambda arm=arm: seeded(arm) for arm in self.arms}

    def facts(self, seconds: dict[str, float]) -> dict[str, Any]:
        if self.what == "doubling":
            return {}
        return dict(images_per_second={name: round(self.batch / median, 2) for name, median in seconds.items()})


MAIN = TokenizerStep("tokenizer", "f16d32", 32, TRAINING_ARMS, label="GAN", gan=True)
STEPS = (  # most valuable first
    MAIN,
    TokenizerStep("tokenizer", "f16d32", 8, TRAINING_ARMS, label="GAN", gan=True),
    TokenizerStep("decode", "f16d32", 64, WAYS),
    TokenizerStep("encode", "f16d32", 64, WAYS),
    TokenizerStep("doubling", "f16d32", 32, DOUBLING_ARMS),
    TokenizerStep("tokenizer", "f16d32", 32, TRAINING_ARMS, label="no GAN"),
    TokenizerStep("tokenizer", "f16d32", 8, TRAINING_ARMS, label="no GAN"),
    TokenizerStep("tokenizer", "f16d32", 8, ("public code", "fused"), label="GAN, public code", gan=True),
)
REHEARSED = tuple(rehearsal(STEPS[n]) for n in (0, 2, 3, 4, 7))  # one of each kind
ON_CPU = (  # what a CPU has to say: products and bytes are fewer there too
    TokenizerStep("tokenizer", "small", 4, ("plain fp32", "fused fp32"), label="GAN", gan=True),
    TokenizerStep("tokenizer", "small", 4, ("plain fp32", "fused fp32"), label="no GAN"),
    TokenizerStep("tokenizer", "small", 4, ("public code", "fused fp32"), label="GAN, public code", gan=True),
)


# -- training --------------------------------------------------------------------------------------------------------


def _training(step: TokenizerStep, arm: str, device: torch.device, settings: Settings) -> Call:
    if arm == "public code":
        return _public_step(step, device, settings.reference)
    fused, bf16 = arm.startswith("fused"), not arm.endswith("fp32")
    state = _state(step, device, fused, bf16)
    if arm != "plain fp32":
        for network in (state.autoencoder, state.discriminator, state.perceptual, state.projection):
            network.to(memory_format=torch.channels_last)
    if fused and bf16:
        state.foundation.round_weights(torch.bfloat16)
        round_weights(state.perceptual.net)
    if "compiled" in arm:
        compile_in_training(state.perceptual, settings.backend)
    pixels = _pixels(step, device)
    if arm != "plain fp32":
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    batch = ImageBatch(pixels, torch.zeros(step.batch, dtype=torch.long), torch.arange(step.batch))
    number = iter(range(1, NEVER))  # step 0 begins a stage, and forgets moments

    return lambda: tokenizer_step(state, next(number), [batch])


def _state(step: TokenizerStep, device: torch.device, fused: bool, bf16: bool) -> TokenizerState:
    size = SIZES[step.size]
    foundation = _foundation(step.size, size)
    autoencoder, discriminator, perceptual = AutoencoderKL(**size, fused=fused), _discriminator(step.size), LPIPS.random()
    projection = nn.Conv2d(size["embed_dim"], foundation.feature_dim, 1, bias=False)
    for network in (foundation, autoencoder, discriminator, perceptual, projection):
        network.to(device)
    weights = LossWeights(**vars(PUBLISHED) | dict(disc_start=0 if step.gan else NEVER))
    trained = [*autoencoder.parameters(), *projection.parameters()]
    return TokenizerState(
        autoencoder=autoencoder, projection=projection, discriminator=discriminator, foundation=foundation, perceptual=perceptual,
        optimizer=torch.optim.Adam(trained, **ADAM), optimizer_disc=torch.optim.Adam(discriminator.parameters(), **ADAM),
        stages=(Stage(0, NEVER, weights, 1e-4),), guard=Guard(device, 10), world=World(0, 1, device), seed=0, bf16=bf16, reverse_proj=True,
        gradients=one_pass_gradients if fused else plain_gradients,
        foundation_stream=torch.cuda.Stream(device) if fused and device.type == "cuda" else None,
    )  # fmt: skip


def _foundation(name: str, size: dict[str, Any]) -> FoundationModel:
    grid = (size["resolution"] >> len(size["ch_mult"]) - 1,) * 2
    if name == "f16d32":
        return create_foundation_model("dinov2", random=True, grid=grid)
    return FoundationModel(StandInEncoder(size["resolution"], dim=64, depth=2, heads=2, grid=grid[0]), grid, "standin")


def _discriminator(name: str) -> PatchDiscriminator:
    return PatchDiscriminator() if name == "f16d32" else PatchDiscriminator(ndf=16, n_layers=2)


def _pixels(step: TokenizerStep, device: torch.device) -> Tensor:
    side = SIZES[step.size]["resolution"]
    return torch.randint(256, (step.batch, 3, side, side), dtype=torch.uint8, device=device)


# -- the public code -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _public_modules(folder: Path) -> Iterator[None]:
    """Imports of <checkout>/vavae inside. Of taming-transformers, whose LPIPS downloads its weights, our networks and losses stand in."""
    names = ["taming", "taming.modules", "taming.modules.losses", "taming.modules.losses.vqperceptual"]
    made = {name: types.ModuleType(name) for name in names}
    vars(made[names[-1]]).update(
        LPIPS=LPIPS.random, NLayerDiscriminator=lambda input_nc, n_layers, use_actnorm: PatchDiscriminator(input_nc, n_layers=n_layers),
        weights_init=lambda module: None, hinge_d_loss=losses.hinge_d_loss, vanilla_d_loss=losses.vanilla_d_loss,
        adopt_weight=losses.adopt_weight, torch=torch, nn=nn, F=F,
    )  # fmt: skip
    with mock.patch.dict(sys.modules, made), mock.patch.object(sys, "path", [str(folder), *sys.path]):
        yield


def _public_step(step: TokenizerStep, device: torch.device, reference: Path | None) -> Call:
    """autoencoder.py's training_step without Lightning: both losses, both Adams, every iteration. ImportError names what it needs."""
    if reference is None:
        raise ImportError("VAVAE_REFERENCE is not set")
    if not (reference / "vavae" / "ldm").is_dir():
        raise ImportError(f"{reference} holds no vavae/ldm: VAVAE_REFERENCE is the folder of a LightningDiT checkout")
    size = SIZES[step.size]
    with _public_modules(reference / "vavae"):
        networks = importlib.import_module("ldm.modules.diffusionmodules.model")
        contperceptual = importlib.import_module("ldm.modules.losses.contperceptual")
    dims = dict(size, double_z=True, z_channels=size["embed_dim"], in_channels=3, out_ch=3, dropout=0.0)
    z_channels = dims.pop("embed_dim")
    encoder, decoder = networks.Encoder(**dims), networks.Decoder(**dims)
    quant, post_quant = nn.Conv2d(2 * z_channels, 2 * z_channels, 1), nn.Conv2d(z_channels, z_channels, 1)
    foundation = _foundation(step.size, size)
    projection = nn.Conv2d(z_channels, foundation.feature_dim, 1, bias=False)
    loss = contperceptual.LPIPSWithDiscriminator(
        disc_start=0 if step.gan else NEVER, disc_num_layers=_discriminator(step.size).n_layers, kl_weight=PUBLISHED.kl_weight,
        disc_weight=PUBLISHED.disc_weight, vf_weight=PUBLISHED.vf_weight, adaptive_vf=True, cos_margin=PUBLISHED.cos_margin,
        distmat_margin=PUBLISHED.distmat_margin,
    )  # fmt: skip
    trained = nn.ModuleList([encoder, decoder, quant, post_quant, projection]).to(device)
    loss.to(device), foundation.to(device)
    adam = [torch.optim.Adam(parameters, lr=1e-4, betas=(0.5, 0.9)) for parameters in (trained.parameters(), loss.discriminator.parameters())]
    images = _pixels(step, device).float() / 127.5 - 1

    def run() -> None:
        posterior = DiagonalGaussian(quant(encoder(images)))
        z = posterior.sample()
        reconstructions = decoder(post_quant(z))
        last = dict(last_layer=decoder.conv_out.weight, enc_last_layer=encoder.conv_out.weight)
        given = dict(z=projection(z), aux_feature=foundation(images))
        for optimizer, (which, more) in zip(adam, ((0, given), (1, {}))):
            value, _ = loss(images, reconstructions, posterior, which, 0, **last, **more)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

    return run


# -- encoding, decoding, doubling ------------------------------------------------------------------------------------


def _inference(step: TokenizerStep, arm: str, device: torch.device, settings: Settings, method: str, x: Tensor) -> Call:
    """The tokenizer's `method` without gradients. In bf16 all weights are rounded beforehand."""
    bf16 = arm != "plain fp32"
    network = AutoencoderKL(**SIZES[step.size], fused=arm.startswith("fused")).to(device).eval().requires_grad_(False)
    if bf16:
        round_weights(network.to(memory_format=torch.channels_last))
        x = x.contiguous(memory_format=torch.channels_last)
    function = getattr(network, method)
    if "compiled" in arm:
        function = torch.compile(function, dynamic=False, fullgraph=True, backend=settings.backend)

    @torch.no_grad()
    def run() -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            return function(x)

    return run


def _encoding(step: TokenizerStep, arm: str, device: torch.device, settings: Settings) -> Call:
    return _inference(step, arm, device, settings, "_moments", _pixels(step, device) / 127.5 - 1)


def _decoding(step: TokenizerStep, arm: str, device: torch.device, settings: Settings) -> Call:
    size = SIZES[step.size]
    side = size["resolution"] >> len(size["ch_mult"]) - 1
    return _inference(step, arm, device, settings, "decode", torch.randn(step.batch, size["embed_dim"], side, side, device=device))


class ShuffledUpsample(Upsample):
    """Doubling as one 2x2 convolution with 4 C outputs, and a copy that puts them in their places."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        c, along = x.shape[1], weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # (phase, place, tap)
        kernel = torch.einsum("apt,bqu,octu->abocpq", along, along, weight).reshape(4 * c, c, 2, 2)
        y = F.conv2d(x, kernel.to(memory_format=torch.channels_last), self.conv.bias.repeat(4), padding=1).permute(0, 2, 3, 1)
        n, h, w = x.shape[0], x.shape[2], x.shape[3]
        row, place, phase = y.stride(1), y.stride(2), c  # phase (a, b) of pixel (2 i + a, 2 j + b) stands at place (i + a, j + b)
        strides = (y.stride(0), row, row + 2 * phase, place, place + phase, 1)
        return y.as_strided((n, h, 2, w, 2, c), strides).reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


def _doubling(step: TokenizerStep, arm: str, device: torch.device, settings: Settings) -> Call:
    """Forward and both gradients at the size of the decoder's last doubling."""
    size = SIZES[step.size]
    kinds = dict(zip(DOUBLING_ARMS, (Upsample, ShuffledUpsample, FusedUpsample)))
    channels, side = size["ch"] * size["ch_mult"][1], size["resolution"] // 2
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    module = kinds[arm](channels).to(device, dtype, memory_format=torch.channels_last)
    last = torch.channels_last
    x = torch.randn(step.batch, channels, side, side, device=device, dtype=dtype).contiguous(memory_format=last).requires_grad_()
    v = torch.randn(step.batch, channels, 2 * side, 2 * side, device=device, dtype=dtype).contiguous(memory_format=last)
    return lambda: torch.autograd.grad(module(x), [x, module.conv.weight], v)
