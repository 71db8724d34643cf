"""The foundation models that `use_vf` names. Imports no torch, so that a config is checked before anything heavy loads.

A name without a size is the Large model, of I-JEPA the Huge one. What an entry knows beside its name (input size,
normalisation, patch, class and register tokens, channels) is read off timm's model, see `foundation.PatchEncoder`.
"""

import difflib
from dataclasses import dataclass

from vavae_fast.errors import BadInput

USER_MODEL = "module"  # use_vf of a run whose model came by --foundation package.module:factory


@dataclass(frozen=True)
class FoundationEntry:
    """timm's name of the architecture and, after the dot, of the weights."""

    timm: str
    legacy: bool = False  # fed images in [-1, 1] as they are: how the reference's code feeds the two models it knows


FOUNDATION_MODELS = {
    # DINOv2, Oquab et al. 2023; with registers, Darcet et al. 2023
    "dinov2": FoundationEntry("vit_large_patch14_dinov2.lvd142m", legacy=True),
    "dinov2-small": FoundationEntry("vit_small_patch14_dinov2.lvd142m", legacy=True),
    "dinov2-base": FoundationEntry("vit_base_patch14_dinov2.lvd142m", legacy=True),
    "dinov2-giant": FoundationEntry("vit_giant_patch14_dinov2.lvd142m", legacy=True),
    "dinov2-reg": FoundationEntry("vit_large_patch14_reg4_dinov2.lvd142m", legacy=True),
    "dinov2-reg-small": FoundationEntry("vit_small_patch14_reg4_dinov2.lvd142m", legacy=True),
    "dinov2-reg-base": FoundationEntry("vit_base_patch14_reg4_dinov2.lvd142m", legacy=True),
    "dinov2-reg-giant": FoundationEntry("vit_giant_patch14_reg4_dinov2.lvd142m", legacy=True),
    # DINOv3, Siméoni et al. 2025: rotary positions, four registers
    "dinov3": FoundationEntry("vit_large_patch16_dinov3.lvd1689m"),
    "dinov3-small": FoundationEntry("vit_small_patch16_dinov3.lvd1689m"),
    "dinov3-base": FoundationEntry("vit_base_patch16_dinov3.lvd1689m"),
    # MAE, He et al. 2021
    "mae": FoundationEntry("vit_large_patch16_224.mae", legacy=True),
    "mae-base": FoundationEntry("vit_base_patch16_224.mae", legacy=True),
    "mae-huge": FoundationEntry("vit_huge_patch14_224.mae", legacy=True),
    # CLIP, Radford et al. 2021: OpenAI's weights were trained with QuickGELU
    "clip": FoundationEntry("vit_large_patch14_clip_quickgelu_224.openai"),
    "clip-base": FoundationEntry("vit_base_patch16_clip_quickgelu_224.openai"),
    # SigLIP 2, Tschannen et al. 2025
    "siglip2": FoundationEntry("vit_large_patch16_siglip_256.v2_webli"),
    "siglip2-base": FoundationEntry("vit_base_patch16_siglip_256.v2_webli"),
    "siglip2-so400m": FoundationEntry("vit_so400m_patch16_siglip_256.v2_webli"),
    "siglip2-512": FoundationEntry("vit_large_patch16_siglip_512.v2_webli"),
    "siglip2-base-512": FoundationEntry("vit_base_patch16_siglip_512.v2_webli"),
    # SAM, Kirillov et al. 2023: windowed attention, relative positions, no class token; the neck's 256 channels
    "sam": FoundationEntry("samvit_large_patch16.sa1b"),
    "sam-base": FoundationEntry("samvit_base_patch16.sa1b"),
    "sam-huge": FoundationEntry("samvit_huge_patch16.sa1b"),
    # I-JEPA, Assran et al. 2023: no class token
    "ijepa": FoundationEntry("vit_huge_patch14_gap_224.in1k_ijepa"),
    "ijepa-16": FoundationEntry("vit_huge_patch16_gap_448.in1k_ijepa"),
}


def foundation_entry(name: str) -> FoundationEntry:
    """The entry of a name; `timm:<model name>` stands for any other vision transformer of timm. `BadInput` with the names there are."""
    if name.startswith("timm:"):
        return FoundationEntry(name.removeprefix("timm:"))
    if name not in FOUNDATION_MODELS:
        near = difflib.get_close_matches(name, FOUNDATION_MODELS, n=1)
        guess = f", did you mean {near[0]}?" if near else ";"
        names = ", ".join(FOUNDATION_MODELS)
        raise BadInput(f"model.params.use_vf: no foundation model {name!r}{guess} expected one of {names}, or timm:<model name>")
    return FOUNDATION_MODELS[name]
