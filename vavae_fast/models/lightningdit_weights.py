"""What the shapes of a LightningDiT's weights say of its architecture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vavae_fast.errors import BadInput
from vavae_fast.models.lightningdit import LIGHTNINGDIT_SIZES


def lightningdit_architecture(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Any]:
    """Arguments of `create_lightningdit` that give tensors of these shapes; the last row of the label embedding is the null class.

    The number of heads is read off the tables of the rotary embedding, and of a published size known without. `source` names the
    file in errors.
    """
    try:
        hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        tokens, labels = state["pos_embed"].shape[1], state["y_embedder.embedding_table.weight"].shape[0]
        outputs = state["final_layer.linear.weight"].shape[0]
        modulations = state["blocks.0.adaLN_modulation.1.weight"].shape[0]
        use_rope = "feat_rope.freqs_cos" in state
        heads = hidden_size // state["feat_rope.freqs_cos"].shape[-1] if use_rope else None
        if depth > len(state) or min(hidden_size, in_channels, patch_size, tokens, labels) < 1:
            raise ValueError(f"{depth} blocks of {hidden_size} channels")
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise BadInput(f"{source}: not the weights of a LightningDiT (at {error})") from None
    size = dict(depth=depth, hidden_size=hidden_size, patch_size=patch_size)
    name = next((name for name, known in LIGHTNINGDIT_SIZES.items() if size.items() <= known.items()), None)
    if use_rope:
        size["num_heads"] = heads
    elif name is None:
        raise BadInput(f"{source}: the number of heads is not in the weights, and its size is no published one; train it here, or add rotary tables")
    named = name is not None and size.items() <= LIGHTNINGDIT_SIZES[name].items()
    return dict(
        name=name if named else "custom", **({} if named else size), input_size=round(tokens**0.5) * patch_size, in_channels=in_channels,
        num_classes=labels - 1, use_qknorm="blocks.0.attn.q_norm.weight" in state, use_swiglu="blocks.0.mlp.w12.weight" in state,
        use_rope=use_rope, use_rmsnorm="blocks.0.norm1.weight" in state, wo_shift=modulations == 4 * hidden_size,
        learn_sigma=outputs == 2 * in_channels * patch_size**2,
    )  # fmt: skip
