"""What our operators are compared with: the formula as a model writes it, and other libraries' kernels.

`PLAIN[op](**inputs)` is the formula in the model's own dtypes, where the operator's reference is more careful than a model is:
eager and compiled baselines run it. `peers(spec)` gives the kernels of other libraries by name, each `peer(inputs) -> callable` that
raises ImportError where the library is missing and NotImplementedError where it has no such case. Nothing here is a dependency.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vavae_kernels.attention_backends import attention
from vavae_kernels.testing.spec import Inputs, Spec

Peer = Callable[[Inputs], Callable[[], Any]]


def _normalized(x: Tensor, weight: Tensor | None, norm: str, eps: float) -> Tensor:
    """The public code's RMSNorm, or LayerNorm without affine."""
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    wide = x.float()
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).type_as(x)
    return y if weight is None else y * weight


def rms_norm(x, weight, eps=1e-6):
    return _normalized(x, weight, "rms", eps).to(x.dtype)


def norm_modulate(x, scale, shift=None, weight=None, norm="rms", eps=1e-6, out_dtype=None):
    y = _normalized(x, weight, norm, eps) * (1 + scale.unsqueeze(1))
    return (y if shift is None else y + shift.unsqueeze(1)).to(out_dtype or scale.dtype)


def gate_add_norm_modulate(residual, y, gate, scale, shift=None, weight=None, norm="rms", eps=1e-6, out_dtype=None):
    residual = residual + gate.unsqueeze(1) * y
    return residual, norm_modulate(residual, scale, shift, weight, norm, eps, out_dtype or y.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return (x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin).to(x.dtype)


def qk_norm_rope(qkv, cos, sin, q_weight=None, k_weight=None, q_bias=None, k_bias=None, norm=None, eps=1e-6):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    turned = []
    for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
        if norm is not None:
            x = (F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps) if norm == "layer" else _normalized(x, weight, "rms", eps)).to(qkv.dtype)
        turned.append(x if cos is None else _turned(x, cos, sin))
    return *turned, v


def qk_norm_rope_attention(qkv, cos, sin, q_weight=None, k_weight=None, q_bias=None, k_bias=None, norm=None, eps=1e-6, scale=None):
    """RoPE, then PyTorch's default attention in qkv's dtype: cuDNN's on sm_90."""
    q, k, v = qk_norm_rope(qkv, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, eps)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def swiglu(x12):
    a, b = x12.chunk(2, dim=-1)
    return F.silu(a) * b


def group_norm_silu(x, num_groups, weight, bias, eps=1e-6, silu=True):
    """As torch gives it: NCHW even for a channels_last x, which spares it the conversion that a convolution after it needs."""
    y = F.group_norm(x, num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(y) if silu else y


def flow_loss(v, x0, x1):
    difference = v.float() - (x1 - x0)
    return difference.square().flatten(1).mean(1), (1 - F.cosine_similarity(v.float(), x1 - x0, dim=1)).flatten(1).mean(1)


PLAIN: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        rms_norm, norm_modulate, gate_add_norm_modulate, qk_norm_rope, qk_norm_rope_attention, swiglu, group_norm_silu, flow_loss,
    )
}  # fmt: skip


# -- other libraries -------------------------------------------------------------------------------------------------
# Liger's backward may write over the cotangent that it is given (in_place); here the cotangents are shared, so it may not.


def _liger_rms_norm(inputs: Inputs) -> Callable[[], Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, weight, eps = inputs["x"], inputs["weight"], inputs.get("eps", 1e-6)
    return lambda: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def _liger_norm_modulate(inputs: Inputs) -> Callable[[], Any]:
    from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction

    if inputs.get("norm", "rms") != "rms":
        raise NotImplementedError("RMS only")
    x, scale, shift, weight, eps = inputs["x"], inputs["scale"], inputs.get("shift"), inputs.get("weight"), inputs.get("eps", 1e-6)
    out_dtype = inputs.get("out_dtype") or scale.dtype
    return lambda: LigerModulatedRMSNormFunction.apply(x, weight, scale, shift, eps, 0.0, "llama", False).to(out_dtype)


def _liger_gate_add_norm_modulate(inputs: Inputs) -> Callable[[], Any]:
    """PyTorch's gate and addition, then Liger's modulated norm: it has nothing that does both."""
    from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction

    if inputs.get("norm", "rms") != "rms":
        raise NotImplementedError("RMS only")
    residual, y, gate, scale = (inputs[name] for name in ("residual", "y", "gate", "scale"))
    shift, weight, eps = inputs.get("shift"), inputs.get("weight"), inputs.get("eps", 1e-6)

    def call():
        stream = residual + gate.unsqueeze(1) * y
        out = LigerModulatedRMSNormFunction.apply(stream, weight, scale, shift, eps, 0.0, "llama", False)
        return stream, out.to(inputs.get("out_dtype") or y.dtype)

    return call


def _liger_swiglu(inputs: Inputs) -> Callable[[], Any]:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return lambda: LigerFusedGateUpSiLUMulFunction.apply(inputs["x12"], False)


def _liger_group_norm_silu(inputs: Inputs) -> Callable[[], Any]:
    """Its GroupNorm on NCHW, then PyTorch's SiLU."""
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    x, groups, weight, bias, eps = inputs["x"], inputs["num_groups"], inputs["weight"], inputs["bias"], inputs.get("eps", 1e-6)
    return lambda: F.silu(LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], groups, eps))


def _torch_rms_norm(inputs: Inputs) -> Callable[[], Any]:
    x, weight = inputs["x"], inputs["weight"]
    weight = None if weight is None else weight.to(x.dtype)
    return lambda: F.rms_norm(x, x.shape[-1:], weight, inputs.get("eps", 1e-6))


def _quack_rms_norm(inputs: Inputs) -> Callable[[], Any]:
    from quack.rmsnorm import rmsnorm

    return lambda: rmsnorm(inputs["x"], inputs["weight"], eps=inputs.get("eps", 1e-6))


def _xformers_rms_norm(inputs: Inputs) -> Callable[[], Any]:
    from xformers.ops import rms_norm as xformers_rms_norm

    if torch.is_grad_enabled():
        raise NotImplementedError("forward only")
    return lambda: xformers_rms_norm(inputs["x"], inputs["weight"], inputs.get("eps", 1e-6))


def _require_nvidia_apex(extension: str) -> None:
    """NVIDIA's apex has compiled extensions beside it; the project of that name in the package index has none."""
    if importlib.util.find_spec("apex") is None or importlib.util.find_spec(extension) is None:
        raise ImportError(f"NVIDIA's apex with {extension} is not installed")


def _apex_rms_norm(inputs: Inputs) -> Callable[[], Any]:
    _require_nvidia_apex("fused_layer_norm_cuda")
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    x, weight = inputs["x"], inputs["weight"]
    if weight is None or weight.dtype != x.dtype:
        raise NotImplementedError("weight of x's dtype only")
    return lambda: fused_rms_norm_affine(x, weight, x.shape[-1:], inputs.get("eps", 1e-6))


def _apex_group_norm_silu(inputs: Inputs) -> Callable[[], Any]:
    _require_nvidia_apex("group_norm_cuda")
    from apex.contrib.group_norm.group_norm import cuda_group_norm_nhwc_one_pass, cuda_group_norm_nhwc_two_pass

    x, groups, weight, bias, eps = inputs["x"], inputs["num_groups"], inputs["weight"], inputs["bias"], inputs.get("eps", 1e-6)
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise NotImplementedError("channels_last only")
    run = cuda_group_norm_nhwc_one_pass if x.shape[2] * x.shape[3] <= 1024 else cuda_group_norm_nhwc_two_pass  # its module's own rule
    return lambda: run(x, groups, weight, bias, eps, "silu" if inputs.get("silu", True) else "")


def _attention_by(backend: str) -> Peer:
    """The plain prologue, compiled, and another package's attention."""

    def peer(inputs: Inputs) -> Callable[[], Any]:
        package = {"flash-attn": "flash_attn", "xformers": "xformers"}[backend]
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed")
        prologue = torch.compile(qk_norm_rope, dynamic=False, fullgraph=True)
        arguments = {name: value for name, value in inputs.items() if name != "scale"}
        return lambda: attention(*prologue(**arguments), scale=inputs.get("scale"), backend=backend).transpose(1, 2).flatten(2)

    return peer


_PEERS: Mapping[str, Mapping[str, Peer]] = {
    "rms_norm": {
        "torch": _torch_rms_norm, "liger": _liger_rms_norm, "quack": _quack_rms_norm, "apex": _apex_rms_norm, "xformers": _xformers_rms_norm,
    },
    "norm_modulate": {"liger": _liger_norm_modulate},
    "gate_add_norm_modulate": {"liger": _liger_gate_add_norm_modulate},
    "swiglu": {"liger": _liger_swiglu},
    "group_norm_silu": {"liger": _liger_group_norm_silu, "apex": _apex_group_norm_silu},
    "qk_norm_rope_attention": {"flash-attn": _attention_by("flash-attn"), "xformers": _attention_by("xformers")},
}  # fmt: skip


def peers(spec: Spec) -> dict[str, Peer]:
    """Other libraries' versions of an operator by library: those of this file and those that its spec names."""
    return {**_PEERS.get(formula(spec), {}), **spec.peers}


def formula(spec: Spec) -> str:
    """The name of the formula: two operators that compute the same share their reference, and what they are compared with."""
    return spec.reference.__name__.removesuffix("_reference")


def plain(spec: Spec) -> Callable[..., Any]:
    """What eager and compiled baselines run: the formula as a model writes it, else the reference."""
    return PLAIN.get(formula(spec), spec.reference)
