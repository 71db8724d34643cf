"""Fused operators for diffusion transformers and their tokenizers. Needs torch; Triton is imported lazily.

Every operator lives in `ops/<op>.py`: the formula, a reference in plain PyTorch that defines it, and a public function
that takes `impl="auto" | "triton" | "torch"`. Names load their file when they are first used (PEP 562); importing the package does
nothing but refuse a torch that is too old.
"""

from importlib import import_module

from ._versions import require_torch

require_torch()

_WHERE = {
    "rms_norm": "ops.rms_norm",
    "norm_modulate": "ops.norm_modulate",
    "gate_add_norm_modulate": "ops.gate_add_norm_modulate",
    "qk_norm_rope": "ops.qk_norm_rope",
    "qk_norm_rope_attention": "ops.qk_norm_rope_attention",
    "swiglu": "ops.swiglu",
    "group_norm_silu": "ops.group_norm_silu",
    "flow_interpolate": "ops.flow_interpolate",
    "flow_loss": "ops.flow_loss",
    "vf_loss": "ops.vf_loss",
    "AdamWEMA": "ops.adamw_ema",
    "attention": "attention_backends",
    "register_backend": "attention_backends",
    "backend_table": "attention_backends",
    "patch": "patching",
}
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
