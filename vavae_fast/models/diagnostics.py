"""What goes wrong in a layer before the loss shows it: attention logits and the residual stream, block by block.

Logits that grow without bound are how bf16 training of large transformers diverges (Dehghani et al. 2023, ViT-22B, section 3.1);
QK-norm is the cure, and `with_qk_norm` brings it to weights that were trained without.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vavae_fast.models.compilation import as_it_is
from vavae_fast.models.lightningdit import LightningDiT, LightningDiTBlock
from vavae_fast.models.lightningdit_layers import modulate


@torch.no_grad()
def layer_statistics(model: LightningDiT, x: Tensor, t: Tensor, y: Tensor) -> dict[str, Tensor]:
    """`attention_logit`: the largest |q · k| / sqrt(Dh); `residual_rms`: of the stream that enters. Each (depth,) fp32, on the device.

    x (N, C, H, W), t (N,), y (N,) as the model takes them, a handful. One forward pass, in whatever mode and precision it runs;
    all processes of a sharded model must call. Logits are computed here again, in the precision of autocast, N · H · T² at a time.
    """
    found: dict[str, list[Tensor]] = {"attention_logit": [], "residual_rms": []}

    def look(block: LightningDiTBlock, inputs: tuple) -> None:
        stream, c, rope = _stream(inputs)
        shift, scale = block.modulation(c)[:2]
        q, k, _ = block.attn.heads(modulate(block.norm1(stream), shift, scale), rope)
        logits = q.float() @ k.float().mT / q.shape[-1] ** 0.5
        found["attention_logit"].append(logits.abs().amax())
        found["residual_rms"].append(stream.float().square().mean().sqrt())

    hooks = [block.register_forward_pre_hook(look) for block in model.blocks]
    try:
        with as_it_is(model):
            model(x, t, y)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.stack(values) for name, values in found.items()}


def _stream(inputs: tuple) -> tuple[Tensor, Tensor, torch.nn.Module | None]:
    """The residual stream, the condition and the rotation among a block's inputs; a fused block's stream waits for a gate."""
    if len(inputs) == 3:
        return inputs
    residual, y, gate, c, rope = inputs
    return (residual if y is None else residual + gate.unsqueeze(1) * y), c, rope


def with_qk_norm(state: Mapping[str, Tensor], model: LightningDiT) -> tuple[dict[str, Tensor], int]:
    """Weights for a `model` with QK-norm from a `state` trained without, and in how many layers norms were added.

    A norm's weight becomes the size that its layer's queries (keys) have on average, so that logits keep their scale and the model
    most of what it learned: for inputs of unit variance, the root of the mean of ‖w‖² + b² over the rows of q (k). A state that
    has the norms, or a model that has none, is left alone.
    """
    filled, layers = dict(state), 0
    for i, block in enumerate(model.blocks):
        prefix = f"blocks.{i}.attn."
        wanted = [name for name in block.attn.state_dict() if name.startswith(("q_norm.", "k_norm."))]
        if not wanted or any(prefix + name in state for name in wanted) or f"{prefix}qkv.weight" not in state:
            continue
        weight, bias = (state[f"{prefix}qkv.{part}"].float() for part in ("weight", "bias"))
        sizes = (weight.square().sum(1) + bias.square()).unflatten(0, (3, -1)).mean(1).sqrt()  # of q, k, v
        for name in wanted:
            size = sizes[0 if name.startswith("q_norm.") else 1] if name.endswith("weight") else torch.zeros(())
            filled[prefix + name] = size.expand(block.attn.head_dim).clone()
        layers += 1
    return filled, layers
