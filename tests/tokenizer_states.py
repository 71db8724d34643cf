"""A tiny tokenizer in training, and images for it."""

import torch
from torch import nn

from vavae_fast import rng
from vavae_fast.data.images import ImageBatch
from vavae_fast.distributed import World
from vavae_fast.losses import LossWeights
from vavae_fast.models.autoencoder import AutoencoderKL
from vavae_fast.models.discriminator import PatchDiscriminator
from vavae_fast.models.standins import StandInEncoder, StandInPerceptual
from vavae_fast.training.guard import Guard
from vavae_fast.training.tokenizer import Stage, TokenizerState, plain_gradients

CPU = torch.device("cpu")
SEED = 3
ADAM = dict(lr=1e-3, betas=(0.5, 0.9))
FORM = dict(embed_dim=4, ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, attn_resolutions=(), resolution=16, z_channels=4)  # of the autoencoder


def state(reverse_proj=True, proj_fix=False, vf=True, dtype=torch.float32, disc_start=0, adaptive_vf=True, **changes) -> TokenizerState:
    """Images 16 x 16, latents 4 x 2 x 2, features 8 x 2 x 2; `changes` are of the state's own fields."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(**FORM)
    discriminator = PatchDiscriminator(n_layers=1, ndf=4)
    foundation = StandInEncoder(dim=8, depth=1, heads=2).requires_grad_(False).eval() if vf else None
    perceptual = StandInPerceptual(widths=(8, 8)).requires_grad_(False).eval()
    projection = None
    if vf:
        projection = nn.Conv2d(4, 8, 1, bias=False) if reverse_proj else nn.Conv2d(8, 4, 1)
    for network in (autoencoder, discriminator, foundation, perceptual, projection):
        if network is not None:
            network.to(dtype)
    trained = [*autoencoder.parameters(), *(projection.parameters() if vf else ())]
    weights = LossWeights(kl_weight=1e-6, disc_weight=0.5, disc_start=disc_start, vf_weight=0.1, adaptive_vf=adaptive_vf,
                          distmat_margin=0.1, cos_margin=0.2)  # fmt: skip
    plain = dict(
        autoencoder=autoencoder, projection=projection, discriminator=discriminator, foundation=foundation, perceptual=perceptual,
        optimizer=torch.optim.Adam(trained, fused=True, **ADAM), optimizer_disc=torch.optim.Adam(discriminator.parameters(), fused=True, **ADAM),
        stages=(Stage(0, 100, weights, 1e-3, train_projection=not proj_fix),), guard=Guard(CPU, 10), world=World(0, 1, CPU), seed=SEED, bf16=False,
        reverse_proj=reverse_proj, gradients=plain_gradients,
    )  # fmt: skip
    return TokenizerState(**(plain | changes))


def batch(count=4, first=0) -> ImageBatch:
    """Images `first` to first + count of an endless row of noise."""
    index = torch.arange(first, first + count)
    pixels = (255 * torch.sigmoid(rng.normal(7, index, like=torch.empty(count, 3, 16, 16)))).to(torch.uint8)
    return ImageBatch(pixels, index % 2, index)
