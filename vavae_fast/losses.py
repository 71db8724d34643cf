"""The objectives of the tokenizer as pure functions. Yao et al. 2025 (VA-VAE), section 3; Esser et al. 2021 (VQGAN).

autoencoder    nll + kl_weight kl + lambda_gan g_loss + lambda_vf vf        generator_objective
discriminator  hinge (or vanilla) loss of real and reconstructed images     discriminator_objective

nll = sum(|x - r| + perceptual_weight LPIPS(x, r)) / B      kl = KL(q(z | x) || N(0, 1)), summed over the latent, mean over B
vf  = distmat_weight mdms + cos_weight mcos                 g_loss = -mean D(r)
lambda_gan = disc_weight |grad nll| / |grad g_loss| at the decoder's last layer, lambda_vf likewise at the encoder's
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import vavae_kernels
from vavae_fast.errors import is_number, require


def vf_loss(
    z: Tensor, aux: Tensor, distmat_margin: float, cos_margin: float, impl: str = "auto", projection: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """VF loss (VA-VAE, equations 3 to 6): z, aux (B, C, H, W) -> mdms, mcos, two scalars.

        mcos = mean_i  relu(1 - cos_margin - cos(z_i, aux_i))
        mdms = mean_ij relu(|cos(z_i, z_j) - cos(aux_i, aux_j)| - distmat_margin)     over all N x N pairs of tokens

    With `projection` (F, C), aux has F channels and z is projected to them first. At least float32; fp64 stays fp64. A
    zero token has cosine 0 with everything. impl "torch" is the text below; "auto" the fused operator, unless aux wants
    a gradient; "triton" insists on its kernels. `ValueError`: shapes that do not fit, no tokens, a margin that is no number.
    """
    channels = z.shape[1] if projection is None else projection.shape[0]
    if z.ndim != 4 or aux.shape != (z.shape[0], channels, *z.shape[2:]) or (projection is not None and projection.shape[1] != z.shape[1]):
        through = "" if projection is None else f" through a projection {tuple(projection.shape)}"
        raise ValueError(f"vf_loss: z is {tuple(z.shape)}{through} and aux {tuple(aux.shape)}; expected (B, C, H, W) on one grid")
    if z.numel() == 0:
        raise ValueError(f"vf_loss: z is empty, shape {tuple(z.shape)}: a mean over no tokens is not a number")
    require(is_number(distmat_margin), "vf_loss: distmat_margin", distmat_margin, "a finite number")
    require(is_number(cos_margin), "vf_loss: cos_margin", cos_margin, "a finite number")
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"vf_loss: impl must be auto, torch or triton, got {impl!r}")
    if impl == "triton" or (impl == "auto" and not aux.requires_grad):
        return vavae_kernels.vf_loss(z, projection, aux, distmat_margin, cos_margin, impl=impl)
    dtype = torch.promote_types(torch.promote_types(z.dtype, aux.dtype), torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        z, aux = z.to(dtype).flatten(2), aux.to(dtype).flatten(2)  # (B, C, N)
        if projection is not None:
            z = torch.einsum("fc,bcn->bfn", projection.to(dtype), z)
        mdms = F.relu((_cosines(z) - _cosines(aux)).abs() - distmat_margin).mean()
        mcos = F.relu(1 - cos_margin - F.cosine_similarity(z, aux, dim=1)).mean()
    return mdms, mcos


def _cosines(x: Tensor) -> Tensor:
    """(B, C, N) -> (B, N, N): the cosine of every pair of tokens."""
    x = F.normalize(x, dim=1)
    return x.transpose(1, 2) @ x


def reconstruction_nll(images: Tensor, reconstructions: Tensor, distance: Tensor | None = None, perceptual_weight: float = 1.0) -> Tensor:
    """sum(|x - r| + perceptual_weight p) / B: Laplace's negative log-likelihood with log-variance 0, which is never trained.

    images, reconstructions (B, 3, H, W); distance p (B, 1, 1, 1) spreads over all 3 H W values of its image, so that its
    weight in the sum is 3 H W. Per image, not per pixel.
    """
    error = (_wide(images) - _wide(reconstructions)).abs()
    if distance is not None:
        error = error + perceptual_weight * distance
    return error.sum() / images.shape[0]


def kl_loss(posterior) -> Tensor:
    """KL(q(z | x) || N(0, 1)), nats an image: mean over the batch of posterior.kl() (N,)."""
    return posterior.kl().mean()


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """(mean relu(1 - D(x)) + mean relu(1 + D(r))) / 2: Lim and Ye 2017, "Geometric GAN"."""
    return 0.5 * (F.relu(1.0 - _wide(logits_real)).mean() + F.relu(1.0 + _wide(logits_fake)).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """(mean softplus(-D(x)) + mean softplus(D(r))) / 2: Goodfellow et al. 2014, on logits."""
    return 0.5 * (F.softplus(-_wide(logits_real)).mean() + F.softplus(_wide(logits_fake)).mean())


def generator_loss(logits_fake: Tensor) -> Tensor:
    """-mean D(r): what the autoencoder lowers, with either loss of the discriminator."""
    return -_wide(logits_fake).mean()


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def adaptive_weight(nll_loss: Tensor, other_loss: Tensor, last_layer: Tensor, maximum: float) -> Tensor:
    """|d nll / d w| / (|d other / d w| + 1e-4) at w = last_layer, clamped to [0, maximum], without gradient: ().

    VQGAN, equation 7 (maximum 1e4, the decoder's last layer); VA-VAE, equation 7 (1e8, the encoder's). It makes the two
    gradients equally long there. The graphs are kept for the backward pass that follows.
    """
    (nll_gradient,) = torch.autograd.grad(nll_loss, last_layer, retain_graph=True)
    (other_gradient,) = torch.autograd.grad(other_loss, last_layer, retain_graph=True)
    return (_wide(nll_gradient).norm() / (_wide(other_gradient).norm() + 1e-4)).clamp(0.0, maximum).detach()


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """`weight` from global_step `threshold` on, `value` before."""
    return weight if global_step >= threshold else value


@dataclass(frozen=True)
class LossWeights:
    """`lossconfig.params` of the reference, same names; the defaults are those of its class.

    disc_start counts optimizer steps of both networks, as the reference does: iteration i, from 0, is step 2 i for the
    autoencoder and 2 i + 1 for the discriminator. So 5001 lets the discriminator train from iteration 2500 on and the
    autoencoder feel it from 2501 on.
    """

    kl_weight: float = 1.0
    perceptual_weight: float = 1.0
    disc_weight: float = 1.0
    disc_start: int = 0
    disc_factor: float = 1.0
    disc_loss: str = "hinge"
    vf_weight: float = 1e2
    adaptive_vf: bool = False
    distmat_margin: float = 0.0
    cos_margin: float = 0.0
    distmat_weight: float = 1.0
    cos_weight: float = 1.0

    def __post_init__(self):
        if self.disc_loss not in DISCRIMINATOR_LOSSES:
            raise ValueError(f"disc_loss must be {' or '.join(DISCRIMINATOR_LOSSES)}, got {self.disc_loss!r}")

    def generator_factor(self, iteration: int) -> float:
        """disc_factor once the autoencoder feels the discriminator, 0 before."""
        return adopt_weight(self.disc_factor, 2 * iteration, self.disc_start)

    def discriminator_factor(self, iteration: int) -> float:
        """disc_factor once the discriminator trains, 0 before."""
        return adopt_weight(self.disc_factor, 2 * iteration + 1, self.disc_start)


class Alignment(NamedTuple):
    """What the VF loss compares: the sampled z and frozen features.

    reverse_proj true:  z (B, C, h, w), features (B, F, h, w), projection (F, C) = weight of the 1x1 convolution.
    reverse_proj false: features are already projected to C channels, with their gradient; projection is None.
    """

    z: Tensor
    features: Tensor
    projection: Tensor | None = None


class Judges(NamedTuple):
    """Networks that look at reconstructions: LPIPS (x, r) -> (B, 1, 1, 1), and D(r) -> logits. None leaves the term out."""

    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    discriminator: Callable[[Tensor], Tensor] | None = None


class LastLayers(NamedTuple):
    """Where adaptive weights compare gradients: `last_encoder_weight` and `last_decoder_weight` of the autoencoder."""

    encoder: Tensor
    decoder: Tensor


def generator_objective(
    images: Tensor,
    reconstructions: Tensor,
    posterior,
    iteration: int,
    weights: LossWeights,
    judges: Judges,
    last_layers: LastLayers,
    alignment: Alignment | None = None,
) -> dict[str, Tensor]:
    """The autoencoder's loss and its parts, each a () tensor; only "loss" has a gradient. No host sync.

    images, reconstructions (B, 3, H, W) in [-1, 1]; iteration counts batches from 0. Keys, always all of them, 0 for a
    term that is off: loss, nll (a sum over pixels, per image), rec (mean |x - r|), perceptual, kl, g_loss, d_weight,
    mdms, mcos, vf_loss, vf_weight. The discriminator is not run before it counts. Without a graph (validation) the
    adaptive weights are 0, as in the reference.
    """
    zero = torch.zeros((), device=reconstructions.device)
    training = reconstructions.requires_grad
    seen = _cut(reconstructions)
    use_lpips = judges.perceptual is not None and weights.perceptual_weight > 0
    distance = judges.perceptual(images, seen) if use_lpips else None
    nll = _rejoin(reconstruction_nll(images, seen, distance, weights.perceptual_weight), seen, reconstructions)
    kl = kl_loss(posterior)
    loss = nll + weights.kl_weight * kl

    g_loss = d_weight = mdms = mcos = vf = vf_weight = zero
    factor = weights.generator_factor(iteration)
    if judges.discriminator is not None and factor > 0:
        seen = _cut(reconstructions)
        g_loss = _rejoin(generator_loss(judges.discriminator(seen)), seen, reconstructions)
        d_weight = weights.disc_weight * adaptive_weight(nll, g_loss, last_layers.decoder, 1e4) if training else zero
        loss = loss + d_weight * factor * g_loss
    if alignment is not None:
        z, features, projection = alignment
        mdms, mcos = vf_loss(z, features, weights.distmat_margin, weights.cos_margin, projection=projection)
        vf = weights.distmat_weight * mdms + weights.cos_weight * mcos
        vf_weight = zero + weights.vf_weight
        if weights.adaptive_vf:
            vf_weight = weights.vf_weight * adaptive_weight(nll, vf, last_layers.encoder, 1e8) if training else zero
        loss = loss + vf_weight * vf

    rec = (_wide(images) - _wide(reconstructions)).abs().mean()
    perceptual = zero if distance is None else distance.mean()
    parts = dict(nll=nll, rec=rec, perceptual=perceptual, kl=kl, g_loss=g_loss, d_weight=d_weight, mdms=mdms, mcos=mcos)
    return {"loss": loss, **{name: value.detach() for name, value in (parts | dict(vf_loss=vf, vf_weight=vf_weight)).items()}}


def discriminator_objective(
    images: Tensor, reconstructions: Tensor, iteration: int, weights: LossWeights, discriminator: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The discriminator's loss: {"d_loss", "logits_real", "logits_fake"}, each a () tensor; only d_loss has a gradient.

    Before the discriminator trains it is not run, and all three are 0 without a graph; ask
    `weights.discriminator_factor(iteration)` first. The reconstructions get no gradient.
    """
    factor = weights.discriminator_factor(iteration)
    if factor <= 0:
        zero = torch.zeros((), device=images.device)
        return {"d_loss": zero, "logits_real": zero, "logits_fake": zero}
    real, fake = discriminator(images.detach()), discriminator(reconstructions.detach())
    d_loss = factor * DISCRIMINATOR_LOSSES[weights.disc_loss](real, fake)
    return {"d_loss": d_loss, "logits_real": _wide(real).mean().detach(), "logits_fake": _wide(fake).mean().detach()}


def _cut(reconstructions: Tensor) -> Tensor:
    """The reconstructions as a leaf of their own: a judge is differentiated up to here, once."""
    return reconstructions.detach().requires_grad_(reconstructions.requires_grad)


def _rejoin(loss: Tensor, seen: Tensor, reconstructions: Tensor) -> Tensor:
    """`loss` of `seen`, as a function of `reconstructions`: the same value, and the gradient computed here once for all.

    A loss is differentiated up to three times in a step (for two adaptive weights and the update). Its gradient at the
    reconstructions is the same each time, so VGG16 and the discriminator run backward once, and neither gets gradients
    for its own parameters.
    """
    if not seen.requires_grad:
        return loss
    (gradient,) = torch.autograd.grad(loss, seen)
    carrier = (_wide(reconstructions) * gradient).sum()
    return loss.detach() + (carrier - carrier.detach())
