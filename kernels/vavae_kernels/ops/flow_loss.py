"""Velocity loss of flow matching, per sample: mse = mean((v - u)²) and cosine = mean(1 - cos(v, u)) with u = x1 - x0.

Yao et al. 2025 (LightningDiT), section 4: the direction loss beside the squared error. cos is over the channels of a
pixel, cos(v, u) = v·u / (max(‖v‖, 1e-8) max(‖u‖, 1e-8)).

Shapes  v, x0, x1 (B, C, H, W) -> mse (B,), cosine (B,) in fp32 (fp64 in, fp64 out).
        Only v has a gradient: x0 and x1 are noise and data.
Saved   v, x0, x1.  HBM bytes an element at s bytes: forward 3 s, backward 4 s; u is never stored.
"""

import torch
from torch import Tensor

from .._checks import arithmetic_dtype, check, check_no_grad, check_shape, check_tensors
from .._registry import use_triton

COSINE_EPS = 1e-8  # of torch.nn.functional.cosine_similarity


def unit(x: Tensor, eps: float, dim: int) -> Tensor:
    """x / max(‖x‖, eps) along `dim`; a zero vector gives zeros, and a finite gradient."""
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True).clamp_min(eps * eps))


def flow_loss_reference(v: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """v, x0, x1 (B, C, H, W) -> mse (B,), cosine (B,)."""
    dtype = arithmetic_dtype(v, x0, x1)
    v, u = v.to(dtype), (x1.to(dtype) - x0.to(dtype)).detach()
    mse = (v - u).square().flatten(1).mean(1)
    cosine = (unit(v, COSINE_EPS, dim=1) * unit(u, COSINE_EPS, dim=1)).sum(1)
    return mse, (1 - cosine).flatten(1).mean(1)


def flow_loss(v: Tensor, x0: Tensor, x1: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Squared error and direction error of the velocity v against x1 - x0. All (B, C, H, W) -> mse (B,), cosine (B,).

    fp32, or fp64 where an input is. Differentiates v only; x0 or x1 requiring grad is a ValueError.
    """
    op = "flow_loss"
    check_tensors(op, v=v, x0=x0, x1=x1)
    check(v.ndim == 4, op, f"v must be (B, C, H, W), got shape {tuple(v.shape)}")
    check_shape(op, "x0", x0, tuple(v.shape))
    check_shape(op, "x1", x1, tuple(v.shape))
    check_no_grad(op, x0=x0, x1=x1)
    use_triton(op, impl)
    return flow_loss_reference(v, x0, x1)
