"""Self-attention from packed qkv: `qk_norm_rope`, then softmax(q kᵀ · scale) v per head, heads side by side.

Vaswani et al. 2017, equation 1, after the prologue of `qk_norm_rope.py`; scale is 1 / sqrt(Dh) unless given.

Shapes  qkv (B, N, 3, H, Dh), cos, sin (N, Dh), weights and biases (Dh,) -> (B, N, H · Dh) in qkv's dtype.
Dtypes  arithmetic fp32, one rounding, at the store; q and k are rounded between the prologue and a library's attention.
Saved   q, k, v, output, log-sum-exp.  HBM bytes a token of H Dh elements at s bytes: forward 4 H Dh s in one kernel,
        8 H Dh s as prologue and attention; backward 8 H Dh s, and 6 H Dh s (8 with the norm) for the prologue.
"""

import torch.nn.functional as F
from torch import Tensor

from .._checks import arithmetic_dtype, check_number, without_autocast
from .._registry import use_triton
from ..attention_backends import attention
from .qk_norm_rope import check_qkv, qk_norm_rope, qk_norm_rope_reference


def qk_norm_rope_attention_reference(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm: str | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
) -> Tensor:
    """qkv (B, N, 3, H, Dh), cos, sin (N, Dh) -> (B, N, H · Dh) in qkv's dtype; nothing is rounded on the way."""
    wide = qkv.to(arithmetic_dtype(qkv, q_weight, k_weight, q_bias, k_bias))
    q, k, v = qk_norm_rope_reference(wide, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, eps)
    with without_autocast(qkv):
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(2).to(qkv.dtype)


def qk_norm_rope_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm: str | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
    impl: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Attention from packed qkv (B, N, 3, H, Dh), cos, sin (N, Dh) or None -> (B, N, H · Dh) in qkv's dtype.

    norm is None, "rms" or "layer"; weights and biases (Dh,); scale defaults to 1 / sqrt(Dh). "auto" on a GPU is the
    prologue and PyTorch's attention in qkv's dtype; "torch", and "auto" on a CPU, is the reference. backend is a name of
    `attention_backends` for what follows the prologue; "auto" is PyTorch's.
    """
    op = "qk_norm_rope_attention"
    check_qkv(op, qkv, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, eps)
    if scale is not None:
        check_number(op, "scale", scale)
    prologue = use_triton(op, impl, qkv, q_weight, k_weight, q_bias, k_bias)
    if prologue or (impl == "auto" and qkv.is_cuda):
        q, k, v = qk_norm_rope(qkv, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, eps, impl="triton" if prologue else "auto")
        return attention(q, k, v, scale=scale, backend=backend).transpose(1, 2).flatten(2)
    if backend != "auto":
        q, k, v = qk_norm_rope_reference(qkv, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, eps)
        return attention(q, k, v, scale=scale, backend=backend).transpose(1, 2).flatten(2)
    return qk_norm_rope_attention_reference(qkv, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, eps, scale)
