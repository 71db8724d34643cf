"""The tokenizer: a convolutional variational autoencoder, image (N, 3, H, W) <-> latent (N, C, H / r, W / r).

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", appendix G; VA-VAE (arXiv
2501.01423) trains the same network with another objective (losses.py). State-dict keys are the reference's.

    encoder   conv_in, then per level: residual blocks (attention), halve; middle; norm, SiLU, conv_out -> moments
    decoder   conv_in, middle, then per level: residual blocks (attention), double; norm, SiLU, conv_out -> image
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vavae_fast.errors import is_integer, is_number, require
from vavae_fast.models.autoencoder_layers import Blocks, conv3


class DiagonalGaussian:
    """q(z | x) = N(mean, diag(exp(logvar))), from moments (N, 2C, h, w); logvar is clamped to [-30, 20].

    `mean`, `logvar`, `std`, `var` (N, C, h, w), at least float32.
    """

    def __init__(self, moments: Tensor):
        moments = moments.to(torch.promote_types(moments.dtype, torch.float32))
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise (N, C, h, w); `noise` is drawn from `generator` (on mean's device) when it is not given."""
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) of each sample, summed over C, h, w: (N,), in nats."""
        return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class Autoencoded(NamedTuple):
    """What one pass through the tokenizer gives: reconstruction (N, 3, H, W), posterior, and the z that was decoded."""

    reconstruction: Tensor
    posterior: DiagonalGaussian
    z: Tensor


class AutoencoderKL(nn.Module):
    """The tokenizer of latent diffusion and VA-VAE.

    ch * ch_mult[level] are the channels of a level; every level but the last halves the image, so the latent is
    2 ** (len(ch_mult) - 1) times smaller. `attn_resolutions` name the levels that attend, by their size when the image
    is `resolution`; other sizes run through the same levels. `z_channels` (default embed_dim) lie between the encoder
    and the 1x1 quant_conv. `num_groups` of every norm defaults to the largest power of two up to 32 that divides the
    channels of every level: 32 for the published models, less for tiny ones. `fused` runs the layers' fused forms and keeps
    channels last in memory, weights and images too; parameters and keys do not change.
    """

    def __init__(
        self,
        embed_dim: int = 32,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        resolution: int = 256,
        in_channels: int = 3,
        out_ch: int = 3,
        z_channels: int | None = None,
        dropout: float = 0.0,
        num_groups: int | None = None,
        fused: bool = False,
    ):
        super().__init__()
        z_channels = embed_dim if z_channels is None else z_channels
        counts = dict(embed_dim=embed_dim, ch=ch, num_res_blocks=num_res_blocks, resolution=resolution, in_channels=in_channels)
        counts |= dict(out_ch=out_ch, z_channels=z_channels) | ({} if num_groups is None else dict(num_groups=num_groups))
        for key, value in counts.items():
            require(is_integer(value) and value > 0, f"AutoencoderKL: {key}", value, "an integer above 0")
        levels = isinstance(ch_mult, Sequence) and len(ch_mult) > 0 and all(is_integer(mult) and mult > 0 for mult in ch_mult)
        require(levels, "AutoencoderKL: ch_mult", ch_mult, "a list of one integer above 0 a level, and not empty")
        require(is_number(dropout) and 0 <= dropout < 1, "AutoencoderKL: dropout", dropout, "a number in [0, 1)")
        widths = [ch * mult for mult in ch_mult]
        groups = _default_groups([ch, *widths]) if num_groups is None else num_groups
        if any(width % groups for width in [ch, *widths]):
            raise ValueError(f"AutoencoderKL: num_groups {groups} does not divide the channels of every level, {[ch, *widths]}")
        attends = [resolution // 2**level in attn_resolutions for level in range(len(widths))]
        blocks = Blocks(groups, dropout, fused)
        self.embed_dim, self.in_channels, self.dropout = embed_dim, in_channels, dropout
        self.encoder = Encoder(in_channels, ch, widths, num_res_blocks, attends, z_channels, blocks)
        self.decoder = Decoder(out_ch, ch, widths, num_res_blocks, attends, z_channels, blocks)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.fused = fused
        if fused:
            self.to(memory_format=torch.channels_last)

    @property
    def downsample_ratio(self) -> int:
        """How many pixels a latent token spans, along each axis."""
        return 2 ** (len(self.encoder.down) - 1)

    @property
    def last_encoder_weight(self) -> nn.Parameter:
        """Where the adaptive weight of the VF loss compares gradients."""
        return self.encoder.conv_out.weight

    @property
    def last_decoder_weight(self) -> nn.Parameter:
        """Where the adaptive weight of the GAN loss compares gradients."""
        return self.decoder.conv_out.weight

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Images x (N, in_channels, H, W) in [-1, 1] -> posterior over (N, embed_dim, H / r, W / r)."""
        ratio = self.downsample_ratio
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"encode: images have shape {tuple(x.shape)}, expected (N, {self.in_channels}, H, W)")
        if x.shape[2] % ratio or x.shape[3] % ratio or 0 in x.shape[2:]:
            raise ValueError(f"encode: images are {x.shape[2]} x {x.shape[3]}, expected multiples of {ratio}; crop or resize them")
        return DiagonalGaussian(self._moments(x))

    def _moments(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(self._taken(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Latents z (N, embed_dim, h, w), not normalised -> images (N, out_ch, h r, w r), about [-1, 1]."""
        if z.ndim != 4 or z.shape[1] != self.embed_dim:
            raise ValueError(f"decode: latents have shape {tuple(z.shape)}, expected (N, {self.embed_dim}, h, w)")
        return self.decoder(self.post_quant_conv(self._taken(z)))

    def _taken(self, x: Tensor) -> Tensor:
        """x in the dtype of the weights, and in their memory format."""
        return x.to(self.quant_conv.weight.dtype, memory_format=torch.channels_last if self.fused else torch.preserve_format)

    def forward(self, x: Tensor, sample_posterior: bool = True, noise: Tensor | None = None) -> Autoencoded:
        """encode, draw z (or take the mean), decode. `noise` (N, C, h, w) makes the draw a function of the caller's."""
        posterior = self.encode(x)
        z = posterior.sample(noise=noise) if sample_posterior else posterior.mode()
        return Autoencoded(self.decode(z), posterior, z)


def _default_groups(widths: Sequence[int]) -> int:
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if all(width % groups == 0 for width in widths))


class Encoder(nn.Module):
    """Images (N, 3, H, W) -> (N, 2 z_channels, H / r, W / r), before quant_conv."""

    def __init__(self, c_in: int, ch: int, widths: Sequence[int], count: int, attends: Sequence[bool], z_channels: int, blocks: Blocks):
        super().__init__()
        self.conv_in = conv3(c_in, ch)
        self.down = nn.ModuleList()
        for index, (before, width) in enumerate(zip([ch, *widths], widths)):
            level = blocks.level(before, width, count, attends[index])
            if index < len(widths) - 1:
                level.downsample = blocks.halve(width)
            self.down.append(level)
        self.mid = blocks.middle(widths[-1])
        self.norm_out = blocks.norm(widths[-1])
        self.conv_out = conv3(widths[-1], 2 * z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = _through(level, h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(self.norm_out(h))


class Decoder(nn.Module):
    """(N, z_channels, h, w), after post_quant_conv -> images (N, out_ch, h r, w r). One residual block a level more than the encoder."""

    def __init__(self, c_out: int, ch: int, widths: Sequence[int], count: int, attends: Sequence[bool], z_channels: int, blocks: Blocks):
        super().__init__()
        self.conv_in = conv3(z_channels, widths[-1])
        self.mid = blocks.middle(widths[-1])
        levels = []  # as they run: from the smallest map to the image
        before = widths[-1]
        for index in reversed(range(len(widths))):
            level = blocks.level(before, widths[index], count + 1, attends[index])
            if index > 0:
                level.upsample = blocks.double(widths[index])
            levels.append(level)
            before = widths[index]
        self.up = nn.ModuleList(reversed(levels))  # keys count levels from the image, as the encoder's do
        self.norm_out = blocks.norm(widths[0])
        self.conv_out = conv3(widths[0], c_out)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            h = _through(level, h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(self.norm_out(h))


def _through(level: nn.Module, h: Tensor) -> Tensor:
    for index, block in enumerate(level.block):
        h = block(h)
        if level.attn:
            h = level.attn[index](h)
    return h
