"""The forms that `patch` knows: modules of DiT, SiT, REPA, LightningDiT and timm, and the forward each gets instead.

A form names the classes, says why a module of that name is not of the form after all, and gives the new forward, whose
first argument is the module: a `Binding` sets it, so a patched model can be copied, pickled and compiled.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .ops.gate_add_norm_modulate import gate_add_norm_modulate
from .ops.norm_modulate import norm_modulate
from .ops.qk_norm_rope_attention import qk_norm_rope_attention
from .ops.rms_norm import rms_norm, rms_norm_reference
from .ops.swiglu import swiglu

LAYER_NORMS = ("LayerNorm", "FP32LayerNorm", "LayerNormFp32")  # subclasses of nn.LayerNorm that compute the same
RMS_NORMS = ("RMSNorm", "RmsNorm", "RmsNormFp32")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ALREADY = "it is patched already"


def no_reason(module: nn.Module) -> None:
    return None


class Binding:
    """`function(module, …, **keywords)`, whose bound `call` becomes the module's forward.

    torch.compile compiles a forward that is a bound method once for all blocks of a model; a `functools.partial` it compiles
    for each block again, and refuses the ninth. A method bound to the module itself would not be pickled.
    """

    def __init__(self, module: nn.Module, function: Callable, keywords: dict[str, Any]):
        self.module, self.function, self.keywords = module, function, keywords

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs, **self.keywords)


def bound_function(forward: Any) -> Callable | None:
    """The function that a `Binding` has made of `forward`; None if it is somebody else's."""
    owner = getattr(forward, "__self__", None)
    return owner.function if isinstance(owner, Binding) else None


@dataclass(frozen=True)
class Form:
    """One form of module and the operator that it is given."""

    op: str
    why_not: Callable[[nn.Module], str | None]  # a reason to leave the module, once it has the children
    forward: Callable | None  # forward(module, …), the class of a processor, or None: always left
    children: tuple[str, ...] = ()  # that the module has; others are `optional` or idle
    optional: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()  # children whose own forward is not called any more
    parameters: tuple[str, ...] = ()  # that the module may have itself, not in its children
    attribute: str = "forward"
    takes_backend: bool = False
    another: Callable[[nn.Module], str | None] = no_reason  # a reason that is asked for first

    def why_left(self, module: nn.Module) -> str | None:
        """None if `module` is of this form in every part."""
        if self.attribute == "forward" and "forward" in vars(module):
            ours = self.forward is not None and bound_function(module.forward) is self.forward
            return ALREADY if ours else "it already has a forward of its own"
        if self.forward is None:
            return self.why_not(module)
        asked = (self.another, self._lacking, self._hooked, self._called_otherwise, self.why_not)
        return next((reason for reason in (ask(module) for ask in asked) if reason is not None), None)

    def replacement(self, module: nn.Module, backend: str) -> Any:
        """What `attribute` is set to."""
        if self.attribute != "forward":
            return self.forward(getattr(module, self.attribute), backend)
        return Binding(module, self.forward, {"backend": backend} if self.takes_backend else {}).call

    def _lacking(self, module: nn.Module) -> str | None:
        own = dict(module.named_children())
        for name in self.children:
            if name not in own:
                return f"it has no {name}"
        for name, child in own.items():
            if name in (*self.children, *self.optional) or isinstance(child, nn.Identity):
                continue
            if not isinstance(child, nn.Dropout):
                return f"its {name} ({type(child).__name__}) is not part of the fused form"
            if child.p > 0:
                return f"its {name} drops out with p = {child.p:g}, which the operator does not"
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name not in self.parameters:
                return f"its {name} is not part of the fused form"
        return None

    def _hooked(self, module: nn.Module) -> str | None:
        """The operator computes what these children compute, without calling them."""
        for name in self.inside:
            child = getattr(module, name)
            if child is None:
                continue
            if "forward" in vars(child) or any(getattr(child, hooks) for hooks in HOOKS):
                return f"its {name} has a hook or a forward of its own, which would not be called"
        return None

    def _called_otherwise(self, module: nn.Module) -> str | None:
        if self.attribute != "forward":
            return None
        takes = [p for name, p in inspect.signature(type(module).forward).parameters.items() if name != "self"]
        known = inspect.signature(self.forward).parameters
        if len(takes) == 1 and takes[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            return None  # whatever its one argument is called
        return None if all(p.name in known for p in takes) else f"its forward takes ({', '.join(map(str, takes))})"


def always_left(op: str, reason: str) -> Form:
    return Form(op, lambda module: reason, None)


# Norms inside of the forms


def norm_kind(norm: nn.Module) -> str | None:
    """The operators' `norm` for a module: "rms" or "layer" over its last axis, None if it is neither."""
    name = type(norm).__name__
    if name in LAYER_NORMS and isinstance(norm, nn.LayerNorm):
        return "layer" if len(norm.normalized_shape) == 1 else None
    return "rms" if name in RMS_NORMS and why_not_rms_norm(norm) is None else None


def norm_width(norm: nn.Module) -> int | None:
    """D of a norm over one axis."""
    weight = getattr(norm, "weight", None)
    shape = getattr(norm, "normalized_shape", ()) if weight is None else weight.shape
    return shape[0] if len(shape) == 1 else None


def why_not_modulated(norm: nn.Module, name: str) -> str | None:
    """The adaLN operators take a norm of either kind, with or without weight, without bias."""
    if norm_kind(norm) is None:
        return f"its {name} ({type(norm).__name__}) is no LayerNorm or RMSNorm over one axis"
    return f"its {name} has a bias" if getattr(norm, "bias", None) is not None else None


def why_not_rms_norm(norm: nn.Module) -> str | None:
    """Many formulas go by this name, so the module's own forward is asked: on one row it must give the operator's result."""
    if not isinstance(getattr(norm, "eps", None), float):
        return f"its eps is {getattr(norm, 'eps', None)}"
    if getattr(norm, "bias", None) is not None:
        return "it has a bias"
    weight, width = getattr(norm, "weight", None), norm_width(norm)
    if width is None:
        return "it does not normalise one axis"
    needed = [p for p in inspect.signature(type(norm).forward).parameters.values() if p.default is p.empty]
    if len(needed) != 2:
        return f"its forward takes ({', '.join(map(str, needed[1:]))})"
    if weight is not None and (weight.is_meta or type(weight.data).__name__ == "DTensor"):
        return "its weight is not here; patch after loading and before sharding"
    row = torch.linspace(-1, 2, width) if weight is None else torch.linspace(-1, 2, width, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        own, ours = type(norm).forward(norm, row), rms_norm_reference(row, weight, norm.eps)
        rounding = 8 * max(torch.finfo(dtype).eps for dtype in (row.dtype, torch.float32)) * ours.abs().max()
        same = own.shape == ours.shape and bool((own - ours).abs().max() <= rounding)
    return None if same else "its forward computes something else"


def rms_norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    """x (..., D) -> (..., D). With a weight of another dtype, code bases differ in what they return: the module's own then."""
    weight = self.weight
    if weight is not None and weight.dtype != x.dtype:
        return type(self).forward(self, x)
    return rms_norm(x, weight, self.eps)


# Feed-forwards


def _packed_twice(first: nn.Module, last: nn.Module) -> bool:
    return getattr(first, "out_features", 0) == 2 * getattr(last, "in_features", -1)


def _why_not_swiglu(mlp: nn.Module) -> str | None:
    return None if _packed_twice(mlp.w12, mlp.w3) else "w12 does not give twice what w3 takes"


def swiglu_forward(self: nn.Module, x: Tensor) -> Tensor:
    return self.w3(swiglu(self.w12(x)))


def _why_not_glu_mlp(mlp: nn.Module) -> str | None:
    if not isinstance(mlp.act, nn.SiLU):
        return f"its act is a {type(mlp.act).__name__}, swiglu's is SiLU"
    if mlp.gate_last:
        return "its gate is the second half of fc1, swiglu's is the first"
    return None if mlp.chunk_dim == -1 and _packed_twice(mlp.fc1, mlp.fc2) else "fc1 does not give twice what fc2 takes"


def glu_mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    return self.fc2(swiglu(self.fc1(x)))


# Attention from packed qkv


def _why_not_attention(attn: nn.Module) -> str | None:
    kinds = {None if isinstance(m, nn.Identity) else norm_kind(m) or "unknown" for m in (attn.q_norm, attn.k_norm)}
    if "unknown" in kinds or len(kinds) > 1:
        return f"its q_norm is a {type(attn.q_norm).__name__}, its k_norm a {type(attn.k_norm).__name__}"
    if kinds != {None} and attn.q_norm.eps != attn.k_norm.eps:
        return f"its q_norm has eps {attn.q_norm.eps:g}, its k_norm {attn.k_norm.eps:g}"
    features, heads = getattr(attn.qkv, "out_features", 0), getattr(attn, "num_heads", 0)
    if not features or not heads or features % (3 * heads):
        return "qkv does not split into three equal sets of heads"
    head_dim = features // (3 * heads)
    if kinds != {None} and (norm_width(attn.q_norm), norm_width(attn.k_norm)) != (head_dim, head_dim):
        return f"its q_norm does not normalise a head of {head_dim}"
    return _why_not_scale(attn, head_dim)


def _why_not_scale(attn: nn.Module, head_dim: int) -> str | None:
    """Where timm's `fused_attn` is true, PyTorch scales by head_dim ** -0.5; else the module's own `scale` does."""
    if getattr(attn, "fused_attn", False) or not hasattr(attn, "scale"):
        return None
    if isinstance(attn.scale, float) and math.isclose(attn.scale, head_dim**-0.5, rel_tol=1e-6):
        return None
    return f"its scale is {attn.scale}, not head_dim ** -0.5 = {head_dim**-0.5:g}"


def attention_forward(
    self: nn.Module,
    x: Tensor,
    rope: nn.Module | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    backend: str,
) -> Tensor:
    """x (B, N, D) -> (B, N, D). `rope` as LightningDiT passes it: a module that holds freqs_cos and freqs_sin.

    The operator has no mask and no other table: with timm's `attn_mask` or `is_causal`, the module's own forward runs.
    """
    if attn_mask is not None or is_causal or not (rope is None or hasattr(rope, "freqs_cos")):
        given = dict(rope=rope, attn_mask=attn_mask, is_causal=is_causal or None)
        return type(self).forward(self, x, **{name: value for name, value in given.items() if value is not None})
    cos, sin = (None, None) if rope is None else (rope.freqs_cos, rope.freqs_sin)
    qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
    q, k, norm = self.q_norm, self.k_norm, norm_name(self.q_norm)
    weights = () if norm is None else (q.weight, k.weight, *((q.bias, k.bias) if norm == "layer" else (None, None)))
    kind = {} if norm is None else dict(norm=norm, eps=q.eps)
    return self.proj(qk_norm_rope_attention(qkv, cos, sin, *weights, **kind, backend=backend))


def norm_name(norm: nn.Module) -> str | None:
    """`norm_kind` of a module that has passed it: by its class alone, in every forward."""
    if isinstance(norm, nn.Identity):
        return None
    return "layer" if isinstance(norm, nn.LayerNorm) else "rms"


# adaLN


def _modulation_chunks(adaln: nn.Module, width: int | None) -> float:
    """How many (B, D) the modulation gives: the last layer of a Sequential."""
    last = adaln[-1] if isinstance(adaln, nn.Sequential) and len(adaln) else None
    return getattr(last, "out_features", 0) / width if width else 0


def _why_not_block(block: nn.Module) -> str | None:
    reason = why_not_modulated(block.norm1, "norm1") or why_not_modulated(block.norm2, "norm2")
    if reason is not None:
        return reason
    chunks = _modulation_chunks(block.adaLN_modulation, norm_width(block.norm1))
    if chunks not in (4, 6) or (chunks == 4 and type(block).__name__ != "LightningDiTBlock"):
        return f"its modulation has {chunks:g} chunks"
    if getattr(block, "use_checkpoint", False):
        return "its own forward recomputes activations; build the model with fused=True"
    return None


def block_forward(self: nn.Module, x: Tensor, c: Tensor, feat_rope: nn.Module | None = None) -> Tensor:
    """x (B, N, D), c (B, D) -> (B, N, D)."""
    chunks = self.adaLN_modulation(c).split(x.shape[-1], dim=-1)
    if len(chunks) == 6:
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks
    else:
        (scale1, gate1, scale2, gate2), shift1, shift2 = chunks, None, None
    one, two = self.norm1, self.norm2
    h = norm_modulate(x, scale1, shift1, one.weight, norm_name(one), one.eps)
    y = self.attn(h) if feat_rope is None else self.attn(h, rope=feat_rope)
    x, h = gate_add_norm_modulate(x, y, gate1, scale2, shift2, two.weight, norm_name(two), two.eps)
    return x + gate2.unsqueeze(1) * self.mlp(h)


def _why_not_final_layer(layer: nn.Module) -> str | None:
    chunks = _modulation_chunks(layer.adaLN_modulation, norm_width(layer.norm_final))
    return why_not_modulated(layer.norm_final, "norm_final") or (None if chunks == 2 else f"its modulation has {chunks:g} chunks")


def final_layer_forward(self: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """x (B, N, D), c (B, D) -> (B, N, p · p · C)."""
    shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
    norm = self.norm_final
    return self.linear(norm_modulate(x, scale, shift, norm.weight, norm_name(norm), norm.eps))


_BLOCK = Form(
    "gate_add_norm_modulate",
    _why_not_block,
    block_forward,
    ("norm1", "attn", "norm2", "mlp", "adaLN_modulation"),
    inside=("norm1", "norm2"),
)
_SWIGLU = Form("swiglu", _why_not_swiglu, swiglu_forward, ("w12", "w3"))
_RMS_NORM = Form("rms_norm", why_not_rms_norm, rms_norm_forward, parameters=("weight",))

FORMS: dict[str, Form] = {  # class name -> form
    "Attention": Form(
        "qk_norm_rope_attention",
        _why_not_attention,
        attention_forward,
        ("qkv", "q_norm", "k_norm", "proj"),
        inside=("q_norm", "k_norm"),
        takes_backend=True,
    ),
    "AttentionRope": always_left("qk_norm_rope_attention", "its rotary table comes with each call, and not for every token"),
    "SwiGLUFFN": _SWIGLU,
    "SwiGLUFFNFused": _SWIGLU,
    "GluMlp": Form("swiglu", _why_not_glu_mlp, glu_mlp_forward, ("fc1", "act", "fc2"), inside=("act",)),
    "SwiGLU": always_left("swiglu", "gate and value come from two projections, not from one"),
    "DiTBlock": _BLOCK,
    "SiTBlock": _BLOCK,
    "LightningDiTBlock": _BLOCK,
    "FusedLightningDiTBlock": always_left("gate_add_norm_modulate", "it is fused already"),
    "FinalLayer": Form(
        "norm_modulate",
        _why_not_final_layer,
        final_layer_forward,
        ("norm_final", "linear", "adaLN_modulation"),
        inside=("norm_final",),
    ),
    "FusedFinalLayer": always_left("norm_modulate", "it is fused already"),
    **dict.fromkeys(RMS_NORMS, _RMS_NORM),
}
