"""Packed qkv -> q and k, normalised per head and rotated by their place in the image; v as it is.

Norm    over the head dimension, optional: "rms" (with weight) or "layer" (weight and bias).  Dehghani et al. 2023.
Rotary  for each pair (x_2i, x_2i+1), as a complex number: x -> x · (cos_i + i sin_i).  Su et al. 2021; the tables of
        LightningDiT hold row angles in their first half of columns and column angles in the second (EVA-02, 2-D axial).

Shapes  qkv (B, N, 3, H, Dh) of any strides; cos, sin (N, Dh), both columns of a pair alike: the even ones are read;
        weights and biases (Dh,) -> q, k, v (B, H, N, Dh) in qkv's dtype; v is a view of qkv.
Layout  q and k lie in memory as (B, N, H, Dh): heads of a token side by side, as in v's view and in attention's output.
Dtypes  arithmetic fp32, one rounding, at the stores of q and k. cos and sin are tables: they get no gradient.
Saved   cos, sin, and with a norm qkv and the weights.  HBM bytes a token of H Dh elements at s bytes: forward 4 H Dh s,
        backward 6 H Dh s (8 with the norm); weights' gradients are summed from fp32 partials on top.
"""

import torch
from torch import Tensor

from .._checks import arithmetic_dtype, check, check_eps, check_no_grad, check_shape, check_tensors
from .._registry import use_triton
from ._qk_norm_rope import qk_norm_rope_triton
from .norm_modulate import normalized


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., N, Dh) with each interleaved pair turned by its angle, cos and sin (N, Dh); in x's dtype."""
    c, s = cos[:, ::2].to(x.dtype), sin[:, ::2].to(x.dtype)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((real * c - imaginary * s, imaginary * c + real * s), dim=-1).flatten(-2)


def _head(x: Tensor, cos, sin, weight, bias, norm: str | None, eps: float) -> Tensor:
    """One of q, k: (B, N, H, Dh), promoted by the caller -> (B, H, N, Dh)."""
    if norm is not None:
        x = normalized(x, weight, norm, eps)
    if bias is not None:
        x = x + bias.to(x.dtype)
    x = x.transpose(1, 2)
    return x if cos is None else rotated(x, cos, sin)


def qk_norm_rope_reference(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm: str | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, N, 3, H, Dh), cos, sin (N, Dh) -> q, k, v (B, H, N, Dh) in qkv's dtype."""
    dtype = arithmetic_dtype(qkv, q_weight, k_weight, q_bias, k_bias)
    q, k, v = qkv.unbind(2)
    q = _head(q.to(dtype), cos, sin, q_weight, q_bias, norm, eps)
    k = _head(k.to(dtype), cos, sin, k_weight, k_bias, norm, eps)
    return q.to(qkv.dtype), k.to(qkv.dtype), v.transpose(1, 2)


def qk_norm_rope(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm: str | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention's prologue. qkv (B, N, 3, H, Dh), cos, sin (N, Dh) or None -> q, k, v (B, H, N, Dh) in qkv's dtype.

    norm is None, "rms" or "layer"; weights and biases (Dh,). cos = sin = None rotates nothing. v is a view of qkv.
    """
    check_qkv("qk_norm_rope", qkv, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, eps)
    arguments = (qkv, cos, sin, q_weight, k_weight, q_bias, k_bias)
    run = qk_norm_rope_triton if use_triton("qk_norm_rope", impl, *arguments) else qk_norm_rope_reference
    return run(*arguments, norm, float(eps))


def check_qkv(
    op: str,
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    norm: str | None,
    eps: float,
) -> None:
    """Shapes of the docstring; weights only beside a norm, biases only beside "layer"."""
    affine = dict(q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias)
    check_tensors(op, qkv=qkv, optional=dict(cos=cos, sin=sin, **affine))
    check_eps(op, eps)
    packed = qkv.ndim == 5 and qkv.shape[2] == 3 and qkv.shape[4] > 0
    check(packed, op, f"qkv must be (B, N, 3, H, Dh) with Dh > 0, got shape {tuple(qkv.shape)}")
    tokens, head_dim = qkv.shape[1], qkv.shape[4]
    check(norm in (None, "rms", "layer"), op, f"norm must be None, 'rms' or 'layer', got {norm!r}")
    check((cos is None) == (sin is None), op, "cos and sin come together, or both None")
    check(cos is None or head_dim % 2 == 0, op, f"the rotary embedding turns pairs: head dimension {head_dim} must be even")
    check_shape(op, "cos", cos, (tokens, head_dim))
    check_shape(op, "sin", sin, (tokens, head_dim))
    check_no_grad(op, cos=cos, sin=sin)
    for name, tensor in affine.items():
        check_shape(op, name, tensor, (head_dim,))
    check(norm is not None or (q_weight is None and k_weight is None), op, "q_weight and k_weight need norm='rms' or 'layer'")
    check(norm == "layer" or (q_bias is None and k_bias is None), op, "q_bias and k_bias need norm='layer'")
