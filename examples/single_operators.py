"""Single operators in a block of your own: a block as it is usually written, and the same with calls in place of formulas.

    python examples/single_operators.py

No patch(), no class of ours: the operators are functions of tensors. On a CPU they run as plain PyTorch, on a GPU as kernels.
"""

import torch
import torch.nn.functional as F
from before_after import TINY, check, outputs, run
from torch import Tensor, nn

from vavae_kernels import AdamWEMA, flow_interpolate, flow_loss, gate_add_norm_modulate, norm_modulate, qk_norm_rope_attention, swiglu

WIDTH, HEADS, SIDE = TINY["hidden_size"], TINY["num_heads"], TINY["input_size"]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps=1e-6)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels by an angle of each token: x (B, H, N, Dh), cos, sin (N, Dh)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


class Block(nn.Module):
    """A DiT block with RMSNorm, adaLN-Zero, QK-norm, rotary positions and SwiGLU, as it is usually written."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1, self.norm2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(width // heads)), nn.Parameter(torch.ones(width // heads))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.w12, self.w3 = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, N, D), c (B, D), cos, sin (N, Dh) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, dim=-1)
        h = rms(x, self.norm1) * (1 + scale1[:, None]) + shift1[:, None]
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(rms(q, self.q_norm), cos, sin), rotate(rms(k, self.k_norm), cos, sin)
        y = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + gate1[:, None] * y
        h = rms(x, self.norm2) * (1 + scale2[:, None]) + shift2[:, None]
        a, b = self.w12(h).chunk(2, dim=-1)
        return x + gate2[:, None] * self.w3(F.silu(a) * b)


class FusedBlock(Block):
    """The same parameters, and an operator for each run of formulas between two matrix products."""

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, N, D), c (B, D), cos, sin (N, Dh) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, dim=-1)
        h = norm_modulate(x, scale1, shift1, self.norm1)
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, Dh), as the projection gives it
        y = self.proj(qk_norm_rope_attention(qkv, cos, sin, self.q_norm, self.k_norm, norm="rms"))
        x, h = gate_add_norm_modulate(x, y, gate1, scale2, shift2, self.norm2)
        return x + gate2[:, None] * self.w3(swiglu(self.w12(h)))


def loss(model: nn.Module, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Flow matching with a direction loss, as it is usually written. Data x1, noise x0 (B, C, H, W), times t (B,)."""
    time = t[:, None, None, None]
    v, u = model((1 - time) * x0 + time * x1, t), x1 - x0
    return (v - u).square().mean() + (1 - F.cosine_similarity(v, u, dim=1)).mean()


def fused_loss(model: nn.Module, x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """The same by two operators; flow_loss gives a value for each image."""
    v = model(flow_interpolate(x0, x1, t), t)
    squared, direction = flow_loss(v, x0, x1)
    return squared.mean() + direction.mean()


def angles(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (N, Dh) of some rotary table; yours stays as it is."""
    frequencies = 1 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(tokens), frequencies).repeat_interleave(2, dim=1)
    return angle.cos(), angle.sin()


class Convolution(nn.Module):
    """Some velocity model: v (B, C, H, W) of x and t."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) * (1 + t[:, None, None, None])


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain, fused = Block().to(device), FusedBlock().to(device)
    fused.load_state_dict(plain.state_dict())
    cos, sin = (table.to(device) for table in angles(SIDE * SIDE, WIDTH // HEADS))
    inputs = dict(x=torch.randn(2, SIDE * SIDE, WIDTH, device=device), c=torch.randn(2, WIDTH, device=device), cos=cos, sin=sin)
    for line in check(plain, fused, inputs, (None,)):
        print(f"block: {line}")

    model = Convolution().to(device)
    batch = [torch.randn(2, 4, SIDE, SIDE, device=device) for _ in range(2)] + [torch.rand(2, device=device)]
    (before,), (after,) = outputs(loss(model, *batch)), outputs(fused_loss(model, *batch))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    print(f"loss: {after.item():.6f}, as written {before.item():.6f}")

    optimizer = AdamWEMA(model.named_parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, ema_decay=0.9999)
    after.backward()
    optimizer.step()  # AdamW and the EMA of every weight in one pass
    print(f"EMA of {', '.join(optimizer.ema_state_dict())}")


if __name__ == "__main__":
    run(main)
