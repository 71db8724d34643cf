"""The forms of diffusers that `patch` knows: the blocks of DiT, PixArt and SD3, the adaLN norms, and the attention processor.

diffusers computes attention through processors, so `patch` sets one; `own` is the processor that was there. Its block
and its norms get a new forward, as in `patching_forms.py`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .attention_backends import attention
from .ops.gate_add_norm_modulate import gate_add_norm_modulate
from .ops.norm_modulate import norm_modulate
from .patching_forms import ALREADY, Form, always_left, norm_name, why_not_modulated

PLAIN_PROCESSORS = ("AttnProcessor2_0", "FusedAttnProcessor2_0")  # scaled_dot_product_attention, nothing else


class BackendProcessor:
    """Self-attention of diffusers' `Attention` by a backend of `attention_backends`; `own` keeps masks and the rest."""

    def __init__(self, own: Any, backend: str):
        self.own, self.backend = own, backend

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (B, N, D) -> (B, N, D). Cross-attention, a mask or an image (B, C, H, W) go to `own`."""
        if encoder_hidden_states is not None or attention_mask is not None or hidden_states.ndim != 3:
            return self.own(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if attn.fused_projections:
            projected = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            projected = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)  # (B, H, N, Dh), views
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        out = attention(q.to(v.dtype), k.to(v.dtype), v, backend=self.backend)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


def _is_another_attention(attn: nn.Module) -> str | None:
    processor = type(attn.processor).__name__
    if processor == "BackendProcessor":
        return ALREADY
    if processor not in PLAIN_PROCESSORS:
        return f"its processor is {processor}, not {PLAIN_PROCESSORS[0]}"
    return "it is a cross-attention" if attn.is_cross_attention or attn.only_cross_attention else None


def _why_not_attention(attn: nn.Module) -> str | None:
    if attn.residual_connection or attn.rescale_output_factor != 1:
        return "it adds its input to its output, or divides the output"
    return None if attn.inner_kv_dim == attn.inner_dim else "its keys and values have fewer heads than its queries"


# Blocks


def _second_half(x: Tensor, y: Tensor, gate1: Tensor, shift: Tensor, scale: Tensor, gate2: Tensor, norm: nn.Module, ff: nn.Module) -> Tensor:
    """All that follows the attention y (B, N, D) on the stream x (B, N, D); gates, shift and scale (B, D)."""
    x, h = gate_add_norm_modulate(x, y, gate1, scale, shift, norm.weight, norm_name(norm), norm.eps)
    return x + gate2.unsqueeze(1) * ff(h)


def _is_another_block(block: nn.Module) -> str | None:
    """BasicTransformerBlock is several blocks in one class."""
    if block.norm_type not in NORM_TYPES:
        return f"its norm_type is {block.norm_type}; {' and '.join(NORM_TYPES)} are known"
    return "its first attention is a cross-attention" if block.only_cross_attention else None


def _why_not_dit_block(block: nn.Module) -> str | None:
    return why_not_modulated(block.norm3, "norm3")


def dit_block_forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """hidden_states (B, N, D), timestep, class_labels (B,) -> (B, N, D). A feed-forward in chunks keeps the own forward."""
    if cross_attention_kwargs or self._chunk_size is not None:
        return type(self).forward(
            self,
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            cross_attention_kwargs,
            class_labels,
            added_cond_kwargs,
        )
    h, *modulation = self.norm1(hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype)
    return _second_half(hidden_states, self.attn1(h, attention_mask=attention_mask), *modulation, self.norm3, self.ff)


def _why_not_pixart_block(block: nn.Module) -> str | None:
    return why_not_modulated(block.norm1, "norm1") or why_not_modulated(block.norm2, "norm2")


def pixart_block_forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """hidden_states (B, N, D), timestep (B, 6 D): adaLN-single -> (B, N, D). Between its two norms stands a cross-attention."""
    if cross_attention_kwargs or self._chunk_size is not None or hidden_states.ndim != 3:
        return type(self).forward(
            self,
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            cross_attention_kwargs,
            class_labels,
            added_cond_kwargs,
        )
    x, one, two = hidden_states, self.norm1, self.norm2
    modulation = self.scale_shift_table + timestep.reshape(x.shape[0], 6, -1)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)
    h = norm_modulate(x, scale1, shift1, one.weight, norm_name(one), one.eps)
    y = self.attn1(h, attention_mask=attention_mask)
    if self.attn2 is None:
        return _second_half(x, y, gate1, shift2, scale2, gate2, two, self.ff)
    x = x + gate1.unsqueeze(1) * y
    x = x + self.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
    return x + gate2.unsqueeze(1) * self.ff(norm_modulate(x, scale2, shift2, two.weight, norm_name(two), two.eps))


def _why_not_joint_block(block: nn.Module) -> str | None:
    norms = {name: getattr(block, name) for name in ("norm2", "norm2_context")}
    return next((reason for name, norm in norms.items() if norm is not None and (reason := why_not_modulated(norm, name))), None)


def joint_block_forward(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """hidden_states (B, N, D), encoder_hidden_states (B, M, D), temb (B, D) -> both streams, the second one first."""
    if joint_attention_kwargs or self._chunk_size is not None:
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    h, gate1, shift2, scale2, gate2, *twice = self.norm1(hidden_states, emb=temb)
    if self.context_pre_only:
        h_others, others_modulation = self.norm1_context(encoder_hidden_states, temb), None
    else:
        h_others, *others_modulation = self.norm1_context(encoder_hidden_states, emb=temb)
    y, y_others = self.attn(hidden_states=h, encoder_hidden_states=h_others)
    x = hidden_states
    if twice:  # SD3.5: the stream attends to itself as well
        x = x + gate1.unsqueeze(1) * y
        y, gate1 = self.attn2(hidden_states=twice[0]), twice[1]
    x = _second_half(x, y, gate1, shift2, scale2, gate2, self.norm2, self.ff)
    if others_modulation is None:
        return None, x
    return _second_half(encoder_hidden_states, y_others, *others_modulation, self.norm2_context, self.ff_context), x


# Norms


def _why_not_ada_norm(norm: nn.Module) -> str | None:
    return why_not_modulated(norm.norm, "norm")


def ada_norm_zero_forward(
    self: nn.Module,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: Any = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (B, N, D), emb (B, D) or timestep, class_labels (B,) -> modulated x, then gate, shift, scale, gate (B, D)."""
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift1, scale1, gate1, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(6, dim=1)
    norm = self.norm
    return norm_modulate(x, scale1, shift1, norm.weight, norm_name(norm), norm.eps), gate1, shift2, scale2, gate2


def ada_norm_zero_single_forward(self: nn.Module, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (B, N, D), emb (B, D) -> modulated x, gate (B, D)."""
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    norm = self.norm
    return norm_modulate(x, scale, shift, norm.weight, norm_name(norm), norm.eps), gate


def ada_norm_continuous_forward(self: nn.Module, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """x (B, N, D), conditioning_embedding (B, C) -> modulated x."""
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    norm = self.norm
    return norm_modulate(x, scale, shift, norm.weight, norm_name(norm), norm.eps)


def _ada_norm(forward: Callable, optional: tuple[str, ...] = ()) -> Form:
    return Form("norm_modulate", _why_not_ada_norm, forward, ("silu", "linear", "norm"), optional, inside=("norm",))


NORM_TYPES: dict[str, Form] = {  # of BasicTransformerBlock -> form
    "ada_norm_zero": Form(
        "gate_add_norm_modulate",
        _why_not_dit_block,
        dit_block_forward,
        ("norm1", "attn1", "norm3", "ff"),
        inside=("norm3",),
        another=_is_another_block,
    ),
    "ada_norm_single": Form(
        "norm_modulate",
        _why_not_pixart_block,
        pixart_block_forward,
        ("norm1", "attn1", "norm2", "ff"),
        ("attn2",),
        inside=("norm1", "norm2"),
        parameters=("scale_shift_table",),
        another=_is_another_block,
    ),
}


def diffusers_form(module: nn.Module) -> Form | None:
    """The form of a module of diffusers, by the name of its class."""
    name = type(module).__name__
    if name == "BasicTransformerBlock":
        return NORM_TYPES.get(module.norm_type, NORM_TYPES["ada_norm_zero"])
    return DIFFUSERS_FORMS.get(name)


DIFFUSERS_FORMS: dict[str, Form] = {  # class name -> form
    "Attention": Form(
        "attention",
        _why_not_attention,
        BackendProcessor,
        ("to_q", "to_k", "to_v", "to_out"),
        ("to_qkv", "norm_q", "norm_k"),
        attribute="processor",
        another=_is_another_attention,
    ),
    "JointTransformerBlock": Form(
        "gate_add_norm_modulate",
        _why_not_joint_block,
        joint_block_forward,
        ("norm1", "norm1_context", "attn", "norm2", "ff"),
        ("attn2", "norm2_context", "ff_context"),
        inside=("norm2", "norm2_context"),
    ),
    "AdaLayerNormZero": _ada_norm(ada_norm_zero_forward, optional=("emb",)),
    "AdaLayerNormZeroSingle": _ada_norm(ada_norm_zero_single_forward),
    "AdaLayerNormContinuous": _ada_norm(ada_norm_continuous_forward),
    "SD35AdaLayerNormZeroX": always_left("norm_modulate", "it modulates one norm twice"),
    "DiTTransformer2DModel": always_left("norm_modulate", "its last norm and modulation are lines of its own forward"),
    "FluxTransformerBlock": always_left("gate_add_norm_modulate", "it carries two streams and clips them in float16"),
    "FluxSingleTransformerBlock": always_left("gate_add_norm_modulate", "its gate comes after attention and feed-forward, no norm follows"),
    "FluxAttention": always_left("attention", "it joins two streams and rotates by a table of each call"),
    "SwiGLU": always_left("swiglu", "its gate is the second half of proj, swiglu's is the first"),
}
