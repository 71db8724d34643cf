"""The layers of the tokenizer's network: plain PyTorch, and beside three of them the same arithmetic in a form that suits a GPU.

Fused layers have the parameters and keys of the plain ones. They keep channels last (N, H, W, C in memory), so that none of them, nor
a convolution, converts a map:

    GroupNorm, SiLU   one operator; PyTorch's own group norm gives channels first, whatever it is given
    attention         tokens are a view of the map, and q, k and v are one product
    halving           the convolution pads by itself, on all sides, and what that adds is cut off after it, where the map is a quarter
    doubling          each place four times, then 3x3, is one transposed convolution of stride 2: 4 / 9 of the products, no large map in between
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vavae_kernels

_EPS = 1e-6


class Blocks(NamedTuple):
    """Makes the parts that every level shares."""

    groups: int
    dropout: float
    fused: bool

    def norm(self, channels: int, silu: bool = True) -> "GroupNorm":
        return GroupNorm(self.groups, channels, silu, self.fused)

    def residual(self, c_in: int, c_out: int) -> "ResidualBlock":
        return ResidualBlock(c_in, c_out, self)

    def attention(self, channels: int) -> "Attention":
        return (FusedAttention if self.fused else Attention)(channels, self)

    def halve(self, channels: int) -> "Downsample":
        return (FusedDownsample if self.fused else Downsample)(channels)

    def double(self, channels: int) -> "Upsample":
        return (FusedUpsample if self.fused else Upsample)(channels)

    def level(self, c_in: int, c_out: int, count: int, attends: bool) -> nn.Module:
        """`count` residual blocks, each followed by attention where the level attends."""
        level = nn.Module()
        level.block = nn.ModuleList(self.residual(c_in if i == 0 else c_out, c_out) for i in range(count))
        level.attn = nn.ModuleList(self.attention(c_out) for _ in range(count if attends else 0))
        return level

    def middle(self, channels: int) -> nn.Module:
        middle = nn.Module()
        middle.block_1 = self.residual(channels, channels)
        middle.attn_1 = self.attention(channels)
        middle.block_2 = self.residual(channels, channels)
        return middle


def conv3(c_in: int, c_out: int) -> nn.Conv2d:
    """3x3, padded to keep the size."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm with eps 1e-6, followed by SiLU unless told otherwise; `fused` runs both as one operator."""

    def __init__(self, groups: int, channels: int, silu: bool = True, fused: bool = False):
        super().__init__(groups, channels, eps=_EPS)
        self.silu, self.fused = silu, fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return vavae_kernels.group_norm_silu(x, self.num_groups, self.weight, self.bias, eps=self.eps, silu=self.silu)
        y = super().forward(x)
        return F.silu(y) if self.silu else y


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, c_in: int, c_out: int, blocks: Blocks):
        super().__init__()
        self.norm1 = blocks.norm(c_in)
        self.conv1 = conv3(c_in, c_out)
        self.norm2 = blocks.norm(c_out)
        self.dropout = nn.Dropout(blocks.dropout)
        self.conv2 = conv3(c_out, c_out)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.dropout(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class Attention(nn.Module):
    """x + proj(softmax(q k^T / sqrt(C)) v): one head over the h w places of a map."""

    def __init__(self, channels: int, blocks: Blocks):
        super().__init__()
        self.norm = blocks.norm(channels, silu=False)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))  # (N, 1, h w, C)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.squeeze(1).transpose(1, 2).reshape(x.shape))


class FusedAttention(Attention):
    """Tokens are a view of a map with channels last; q, k and v are one product."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (N, h w, C)
        three = (self.q, self.k, self.v)
        weight, bias = torch.cat([conv.weight for conv in three]).flatten(1), torch.cat([conv.bias for conv in three])
        q, k, v = F.linear(tokens, weight, bias).unsqueeze(1).chunk(3, dim=-1)  # (N, 1, h w, C)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        out = F.linear(out, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded below and to the right only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class FusedDownsample(Downsample):
    """The same without a padded copy of the map: the convolution pads by 2 on all sides, and its first row and column, which reach above
    and to the left, are cut off."""

    def forward(self, x: Tensor) -> Tensor:
        below, right = x.shape[2] % 2, x.shape[3] % 2  # of an odd size the padding makes a last row or column too
        return F.pad(F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=2), (-1, -right, -1, -below))


class Upsample(nn.Module):
    """Each place four times, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class FusedUpsample(Upsample):
    """The same as one transposed convolution of stride 2 with a kernel of 4x4, made of the 3x3 one in every pass.

    Pixel 2 i + a of a row hears places i - 1 + a .. i + a alone: w0 | w1 + w2 where a = 0, w0 + w1 | w2 where a = 1. So 4 products a
    pixel of the result instead of 9, and neither pass reads or makes another tensor as large as the result.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        along = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # 4 taps of 3, along one axis
        self.register_buffer("taps", torch.kron(along, along), persistent=False)  # (16, 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self._kernel(x.dtype), self.conv.bias, stride=2, padding=1)

    def _kernel(self, dtype: torch.dtype) -> Tensor:
        """(C_in, C_out, 4, 4), summed in the precision of the weight and then rounded to `dtype`."""
        weight = self.conv.weight  # (C_out, C_in, 3, 3)
        c_out, c_in = weight.shape[:2]
        rows = weight.permute(0, 2, 3, 1).reshape(c_out, 9, c_in)
        with torch.autocast(weight.device.type, enabled=False):
            kernel = self.taps.expand(c_out, 16, 9) @ rows
        return kernel.view(c_out, 4, 4, c_in).permute(3, 0, 1, 2).to(dtype, memory_format=torch.channels_last)
