"""Weights from files into modules: all of them or none, and never a module that stays random without a word.

    read_state_dict     a file -> tensors by name; refuses anything that could run code
    load_strict         tensors by name -> a module; every key and shape is checked before the first copy
    load_autoencoder    a released VA-VAE, a training checkpoint or our own export -> AutoencoderKL
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vavae_fast.errors import BadInput
from vavae_fast.models.autoencoder import AutoencoderKL
from vavae_fast.torch_files import read_torch

logger = logging.getLogger(__name__)

# What DDP and torch.compile put before every name.
_WRAPPERS = ("module.", "_orig_mod.")
# Where checkpoints keep the state dict, when it is not the file itself.
_CONTAINERS = ("state_dict", "model", "ema")
# Keys of a VA-VAE training checkpoint that are not the autoencoder.
_TRAINING_ONLY = ("foundation_model.", "loss.", "linear_proj.")
# Shapes that say in the config's words what differs: key -> (dimension, what it counts, config key).
_TELLING = {
    "decoder.conv_in.weight": (1, "latent channels", "model.params.ddconfig.z_channels and model.params.embed_dim"),
    "encoder.conv_in.weight": (0, "base channels", "model.params.ddconfig.ch"),
    "x_embedder.proj.weight": (1, "latent channels", "model.in_chans"),
    "y_embedder.embedding_table.weight": (0, "rows of labels (classes, and one for none)", "data.num_classes"),
    "pos_embed": (1, "tokens", "data.image_size or vae.downsample_ratio"),
    "final_layer.norm_final.weight": (0, "hidden channels", "model.model_type"),
}


def read_state_dict(path: str | Path, prefer: str | tuple[str, ...] = "model") -> dict[str, Tensor]:
    """Tensors by name from a `.safetensors` file or a PyTorch one (`.pt`, `.pth`, `.ckpt`, `.bin`), on the CPU.

    A checkpoint that keeps its state dict under "state_dict", "model" or "ema" is unwrapped, `prefer` (or each of them) first. Prefixes
    of DDP and torch.compile are stripped. Only tensors and plain values are ever unpickled; `BadInput` otherwise.
    """
    path = Path(path)
    _require_checkpoint(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    return _without_wrappers(_state_dict_in(content, (prefer,) if isinstance(prefer, str) else prefer, path), path)


def _require_checkpoint(path: Path) -> None:
    """Name the files that are often met in place of weights."""
    if path.is_dir():
        raise BadInput(f"{path}: a folder; expected a file of weights")
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise BadInput(f"{path}: the file is empty; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise BadInput(f"{path}: a Git LFS pointer, not the weights; run 'git lfs pull' or download the file itself")
    if start.lstrip()[:1] == b"<":
        raise BadInput(f"{path}: a web page, not weights; the download did not reach the file")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a safetensors file, or damaged ({_first_line(error)}); fetch it again") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _state_dict_in(content: Any, prefer: tuple[str, ...], path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise BadInput(f"{path}: holds a {type(content).__name__}, expected a state dict (tensors by name)")
    found, where = content, ""
    if not any(isinstance(value, Tensor) for value in content.values()):
        candidates = [key for key in (*prefer, *_CONTAINERS) if isinstance(content.get(key), Mapping)]
        if not candidates:
            keys = ", ".join(map(str, list(content)[:5])) or "nothing"
            raise BadInput(f"{path}: no state dict inside (found: {keys}); expected tensors, or one of {', '.join(_CONTAINERS)}")
        where = candidates[0]
        found = content[where]
    others = [str(key) for key, value in found.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others or not found:
        inside = f" under {where!r}" if where else ""
        raise BadInput(f"{path}: expected only tensors by name{inside}, found {_few(others) if others else 'nothing'}")
    return dict(found)


def _without_wrappers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    stripped = {}
    for key, value in state.items():
        name = key
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if name in stripped:
            raise BadInput(f"{path}: two entries for {name}, with and without a wrapper's prefix; save the model once")
        stripped[name] = value
    if count := sum(key not in stripped for key in state):
        logger.info("%s: dropped the prefixes of DDP or torch.compile from %d keys", path, count)
    return stripped


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str | Path, ignore: Iterable[str] = ()) -> None:
    """Copy `state` into `module`; each parameter and buffer exactly once, in its own shape, or `BadInput` and no copy at all.

    `source` names the file in the message. Keys that start with one of `ignore` may be there or not. Values are cast to
    the module's dtype; a floating point parameter takes no integers.
    """
    ignore = tuple(ignore)
    wanted = {key: value for key, value in module.state_dict().items() if not key.startswith(ignore)}
    given = {key: value for key, value in state.items() if not key.startswith(ignore)}
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    both = [key for key in wanted if key in given]
    shapes = [key for key in both if wanted[key].shape != given[key].shape]
    kinds = [key for key in both if wanted[key].is_floating_point() != given[key].is_floating_point()]
    if missing or unexpected or shapes or kinds:
        differing = [f"{key} is {tuple(given[key].shape)}, expected {tuple(wanted[key].shape)}" for key in shapes]
        dtypes = [f"{key} is {given[key].dtype}, expected {wanted[key].dtype}" for key in kinds]
        groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", differing), ("of another kind", dtypes))
        report = "; ".join(f"{len(keys)} {what}: {_few(keys)}" for what, keys in groups if keys)
        raise BadInput(f"{source}: does not fit {type(module).__name__}: {_likely_cause(wanted, given)}{report}; nothing was loaded")
    with torch.no_grad():
        for key, target in module.state_dict(keep_vars=True).items():
            if key in given:
                target.copy_(given[key])


def _few(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f", and {len(keys) - most} more" if len(keys) > most else "")


def _likely_cause(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    if not set(wanted) & set(given):
        if prefix := _prefix_of(wanted, given):
            return f"its keys start with {prefix!r}; "
        return "it belongs to another kind of model; "
    for key, (dim, what, config_key) in _TELLING.items():
        if key in wanted and key in given and wanted[key].ndim == given[key].ndim > dim:
            here, there = wanted[key].shape[dim], given[key].shape[dim]
            if here != there:
                return f"{there} {what} in the file, {here} in the config, set {config_key}; "
    return ""


def _prefix_of(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What stands before the wanted names in the file, if the same text stands before one of them."""
    first = next(iter(wanted))
    return next((key[: -len(first)] for key in given if key.endswith("." + first)), "")


def load_autoencoder(path: str | Path, architecture: Mapping[str, Any] | None = None, fused: bool = False) -> AutoencoderKL:
    """AutoencoderKL in eval mode with the weights of `path`: a released VA-VAE, a training checkpoint, or our own export.

    `architecture` holds arguments of AutoencoderKL. What is left out is read off the weights; what contradicts them is
    a `BadInput` naming both values. Networks of the training alone (foundation_model, loss, linear_proj) are dropped.
    """
    return autoencoder_of(read_state_dict(path), path, architecture, fused)


def autoencoder_of(
    state: Mapping[str, Tensor], path: str | Path, architecture: Mapping[str, Any] | None = None, fused: bool = False
) -> AutoencoderKL:
    """`load_autoencoder` of tensors that were read. Nothing is allocated before every shape is known to be there."""
    state = autoencoder_state(state, path)
    found = autoencoder_architecture(state, path)
    given = dict(architecture or {})
    _require_agreement(found, given, path)
    arguments = {**found, **given, "fused": fused}
    try:
        with torch.device("meta"):
            skeleton = AutoencoderKL(**arguments)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise BadInput(f"{path}: not the architecture of an autoencoder ({_first_line(error)}); give another file") from None
    load_strict(skeleton, state, path)  # only compares: nothing has a place yet
    model = AutoencoderKL(**arguments)
    load_strict(model, state, path)
    return model.eval()


def autoencoder_state(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The autoencoder's own entries of a checkpoint, without a common prefix; logs what was left behind."""
    prefixes = [key.removesuffix("encoder.conv_in.weight") for key in state if key.endswith("encoder.conv_in.weight")]
    prefixes = [prefix for prefix in prefixes if not prefix.startswith(_TRAINING_ONLY)]
    if len(prefixes) != 1:
        problem = "no encoder.conv_in.weight" if not prefixes else f"several autoencoders ({_few(prefixes)})"
        raise BadInput(f"{source}: {problem} among its {len(state)} keys ({_few(list(state), 3)}); expected one LDM autoencoder")
    prefix = prefixes[0]
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    own = {key: value for key, value in own.items() if not key.startswith(_TRAINING_ONLY)}
    if len(own) < len(state):
        logger.info("%s: %d keys are the autoencoder's, %d others are left out", source, len(own), len(state) - len(own))
    return own


def autoencoder_architecture(state: Mapping[str, Tensor], source: str | Path = "state dict") -> dict[str, Any]:
    """Arguments of AutoencoderKL that give tensors of these shapes.

    `resolution` is not in the weights, only the levels that attend: 256 stands for it, and `attn_resolutions` are those
    levels at 256. The number of groups of a norm is not in them either; AutoencoderKL's default is the reference's.
    """
    if any(key.startswith("encoder.down_blocks.") for key in state):
        raise BadInput(f"{source}: an autoencoder in the layout of diffusers (encoder.down_blocks); expected LDM's (encoder.down)")
    try:
        ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
        levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
        blocks = 1 + max(int(key.split(".")[4]) for key in state if key.startswith("encoder.down.0.block."))
        widths = [state[f"encoder.down.{level}.block.{blocks - 1}.conv2.weight"].shape[0] for level in range(levels)]
        embed_dim, out_ch = state["post_quant_conv.weight"].shape[1], state["decoder.conv_out.weight"].shape[0]
        z_channels = state["decoder.conv_in.weight"].shape[1]
        if ch < 1 or levels * blocks > len(state) or min(widths) < 1:
            raise ValueError(f"{levels} levels of {blocks} blocks, {ch} channels")
    except (KeyError, ValueError, IndexError) as error:
        raise BadInput(f"{source}: not an LDM autoencoder (at {error}); expected encoder., decoder., post_quant_conv.") from None
    attends = [level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in state]
    return dict(
        embed_dim=embed_dim,
        z_channels=z_channels,
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=blocks,
        attn_resolutions=tuple(256 >> level for level in attends),
        resolution=256,
        in_channels=in_channels,
        out_ch=out_ch,
    )


def _require_agreement(found: Mapping[str, Any], given: Mapping[str, Any], source: str | Path) -> None:
    for key in ("embed_dim", "z_channels", "ch", "ch_mult", "num_res_blocks", "in_channels", "out_ch"):
        value = given.get(key)
        value = tuple(value) if isinstance(value, list) else value
        if value is not None and value != found[key]:
            raise BadInput(f"{source}: {key} is {found[key]} in the file, {value} in the config; set {key} to {found[key]}")
    here, there = _attention_levels({**found, **given}), _attention_levels(found)
    if here != there:
        raise BadInput(f"{source}: levels {there} attend in the file, {here} in the config; set attn_resolutions to fit resolution")


def _attention_levels(architecture: Mapping[str, Any]) -> list[int]:
    resolution, attends = architecture["resolution"], architecture["attn_resolutions"]
    return [level for level in range(len(architecture["ch_mult"])) if resolution >> level in attends]
