"""The forms of diffusers that `patch` knows: DiT's block, the adaLN norms, and the attention processor.

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


def _why_not_block(block: nn.Module) -> str | None:
    return why_not_modulated(block.norm3, "norm3")


def _is_another_block(block: nn.Module) -> str | None:
    """BasicTransformerBlock is several blocks in one class."""
    return None if block.norm_type == "ada_norm_zero" else f"its norm_type is {block.norm_type}, DiT's is ada_norm_zero"


def block_forward(
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
    h, gate1, shift2, scale2, gate2 = self.norm1(hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype)
    y = self.attn1(h, attention_mask=attention_mask)
    norm = self.norm3
    x, h = gate_add_norm_modulate(hidden_states, y, gate1, scale2, shift2, norm.weight, norm_name(norm), norm.eps)
    return x + gate2.unsqueeze(1) * self.ff(h)


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
    "BasicTransformerBlock": Form(
        "gate_add_norm_modulate",
        _why_not_block,
        block_forward,
        ("norm1", "attn1", "norm3", "ff"),
        inside=("norm3",),
        another=_is_another_block,
    ),
    "AdaLayerNormZero": _ada_norm(ada_norm_zero_forward, optional=("emb",)),
    "AdaLayerNormZeroSingle": _ada_norm(ada_norm_zero_single_forward),
    "AdaLayerNormContinuous": _ada_norm(ada_norm_continuous_forward),
    "SD35AdaLayerNormZeroX": always_left("norm_modulate", "it modulates one norm twice"),
    "DiTTransformer2DModel": always_left("norm_modulate", "its last norm and modulation are lines of its own forward"),
    "JointTransformerBlock": always_left("gate_add_norm_modulate", "it carries two streams, and may end without the second"),
    "FluxTransformerBlock": always_left("gate_add_norm_modulate", "it carries two streams and clips them in float16"),
    "FluxSingleTransformerBlock": always_left("gate_add_norm_modulate", "its gate comes after attention and feed-forward, no norm follows"),
    "FluxAttention": always_left("attention", "it joins two streams and rotates by a table of each call"),
    "SwiGLU": always_left("swiglu", "its gate is the second half of proj, swiglu's is the first"),
}
