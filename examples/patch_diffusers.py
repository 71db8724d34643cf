"""Fused operators in the transformers of diffusers: the same results, and the time before and after.

    python examples/patch_diffusers.py --model DiT-tiny
    python examples/patch_diffusers.py --model DiT-XL/2 --batch 64
    python examples/patch_diffusers.py --checkpoint FOLDER            # what save_pretrained wrote: the transformer/ of a pipeline
"""

from pathlib import Path
from typing import Any

import torch
from before_after import compare, known, options, run, twin, with_weights
from torch import nn

from vavae_fast.errors import BadInput
from vavae_fast.models._torchvision import import_timm
from vavae_kernels import patch

BLOCKS = "transformer_blocks"
WORDS = 120  # tokens of a text
FEW = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> class, arguments where they differ from its own
    "DiT-XL/2": ("DiTTransformer2DModel", {}),
    "PixArt-XL/2": ("PixArtTransformer2DModel", dict(sample_size=32, caption_channels=4096, use_additional_conditions=False)),
    "SD3-medium": (
        "SD3Transformer2DModel",
        dict(sample_size=64, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192),
    ),
    "DiT-tiny": ("DiTTransformer2DModel", dict(FEW, num_embeds_ada_norm=10)),
    "PixArt-tiny": ("PixArtTransformer2DModel", dict(FEW, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False)),
    "SD3-tiny": (
        "SD3Transformer2DModel",
        dict(FEW, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=24, pos_embed_max_size=8),
    ),
}


def build(name: str, checkpoint: Path | None = None) -> nn.Module:
    """A model of `MODELS` with random weights, or what a folder of diffusers holds."""
    import_timm()  # past a torchvision that does not fit torch; diffusers imports it too
    import diffusers

    if checkpoint is None:
        kind, arguments = MODELS[known(MODELS, name)]
        return with_weights(getattr(diffusers, kind)(**arguments), None)
    if not (checkpoint / "config.json").is_file():
        raise BadInput(f"--checkpoint {checkpoint}: no config.json there; give the folder that save_pretrained wrote, of a pipeline its transformer/")
    return diffusers.AutoModel.from_pretrained(str(checkpoint), local_files_only=True, low_cpu_mem_usage=False).float().eval()


def inputs(model: nn.Module, batch: int) -> dict[str, Any]:
    """What the forward of the model's class takes: latents (B, C, H, W), steps (B,), and classes (B,) or texts (B, M, D)."""
    c = model.config
    latents = torch.randn(batch, c.in_channels, c.sample_size, c.sample_size)
    common = dict(hidden_states=latents, timestep=torch.randint(1000, (batch,)), return_dict=False)
    kind = type(model).__name__
    if kind == "DiTTransformer2DModel":
        return dict(common, class_labels=torch.arange(batch) % 10)
    if kind == "PixArtTransformer2DModel":
        return dict(common, encoder_hidden_states=torch.randn(batch, WORDS, c.caption_channels), added_cond_kwargs={})
    if kind == "SD3Transformer2DModel":
        text = torch.randn(batch, WORDS, c.joint_attention_dim)
        return dict(common, encoder_hidden_states=text, pooled_projections=torch.randn(batch, c.pooled_projection_dim))
    raise BadInput(f"{kind}: this example has inputs for DiT, PixArt and SD3; patch() itself takes any model")


def main() -> None:
    given = options(__doc__, model="DiT-tiny", repository=False)
    model = build(given.model, given.checkpoint)
    before = twin(model)  # to compare with

    handle = patch(model)
    print(handle)  # handle.report says it module by module; handle.undo() takes it back

    compare(before, model, BLOCKS, inputs(model, given.batch), given)


if __name__ == "__main__":
    run(main)
