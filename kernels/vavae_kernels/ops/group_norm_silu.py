"""Group normalisation and SiLU of the tokenizer's residual blocks: n = (x - mean_g) · rstd_g · w_c + b_c; y = n · sigmoid(n).

Wu & He 2018; mean and variance over the pixels and channels of a group, in fp32.

Shapes  x (B, C, H, W), weight, bias (C,) -> y (B, C, H, W) in x's dtype and memory format (channels_last stays so:
        torch's own GroupNorm gives NCHW). Arithmetic fp32, one rounding, at the store of y.
Saved   x, weight, bias, mean, rstd (B, G).  HBM bytes an element at s bytes: forward 3 s, backward 5 s.

The kernels are in `_group_norm.py`. Cotangents of either memory format are taken.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import arithmetic_dtype, check, check_eps, check_shape, check_tensors, is_integer
from .._registry import use_triton
from ._group_norm import group_norm
from ._layout import memory_format


def group_norm_silu_reference(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-6, silu: bool = True
) -> Tensor:
    """x (B, C, H, W), weight, bias (C,) -> (B, C, H, W) in x's dtype and memory format."""
    dtype = arithmetic_dtype(x, weight, bias)
    n = F.group_norm(x.to(dtype), num_groups, weight.to(dtype), bias.to(dtype), eps)
    y = (n * torch.sigmoid(n) if silu else n).to(x.dtype)
    return y.contiguous(memory_format=memory_format(x))


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-6, silu: bool = True, impl: str = "auto"
) -> Tensor:
    """Group normalisation, then SiLU unless silu=False. x (B, C, H, W), weight, bias (C,) -> y like x."""
    op = "group_norm_silu"
    check_tensors(op, x=x, weight=weight, bias=bias)
    check(x.ndim == 4 and x.shape[1] > 0, op, f"x must be (B, C, H, W) with C > 0, got shape {tuple(x.shape)}")
    channels = x.shape[1]
    if not (is_integer(num_groups) and num_groups > 0):  # messages made only for an error: torch.compile cannot print a symbolic number
        raise ValueError(f"{op}: num_groups must be an integer above 0, got {num_groups!r}")
    check_eps(op, eps)
    if channels % num_groups != 0:
        raise ValueError(f"{op}: {channels} channels do not divide into {num_groups} groups")
    check_shape(op, "weight", weight, (channels,))
    check_shape(op, "bias", bias, (channels,))
    if use_triton(op, impl, x, weight, bias):
        return group_norm(x, int(num_groups), weight, bias, float(eps), bool(silu))
    return group_norm_silu_reference(x, num_groups, weight, bias, eps, silu)
