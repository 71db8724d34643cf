"""Self-attention from packed qkv: `qk_norm_rope`, then softmax(q kᵀ · scale) v per head, heads side by side.

Vaswani et al. 2017, equation 1, after the prologue of `qk_norm_rope.py`; scale is 1 / sqrt(Dh) unless given.

Two ways on a GPU. By default the prologue's kernel, then an attention of `attention_backends`, whose backward is its own.
With backend="fused", where no gradient is needed, one kernel for both (`_qk_attention.py`): half of the traffic.

Shapes  qkv (B, N, 3, H, Dh), cos, sin (N, Dh), weights and biases (Dh,) -> (B, N, H · Dh) in qkv's dtype.
Dtypes  arithmetic fp32, one rounding, at the store; q and k are rounded before their product, and the weights before theirs.
Saved   q, k, v, output, log-sum-exp; nothing by the one kernel.  HBM bytes a token of H Dh elements at s bytes: forward
        4 H Dh s in one kernel, 8 H Dh s as prologue and attention; backward 8 H Dh s, and 6 H Dh s (8 with the norm) for the
        prologue.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import arithmetic_dtype, check, check_number, without_autocast
from .._registry import use_triton
from ..attention_backends import BACKENDS, attention
from ._qk_attention import fused_attention
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

    norm is None, "rms" or "layer"; weights and biases (Dh,); scale defaults to 1 / sqrt(Dh). impl "auto" on a GPU is the
    prologue's kernel and PyTorch's attention in qkv's dtype; "torch", and "auto" on a CPU, is the reference. backend is a
    name of `attention_backends` for what follows the prologue; "auto" is PyTorch's. "fused" is one kernel instead of both
    where nothing asks for a gradient, and elsewhere the same as "auto"; it has not been timed yet, so "auto" never takes it.
    Raises ValueError, in one line, for what the kernel or the backend does not take.
    """
    op = "qk_norm_rope_attention"
    check_qkv(op, qkv, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, eps)
    if scale is not None:
        check_number(op, "scale", scale)
    arguments = (qkv, cos, sin, q_weight, k_weight, q_bias, k_bias)
    on_triton = use_triton(op, impl, *arguments)
    if backend == "fused":
        _check_one_kernel(op, qkv, on_triton)
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments)):
            return fused_attention(*arguments, norm, float(eps), 1 / math.sqrt(qkv.shape[4]) if scale is None else float(scale))
        backend = "auto"
    if on_triton or (impl == "auto" and qkv.is_cuda):
        q, k, v = qk_norm_rope(*arguments, norm, eps, impl="triton" if on_triton else "auto")
        return attention(q, k, v, scale=scale, backend=backend).transpose(1, 2).flatten(2)
    if backend != "auto":
        q, k, v = qk_norm_rope_reference(*arguments, norm, eps)
        return attention(q, k, v, scale=scale, backend=backend).transpose(1, 2).flatten(2)
    return qk_norm_rope_attention_reference(*arguments, norm, eps, scale)


def _check_one_kernel(op: str, qkv: Tensor, on_triton: bool) -> None:
    """Raise ValueError unless backend "fused" takes qkv, also where a gradient keeps its kernel from running: training fails first."""
    row = replace(BACKENDS["fused"], devices=None) if on_triton else BACKENDS["fused"]  # on a CPU Triton's interpreter runs it
    reason = row.why_not(qkv.unbind(2)[0].transpose(1, 2))
    if reason is None and not on_triton:
        reason = "is a Triton kernel, which impl='torch' or a missing Triton rules out"
    check(reason is None, op, f"backend 'fused' {reason}; change that or take backend 'auto'")
