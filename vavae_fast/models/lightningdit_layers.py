"""The parts of LightningDiT below the block: attention, feed-forward, norms, rotary and absolute positions, embeddings.

A class and its `Fused…` twin hold the same parameters; the twin calls an operator of `vavae_kernels`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae_kernels import attention, qk_norm_rope_attention, swiglu


class Attention(nn.Module):
    """Multi-head self-attention with optional QK-norm and 2-D rotary positions.

    backend is a name of `vavae_kernels.BACKENDS` for the softmax attention itself; "auto" is PyTorch's.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, use_rmsnorm: bool, backend: str = "auto"):
        super().__init__()
        self.num_heads, self.head_dim, self.backend = num_heads, dim // num_heads, backend
        head_norm = RMSNorm if use_rmsnorm else nn.LayerNorm
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = head_norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = head_norm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def packed_qkv(self, x: Tensor) -> Tensor:
        """x (N, T, D) -> (N, T, 3, H, Dh)."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))

    def heads(self, x: Tensor, rope: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, T, D) -> q, k, v (N, H, T, Dh), q and k normalised and turned."""
        q, k, v = self.packed_qkv(x).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if rope is None else (rope(q), rope(k), v)

    def forward(self, x: Tensor, rope: nn.Module | None = None) -> Tensor:
        """x (N, T, D) -> (N, T, D)."""
        q, k, v = self.heads(x, rope)
        if self.backend == "auto":
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = attention(q.to(v.dtype), k.to(v.dtype), v, backend=self.backend)  # as autocast does for PyTorch's
        return self.proj(out.transpose(1, 2).flatten(2))


class FusedAttention(Attention):
    """The same attention as one operator on the packed qkv."""

    def forward(self, x: Tensor, rope: nn.Module | None = None) -> Tensor:
        cos, sin = (None, None) if rope is None else (rope.freqs_cos, rope.freqs_sin)
        norm = {}
        if not isinstance(self.q_norm, nn.Identity):
            q, k = self.q_norm, self.k_norm
            norm = dict(q_weight=q.weight, k_weight=k.weight, norm="rms", eps=q.eps)
            if not isinstance(q, RMSNorm):
                norm |= dict(q_bias=q.bias, k_bias=k.bias, norm="layer")
        return self.proj(qk_norm_rope_attention(self.packed_qkv(x), cos, sin, **norm, backend=self.backend))


class SwiGLUFFN(nn.Module):
    """w3(silu(a) · b) with [a | b] = w12(x).  Shazeer 2020."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class FusedSwiGLUFFN(SwiGLUFFN):
    """The same feed-forward with the gate as one operator."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(swiglu(self.w12(x)))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), tanh form: the feed-forward of DiT."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis, the mean in at least fp32.  Zhang & Sennrich 2019."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def token_norm(dim: int, use_rmsnorm: bool) -> nn.Module:
    return RMSNorm(dim) if use_rmsnorm else nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x (N, T, D) · (1 + scale (N, D)) + shift (N, D)."""
    x = x * (1 + scale.unsqueeze(1))
    return x if shift is None else x + shift.unsqueeze(1)


class RotaryEmbedding2D(nn.Module):
    """Rotary positions on a square grid: the first half of a head turns with the row, the second with the column.

    Su et al. 2021, base 10000, interleaved pairs; the 2-D axial form of EVA-02. Tables freqs_cos, freqs_sin (T, Dh).
    """

    def __init__(self, head_dim: int, grid: int):
        super().__init__()
        self.head_dim, self.grid = head_dim, grid
        cos, sin = self._tables()
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)

    def _tables(self) -> tuple[Tensor, Tensor]:
        per_axis = self.head_dim // 2
        frequency = 1.0 / 10000 ** (torch.arange(0, per_axis, 2).float() / per_axis)
        angle = torch.outer(torch.arange(self.grid).float(), frequency).repeat_interleave(2, dim=1)  # (grid, Dh / 2)
        row = angle[:, None].expand(-1, self.grid, -1)
        column = angle[None].expand(self.grid, -1, -1)
        angles = torch.cat([row, column], dim=-1).flatten(0, 1)
        return angles.cos(), angles.sin()

    def reset_parameters(self) -> None:
        for buffer, table in zip((self.freqs_cos, self.freqs_sin), self._tables()):
            buffer.copy_(table)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, H, T, Dh), each pair (x_2i, x_2i+1) turned by its angle."""
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-odd, even), dim=-1).flatten(-2)
        return x * self.freqs_cos + turned * self.freqs_sin


class PatchEmbed(nn.Module):
    """Patches of p x p latent pixels to tokens: a convolution of stride p."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, T, D), tokens row by row."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t in [0, 1], unscaled, as cosines and sines of 128 frequencies from 1 to 1/10000, then an MLP.  Nichol et al. 2021 (GLIDE)."""

    FREQUENCIES = 256

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """t (N,) -> (N, D)."""
        weight_dtype = self.mlp[0].weight.dtype
        dtype = torch.promote_types(weight_dtype, torch.float32)
        half = self.FREQUENCIES // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype, device=t.device) / half)
        angle = t.to(dtype)[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(weight_dtype))


class LabelEmbedder(nn.Module):
    """One row for each class, and one for the null class if labels are ever dropped."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor, drop_labels: Tensor | None = None) -> Tensor:
        """y (N,), drop_labels (N,) bool or None -> (N, D)."""
        if drop_labels is not None and self.dropout_prob == 0:
            raise ValueError("LightningDiT: drop_labels needs a null class; build the model with class_dropout_prob above 0")
        if drop_labels is None and self.training and self.dropout_prob > 0:
            drop_labels = torch.rand(y.shape, device=y.device) < self.dropout_prob
        if drop_labels is not None:
            y = torch.where(drop_labels, self.num_classes, y)
        return self.embedding_table(y)


def sincos_positions(hidden_size: int, grid: int) -> Tensor:
    """(grid², D) fp32 positions of DiT: [sin, cos] of the column in the first half, of the row in the second.

    Computed in fp64 on the CPU whatever the default device is, as the public code does with NumPy.
    """
    quarter = hidden_size // 4
    place = torch.arange(grid, dtype=torch.float64, device="cpu")
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    angle = torch.outer(place, frequency)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, D / 2)
    column = axis[None].expand(grid, -1, -1)
    row = axis[:, None].expand(-1, grid, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1).float()
