"""Files of foundation models, in timm's layout or their project's own -> tensors under timm's names.

    timm's files         as they are; their heads and pooling are left out
    DINOv2               *_pretrain.pth, with registers or without
    DINOv3               *_pretrain_*.pth of the S, B and L models
    MAE                  under `model`, with its decoder or without
    CLIP                 OpenAI's and OpenCLIP's state dict, `visual.` beside the text model
    OpenCLIP on timm     `visual.trunk.` (SigLIP 2)
    SAM                  `image_encoder.` beside the prompt encoder and the mask decoder
    I-JEPA               under `encoder`, as timm, transformers and REPA read it; of a file without it `target_encoder`

Hugging Face transformers' layout is not taken: timm has no conversion of it.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from vavae_fast.models.weights import load_strict, read_state_dict

State = dict[str, Tensor]

# What only pretraining or another task used, and no feature needs.
_UNUSED = ("mask_token", "decoder_", "head.", "fc_norm.", "attn_pool.")


def read_foundation_file(path: str | Path) -> State:
    """The encoder's tensors of a file in one of the layouts above, by timm's names; `BadInput` where it cannot be read."""
    state = read_state_dict(path, prefer=("encoder", "target_encoder"))
    for telling, convert in _LAYOUTS.items():
        if telling in state:
            state = convert(state)
            break
    return {key: value for key, value in state.items() if not key.startswith(_UNUSED)}


def first_misfit(encoder: nn.Module, state: State) -> str | None:
    """The first thing that keeps `state` from being `encoder`'s weights, in words; None when it is them."""
    state, wanted = _in_place(encoder, state), _wanted(encoder)
    for key, value in wanted.items():
        if key in state and state[key].shape != value.shape:
            return f"{key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}"
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted]
    if missing:
        return f"it has no {missing[0]}" + (f" but {extra[0]}" if extra else "")
    return f"{extra[0]} has no place in the model" if extra else None


def load_foundation_state(encoder: nn.Module, state: State, path: str | Path) -> None:
    """Copy into `encoder` what `first_misfit` found nothing against."""
    load_strict(encoder, _in_place(encoder, state), path, ignore=_UNUSED)


def from_transformers(state: Iterable[str]) -> bool:
    """Whether the names are those of Hugging Face transformers."""
    marks = ("embeddings.patch_embeddings.", "embeddings.patch_embedding.", "vision_encoder.patch_embed.projection.")
    return any(mark in key for key in state for mark in marks)


def _wanted(encoder: nn.Module) -> State:
    return {key: value for key, value in encoder.state_dict().items() if not key.startswith(_UNUSED)}


def _in_place(encoder: nn.Module, state: State) -> State:
    """Without biases of zeros that the model does not have: DINOv3's projects train biases of q and v that end as zeros."""
    wanted = encoder.state_dict()
    return {k: v for k, v in state.items() if k in wanted or not k.endswith(("attn.q_bias", "attn.v_bias")) or bool(v.any())}


def _renamed(state: Mapping[str, Tensor], prefix: str, names: Mapping[str, str]) -> State:
    """The entries under `prefix`, without it, each part of `names` replaced in order."""
    found = {}
    for key, value in state.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            for old, new in names.items():
                name = name.replace(old, new)
            found[name] = value
    return found


def _from_dinov2_registers(state: State) -> State:
    """The class token has a position of its own, which timm adds beforehand; registers have none."""
    state = _from_dinov2_swiglu(state)
    positions = state.pop("pos_embed")
    state["reg_token"] = state.pop("register_tokens")
    state["cls_token"] = state["cls_token"] + positions[:, :1]
    state["pos_embed"] = positions[:, 1:]
    return state


def _from_dinov2_swiglu(state: State) -> State:
    return _renamed(state, "", {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."})


def _from_dinov3(state: State) -> State:
    """The bias of k is masked to zero, and the periods of the rotary positions are a constant."""
    renamed = _renamed(state, "", {"storage_tokens": "reg_token", ".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2"})
    found = {}
    for key, value in renamed.items():
        if key.endswith(".attn.qkv.bias"):
            found[key.replace("qkv.bias", "q_bias")], _, found[key.replace("qkv.bias", "v_bias")] = value.chunk(3)
        elif not key.endswith("qkv.bias_mask") and not key.startswith(("rope_embed.", "local_cls_norm.")):
            found[key] = value
    return found


def _from_clip(state: State) -> State:
    names = {"conv1.": "patch_embed.proj.", "positional_embedding": "pos_embed", "class_embedding": "cls_token",
             "transformer.resblocks.": "blocks.", "ln_pre": "norm_pre", "ln_post": "norm", ".ln_": ".norm", ".in_proj_": ".qkv.",
             ".out_proj.": ".proj.", ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}  # fmt: skip
    found = _renamed(state, "visual.", names)
    found.pop("proj", None)  # to the space shared with text
    found["cls_token"] = found["cls_token"].reshape(1, 1, -1)
    found["pos_embed"] = found["pos_embed"].unsqueeze(0)
    return found


def _from_sam(state: State) -> State:
    return _renamed(state, "image_encoder.", {".mlp.lin": ".mlp.fc"})


def _from_openclip_on_timm(state: State) -> State:
    return _renamed(state, "visual.trunk.", {})


# A name that only this layout has -> its conversion. The first that is found counts.
_LAYOUTS: dict[str, Callable[[State], State]] = {
    "register_tokens": _from_dinov2_registers,
    "blocks.0.mlp.w12.weight": _from_dinov2_swiglu,
    "storage_tokens": _from_dinov3,
    "visual.class_embedding": _from_clip,
    "visual.trunk.patch_embed.proj.weight": _from_openclip_on_timm,
    "image_encoder.patch_embed.proj.weight": _from_sam,
}
