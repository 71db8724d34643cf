"""The objectives of the tokenizer as pure functions. Yao et al. 2025 (VA-VAE), section 3; Esser et al. 2021 (VQGAN).

autoencoder    nll + kl_weight kl + lambda_gan g_loss + lambda_vf vf        generator_objective
discriminator  hinge (or vanilla) loss of real and reconstructed images     discriminator_objective

nll = sum(|x - r| + perceptual_weight LPIPS(x, r)) / B      kl = KL(q(z | x) || N(0, 1)), summed over the latent, mean over B
vf  = distmat_weight mdms + cos_weight mcos                 g_loss = -mean D(r)
lambda_gan = disc_weight |grad nll| / |grad g_loss| at the decoder's last layer, lambda_vf likewise at the encoder's

The two objectives are the plain formulation: each weight takes gradients of its own, and the update one more. `training/one_pass.py`
has the same gradients from the same terms with fewer passes through the networks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
    error = (wide(images) - wide(reconstructions)).abs()
    if distance is not None:
        error = error + perceptual_weight * distance
    return error.sum() / images.shape[0]


class Posterior(Protocol):
    """What an encoder gives: a distribution of latents that knows its divergence from N(0, 1)."""

    def kl(self) -> Tensor: ...


def kl_loss(posterior: Posterior) -> Tensor:
    """KL(q(z | x) || N(0, 1)), nats an image: mean over the batch of posterior.kl() (N,)."""
    return posterior.kl().mean()


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """(mean relu(1 - D(x)) + mean relu(1 + D(r))) / 2: Lim and Ye 2017, "Geometric GAN"."""
    return 0.5 * (F.relu(1.0 - wide(logits_real)).mean() + F.relu(1.0 + wide(logits_fake)).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """(mean softplus(-D(x)) + mean softplus(D(r))) / 2: Goodfellow et al. 2014, on logits."""
    return 0.5 * (F.softplus(-wide(logits_real)).mean() + F.softplus(wide(logits_fake)).mean())


def generator_loss(logits_fake: Tensor) -> Tensor:
    """-mean D(r): what the autoencoder lowers, with either loss of the discriminator."""
    return -wide(logits_fake).mean()


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is: what losses are summed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def vjp(
    outputs: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Tensor | Sequence[Tensor | None] | None = None, keep: bool = False
) -> tuple[Tensor, ...]:
    """J^T v at each of `inputs`, v = `cotangents` at `outputs` (None: 1, at a scalar). `keep` leaves the graph for another vector.

    Inside `torch.autocast` too: a gradient is computed in the precisions of its forward pass, which autocast would round once more.
    """
    with torch.autocast(inputs[0].device.type, enabled=False):
        return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=keep)


def gradient_ratio(nll_gradient: Tensor, other_gradient: Tensor, maximum: float) -> Tensor:
    """|nll_gradient| / (|other_gradient| + 1e-4), clamped to [0, maximum]: ().

    VQGAN, equation 7 (maximum 1e4, at the decoder's last layer); VA-VAE, equation 7 (1e8, at the encoder's). The other loss times
    this has a gradient as long as nll's there.
    """
    return (wide(nll_gradient).norm() / (wide(other_gradient).norm() + 1e-4)).clamp(0.0, maximum)


def adaptive_weight(nll_loss: Tensor, other_loss: Tensor, last_layer: Tensor, maximum: float) -> Tensor:
    """`gradient_ratio` of two losses at the weight `last_layer`: (). The graphs are kept for the backward pass that follows."""
    (nll_gradient,) = vjp(nll_loss, [last_layer], keep=True)
    (other_gradient,) = vjp(other_loss, [last_layer], keep=True)
    return gradient_ratio(nll_gradient, other_gradient, maximum)


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


def reconstruction_terms(
    images: Tensor, reconstructions: Tensor, weights: LossWeights, perceptual: Callable[[Tensor, Tensor], Tensor] | None
) -> dict[str, Tensor]:
    """nll; and without gradient rec = mean |x - r| and perceptual = mean LPIPS, 0 where that is off. Each ()."""
    distance = perceptual(images, reconstructions) if perceptual is not None and weights.perceptual_weight > 0 else None
    return dict(
        nll=reconstruction_nll(images, reconstructions, distance, weights.perceptual_weight),
        rec=(wide(images) - wide(reconstructions.detach())).abs().mean(),
        perceptual=images.new_zeros(()) if distance is None else distance.detach().mean(),
    )


def alignment_terms(alignment: Alignment, weights: LossWeights) -> dict[str, Tensor]:
    """mdms, mcos and vf_loss, their weighted sum. Each ()."""
    z, features, projection = alignment
    mdms, mcos = vf_loss(z, features, weights.distmat_margin, weights.cos_margin, projection=projection)
    return dict(mdms=mdms, mcos=mcos, vf_loss=weights.distmat_weight * mdms + weights.cos_weight * mcos)


def terms_off(like: Tensor) -> dict[str, Tensor]:
    """The terms of the GAN and of the alignment, 0, on like's device: what they are while they are off."""
    return dict.fromkeys(("g_loss", "d_weight", "mdms", "mcos", "vf_loss", "vf_weight"), torch.zeros((), device=like.device))


def weighted_sum(terms: dict[str, Tensor], iteration: int, weights: LossWeights) -> Tensor:
    """The autoencoder's loss: nll + kl_weight kl + d_weight disc_factor g_loss + vf_weight vf_loss."""
    gan = terms["d_weight"] * weights.generator_factor(iteration) * terms["g_loss"]
    return terms["nll"] + weights.kl_weight * terms["kl"] + gan + terms["vf_weight"] * terms["vf_loss"]


def generator_objective(
    images: Tensor,
    reconstructions: Tensor,
    posterior: Posterior,
    iteration: int,
    weights: LossWeights,
    judges: Judges,
    last_layers: LastLayers,
    alignment: Alignment | None = None,
) -> dict[str, Tensor]:
    """The autoencoder's loss and its parts, each a () tensor; only "loss" has a gradient. No host sync.

    images, reconstructions (B, 3, H, W) in [-1, 1]; iteration counts batches from 0. Keys, always all of them, 0 for a
    term that is off: loss, nll (a sum over pixels, per image), rec (mean |x - r|), perceptual, kl, g_loss, d_weight,
    mdms, mcos, vf_loss, vf_weight. The discriminator is not run before it counts, and its parameters are not to follow this
    loss: differentiate at those of the autoencoder and the projection. Without a graph (validation) the adaptive weights are
    0, as in the reference.
    """
    training = reconstructions.requires_grad
    terms = reconstruction_terms(images, reconstructions, weights, judges.perceptual) | dict(kl=kl_loss(posterior)) | terms_off(images)
    if judges.discriminator is not None and weights.generator_factor(iteration) > 0:
        terms["g_loss"] = generator_loss(judges.discriminator(reconstructions))
        if training:
            terms["d_weight"] = weights.disc_weight * adaptive_weight(terms["nll"], terms["g_loss"], last_layers.decoder, 1e4)
    if alignment is not None:
        terms |= alignment_terms(alignment, weights)
        if not weights.adaptive_vf:
            terms["vf_weight"] = torch.full_like(terms["vf_loss"], weights.vf_weight)
        elif training:
            terms["vf_weight"] = weights.vf_weight * adaptive_weight(terms["nll"], terms["vf_loss"], last_layers.encoder, 1e8)
    return {"loss": weighted_sum(terms, iteration, weights), **{name: value.detach() for name, value in terms.items()}}


def discriminator_terms(real: Tensor, fake: Tensor, iteration: int, weights: LossWeights) -> dict[str, Tensor]:
    """d_loss of the logits of images and of reconstructions, and the mean of each without gradient. Each ()."""
    d_loss = weights.discriminator_factor(iteration) * DISCRIMINATOR_LOSSES[weights.disc_loss](real, fake)
    return {"d_loss": d_loss, "logits_real": wide(real).mean().detach(), "logits_fake": wide(fake).mean().detach()}


def discriminator_objective(
    images: Tensor, reconstructions: Tensor, iteration: int, weights: LossWeights, discriminator: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The discriminator's loss: {"d_loss", "logits_real", "logits_fake"}, each a () tensor; only d_loss has a gradient.

    Before the discriminator trains it is not run, and all three are 0 without a graph; ask
    `weights.discriminator_factor(iteration)` first. The reconstructions get no gradient.
    """
    if weights.discriminator_factor(iteration) <= 0:
        zero = torch.zeros((), device=images.device)
        return {"d_loss": zero, "logits_real": zero, "logits_fake": zero}
    return discriminator_terms(discriminator(images.detach()), discriminator(reconstructions.detach()), iteration, weights)
