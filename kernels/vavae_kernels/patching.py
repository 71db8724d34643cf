"""Fused operators in a model that knows nothing of them: `patch(model)` replaces forwards, instance by instance.

Classes, parameters and state-dict keys stay as they are; `undo()` restores every instance. What is recognised, by the
name of its class and then by every part that its forward uses (DiT, SiT, REPA, LightningDiT and timm share these forms):

    qk_norm_rope_attention     Attention: qkv, q_norm, k_norm, proj, with or without a 2-D rotary table
    swiglu                     SwiGLUFFN: packed w12, then w3
    gate_add_norm_modulate     DiTBlock, SiTBlock, LightningDiTBlock: adaLN with six chunks, or four without shift

A module of such a name that differs anywhere is left alone, and the report says why.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType

from torch import Tensor, nn

from .ops.gate_add_norm_modulate import gate_add_norm_modulate
from .ops.norm_modulate import norm_modulate
from .ops.qk_norm_rope_attention import qk_norm_rope_attention
from .ops.swiglu import swiglu


@dataclass
class Handle:
    """report: module path -> "fused: <operator>" or "left: <reason>". undo() gives every module its own forward back."""

    report: dict[str, str]
    _patched: list[nn.Module]

    def undo(self) -> None:
        """Restore all forwards; a second call does nothing."""
        while self._patched:
            del self._patched.pop().forward

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for line in self.report.values():
            counts[line] = counts.get(line, 0) + 1
        return "\n".join(f"{count} x {line}" for line, count in counts.items())


def patch(model: nn.Module, ops: Iterable[str] | None = None) -> Handle:
    """Let the modules of `model` that are recognised run the fused operators `ops` (default: all of `PATCHES`).

    Changes speed, never keys, and results only by rounding. Raises ValueError for an operator that cannot be patched in.
    """
    wanted = list(PATCHES) if ops is None else list(ops)
    for op in wanted:
        if op not in PATCHES:
            raise ValueError(f"patch: unknown operator {op!r}; known: {', '.join(PATCHES)}")
    handle = Handle({}, [])
    for path, module in model.named_modules():
        for op in wanted:
            class_names, why_not, forward = PATCHES[op]
            if type(module).__name__ not in class_names:
                continue
            reason = "it already has a forward of its own" if "forward" in vars(module) else why_not(module)
            handle.report[path] = f"left: {type(module).__name__}, {reason}" if reason else f"fused: {op}"
            if not reason:
                module.forward = MethodType(forward, module)
                handle._patched.append(module)
    if not handle.report:
        handle.report[""] = f"left: {type(model).__name__}, no module in it is of a form known here"
    return handle


def _norm_kind(module: nn.Module) -> str | None:
    """The operator's `norm` for a module: "rms" or "layer", None if it is neither."""
    if type(module).__name__ == "RMSNorm" and isinstance(getattr(module, "eps", None), float):
        return "rms"
    return "layer" if isinstance(module, nn.LayerNorm) else None


def _lacking(module: nn.Module, children: Iterable[str]) -> str | None:
    """A reason if `module` lacks one of `children`, or has others that do something."""
    own = dict(module.named_children())
    for name in children:
        if name not in own:
            return f"it has no {name}"
    for name in own.keys() - set(children):
        idle = isinstance(own[name], nn.Identity) or (isinstance(own[name], nn.Dropout) and own[name].p == 0)
        if not idle:
            return f"its {name} ({type(own[name]).__name__}) is not part of the fused form"
    return None


def _why_not_swiglu(mlp: nn.Module) -> str | None:
    reason = _lacking(mlp, ("w12", "w3"))
    if reason is None and mlp.w12.out_features != 2 * mlp.w3.in_features:
        reason = "w12 does not give twice what w3 takes"
    return reason


def _swiglu_forward(self: nn.Module, x: Tensor) -> Tensor:
    return self.w3(swiglu(self.w12(x)))


def _why_not_attention(attention: nn.Module) -> str | None:
    reason = _lacking(attention, ("qkv", "q_norm", "k_norm", "proj"))
    if reason is not None:
        return reason
    kinds = {None if isinstance(m, nn.Identity) else _norm_kind(m) or "unknown" for m in (attention.q_norm, attention.k_norm)}
    if "unknown" in kinds or len(kinds) > 1:
        return f"its q_norm is a {type(attention.q_norm).__name__}, its k_norm a {type(attention.k_norm).__name__}"
    if kinds != {None} and attention.q_norm.eps != attention.k_norm.eps:
        return f"its q_norm has eps {attention.q_norm.eps:g}, its k_norm {attention.k_norm.eps:g}"
    if attention.qkv.out_features % (3 * attention.num_heads):
        return "qkv does not split into three equal sets of heads"
    return _why_not_scale(attention)


def _why_not_scale(attention: nn.Module) -> str | None:
    """Where timm's `fused_attn` is true, PyTorch scales by head_dim ** -0.5; else the module's own `scale` does."""
    if getattr(attention, "fused_attn", False) or not hasattr(attention, "scale"):
        return None
    usual = (attention.qkv.out_features // (3 * attention.num_heads)) ** -0.5
    if isinstance(attention.scale, float) and math.isclose(attention.scale, usual, rel_tol=1e-6):
        return None
    return f"its scale is {attention.scale}, not head_dim ** -0.5 = {usual:g}"


def _attention_forward(
    self: nn.Module, x: Tensor, rope: nn.Module | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """x (B, N, D) -> (B, N, D). `rope` as LightningDiT passes it: a module that holds freqs_cos and freqs_sin.

    The operator has no mask: with one, timm's `attn_mask` or `is_causal`, the module's own forward runs.
    """
    if attn_mask is not None or is_causal:
        given = dict(rope=rope, attn_mask=attn_mask, is_causal=is_causal or None)
        return type(self).forward(self, x, **{name: value for name, value in given.items() if value is not None})
    cos, sin = (None, None) if rope is None else (rope.freqs_cos, rope.freqs_sin)
    qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
    q, k = self.q_norm, self.k_norm
    norm = _norm_kind(q)
    if norm is None:
        return self.proj(qk_norm_rope_attention(qkv, cos, sin))
    bias = (q.bias, k.bias) if norm == "layer" else (None, None)
    return self.proj(qk_norm_rope_attention(qkv, cos, sin, q.weight, k.weight, *bias, norm=norm, eps=q.eps))


def _why_not_block(block: nn.Module) -> str | None:
    if type(block).__name__ == "FusedLightningDiTBlock":
        return "it is fused already"
    reason = _lacking(block, ("norm1", "attn", "norm2", "mlp", "adaLN_modulation"))
    if reason is not None:
        return reason
    if None in (_norm_kind(block.norm1), _norm_kind(block.norm2)):
        return f"its norm is a {type(block.norm1).__name__}"
    if any(getattr(norm, "bias", None) is not None for norm in (block.norm1, block.norm2)):
        return "its norm has a bias"
    last = block.adaLN_modulation[-1]
    chunks = last.out_features / last.in_features
    if chunks not in (4, 6) or (chunks == 4 and type(block).__name__ != "LightningDiTBlock"):
        return f"its modulation has {chunks:g} chunks"
    return None


def _block_forward(self: nn.Module, x: Tensor, c: Tensor, feat_rope: nn.Module | None = None) -> Tensor:
    """x (B, N, D), c (B, D) -> (B, N, D)."""
    modulation, width = self.adaLN_modulation(c), self.adaLN_modulation[-1].in_features
    chunks = modulation.split(width, dim=1)
    if len(chunks) == 6:
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks
    else:
        (scale1, gate1, scale2, gate2), shift1, shift2 = chunks, None, None
    one, two = self.norm1, self.norm2
    h = norm_modulate(x, scale1, shift1, one.weight, _norm_kind(one), one.eps)
    y = self.attn(h) if feat_rope is None else self.attn(h, rope=feat_rope)
    x, h = gate_add_norm_modulate(x, y, gate1, scale2, shift2, two.weight, _norm_kind(two), two.eps)
    return x + gate2.unsqueeze(1) * self.mlp(h)


PATCHES: dict[str, tuple[tuple[str, ...], Callable[[nn.Module], str | None], Callable]] = {
    "qk_norm_rope_attention": (("Attention",), _why_not_attention, _attention_forward),
    "swiglu": (("SwiGLUFFN",), _why_not_swiglu, _swiglu_forward),
    "gate_add_norm_modulate": (
        ("DiTBlock", "SiTBlock", "LightningDiTBlock", "FusedLightningDiTBlock"),
        _why_not_block,
        _block_forward,
    ),
}
