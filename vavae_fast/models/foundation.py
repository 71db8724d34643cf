"""Frozen vision foundation models: what the latents are aligned with (VA-VAE, section 3.2).

    create_foundation_model("dinov2", weights=...)(images) -> features (B, F, H / 16, W / 16)
    load_user_model("package.module:factory", 256)             a user's own, for FoundationModel(...)

Three parts: `foundation_models` names the models, `foundation_files` reads their files, timm builds the transformers; it
is imported when a model is made.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae_fast.errors import BadInput, require
from vavae_fast.models._torchvision import import_timm
from vavae_fast.models.foundation_files import first_misfit, from_transformers, load_foundation_state, read_foundation_file
from vavae_fast.models.foundation_models import FOUNDATION_MODELS, foundation_entry

InputRange = Literal["auto", "legacy", "trained"]
PIXELS_PER_PATCH = 16  # as the reference shows images to its models


def create_foundation_model(
    name: str,
    weights: str | Path | None = None,
    random: bool = False,
    input_range: InputRange = "auto",
    grid: tuple[int, int] | None = None,
    pixels_per_patch: int = PIXELS_PER_PATCH,
) -> "FoundationModel":
    """A frozen encoder: a name of FOUNDATION_MODELS, or `timm:<model name>` for another vision transformer of timm.

    weights: a local file in a layout of `foundation_files` (every key must fit), or "hub" to let timm download them;
    `random=True` instead, for tests and control runs. input_range "legacy" feeds images in [-1, 1] as they are, which is
    how the released VA-VAE was trained; "trained" normalises them as the encoder was trained; "auto" is the first for
    DINOv2 and MAE, the second for all others. grid: see FoundationModel. pixels_per_patch: see PatchEncoder.
    """
    entry = foundation_entry(name)
    require(input_range in ("auto", "legacy", "trained"), "foundation.input_range", input_range, "auto, legacy or trained")
    require(pixels_per_patch > 0, "foundation.pixels_per_patch", pixels_per_patch, "above 0")
    if weights is None and not random:
        raise BadInput(f"foundation model {name!r} has no weights; set foundation.weights to a file of {entry.timm} "
                       "(.safetensors or .pth), or to hub to let timm download it")  # fmt: skip
    if weights is not None and random:
        raise BadInput(f"foundation model {name!r}: weights {str(weights)!r} and random weights were both asked for; choose one")
    transformer = build_transformer(entry.timm, from_hub=weights == "hub")
    if weights not in (None, "hub"):
        _load(transformer, weights, name, entry.timm)
    legacy = entry.legacy if input_range == "auto" else input_range == "legacy"
    return FoundationModel(PatchEncoder(transformer, legacy, pixels_per_patch), grid, name)


class FoundationModel(nn.Module):
    """A frozen model on the grid of the latents: images (B, 3, H, W) in [-1, 1] -> (B, feature_dim, h, w), without gradient.

    `model` is anything with `.feature_dim` and `forward(images) -> (B, F, h', w')`: a PatchEncoder, or a user's own module.
    `grid` (h, w) resamples its features for latents that lie elsewhere; None leaves them where they are. `name` says in a
    run's manifest what the latents were aligned with.

    The model stands outside the module tree, always in eval mode: it moves with `.to`, but has nothing to optimise, to
    reduce over processes or to save, so no checkpoint of ours carries it.
    """

    def __init__(self, model: nn.Module, grid: tuple[int, int] | None = None, name: str = ""):
        super().__init__()
        self._outside = (model.requires_grad_(False).eval(),)
        self.feature_dim: int = model.feature_dim
        self.grid = grid
        self.name = name

    @property
    def model(self) -> nn.Module:
        return self._outside[0]

    def _apply(self, fn, recurse=True):
        self.model._apply(fn)
        return super()._apply(fn, recurse)

    def round_weights(self, dtype: torch.dtype) -> "FoundationModel":
        """Round a PatchEncoder's weights to `dtype` once, where autocast would at every call; it then computes in `dtype` throughout.

        A model of another kind keeps its own dtypes, and autocast decides about it.
        """
        if isinstance(self.model, PatchEncoder):
            self.model.round_weights(dtype)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features = self.model(images)
        return features if self.grid in (None, tuple(features.shape[2:])) else _resample(features, self.grid)


def _resample(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bilinear to `grid`, in fp32; smaller maps average what they cover."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.interpolate(wide, size=grid, mode="bilinear", align_corners=False, antialias=True).to(features.dtype)


class PatchEncoder(nn.Module):
    """A vision transformer of timm as images (B, 3, H, W) in [-1, 1] -> the features of its patches (B, feature_dim, h, w).

    The image is resized (bilinear) so that one patch covers `pixels_per_patch` of its pixels and h = H / pixels_per_patch,
    rounded up: at 16 a patch of 14 sees 256 pixels as 224. Fewer pixels a patch are finer features, at the cost of more
    tokens. Tables of positions are interpolated to the grid as timm does, and the reference with it; rotary and relative
    positions take any. Features come after the last norm (of SAM after its neck); class and register tokens are dropped.

    legacy: images go in as they are; else normalised with the mean and std that the transformer was trained with.
    """

    def __init__(self, transformer: nn.Module, legacy: bool = False, pixels_per_patch: int = PIXELS_PER_PATCH):
        super().__init__()
        self.transformer = transformer
        self.pixels_per_patch = pixels_per_patch
        self.patch: int = transformer.patch_embed.patch_size[0]
        self.feature_dim: int = transformer.num_features
        self.makes_maps = _is_sam(transformer)  # (B, F, h, w) by itself, without other tokens
        _keep_rotary_positions(transformer)
        self.prefix_tokens: int = 0 if self.makes_maps else transformer.num_prefix_tokens  # class and registers
        trained = transformer.pretrained_cfg
        self.input_size: int = trained["input_size"][-1]  # pixels a side that it was trained at
        self.mean, self.std = ((0.5,) * 3, (0.5,) * 3) if legacy else (tuple(trained["mean"]), tuple(trained["std"]))
        # ((x + 1) / 2 - mean) / std as one multiply and add; the identity for legacy.
        self.register_buffer("gain", torch.tensor([0.5 / s for s in self.std]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("offset", torch.tensor([(0.5 - m) / s for m, s in zip(self.mean, self.std)]).view(1, 3, 1, 1), persistent=False)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across an image of height x width pixels."""
        return -(-height // self.pixels_per_patch), -(-width // self.pixels_per_patch)

    def round_weights(self, dtype: torch.dtype) -> None:
        """Parameters alone: rotary periods and the normalisation are buffers, and stay in fp32."""
        for parameter in self.transformer.parameters():
            parameter.data = parameter.data.to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        h, w = grid = self.token_grid(*images.shape[-2:])
        x = images
        if (h * self.patch, w * self.patch) != tuple(x.shape[-2:]):
            # The reference reduces 256 to 224 without antialiasing; greater reductions would lose what lies between.
            antialias = self.pixels_per_patch > PIXELS_PER_PATCH
            x = F.interpolate(x, size=(h * self.patch, w * self.patch), mode="bilinear", align_corners=False, antialias=antialias)
        dtype = next(self.transformer.parameters()).dtype
        x = (x * self.gain + self.offset).to(dtype)
        # Weights that are rounded already need no autocast, which would widen its norms to fp32 again. SAM's relative places
        # are counted on the default device: elsewhere each of them would be copied over, and stop a GPU's queue.
        with (torch.autocast(x.device.type, enabled=False) if dtype.itemsize < 4 else nullcontext(),
              x.device if self.makes_maps else nullcontext()):  # fmt: skip
            features = self.transformer.forward_features(x)
        if self.makes_maps:
            return features
        return features[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, grid)


def _keep_rotary_positions(transformer: nn.Module) -> None:
    """Compute them once a grid: timm does so on the CPU at every call, and each copy would stop a GPU's queue."""
    rope = getattr(transformer, "rope", None)
    if rope is None:
        return
    compute, known = rope.get_embed, {}

    def get_embed(shape=None):
        weight = next(transformer.parameters())
        key = (shape, weight.device, weight.dtype)
        if key not in known:
            known[key] = compute(shape=shape)
        return known[key]

    rope.get_embed = get_embed


def build_transformer(timm_name: str, from_hub: bool = False, depth: int | None = None) -> nn.Module:
    """timm's transformer without head and pooling, for images of any size. `depth` blocks instead of all, with random weights."""
    timm = import_timm()
    if not timm.is_model(timm_name):
        near = timm.list_models(f"*{timm_name.split('.')[0]}*")[:3]
        cure = f"near: {', '.join(near)}" if near else "newer versions of timm have more: pip install --upgrade timm"
        raise BadInput(f"timm {timm.__version__} has no model {timm_name!r}; {cure}")
    options = {} if timm_name.startswith("samvit") else {"dynamic_img_size": True}  # SAM's takes any size as it is
    if depth is not None:
        options["depth"] = depth
    try:
        transformer = timm.create_model(timm_name, pretrained=from_hub, num_classes=0, **options)
    except TypeError as error:
        raise BadInput(f"timm model {timm_name!r} is not a vision transformer that takes images of any size ({error})") from None
    except _HUB_ERRORS as error:
        if not from_hub:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"could not fetch {timm_name} from the hub ({reason[:160]}); download its file where there is a network and set "
                       "foundation.weights to it") from None  # fmt: skip
    if not hasattr(transformer, "forward_features") or not (hasattr(transformer, "num_prefix_tokens") or _is_sam(transformer)):
        raise BadInput(f"timm model {timm_name!r} is not a vision transformer with patch tokens; choose a vit_* model")
    transformer.reset_classifier(0, "")
    return transformer


def _is_sam(transformer: nn.Module) -> bool:
    return type(transformer).__name__ == "VisionTransformerSAM"


# Missing network, missing file, refused access, no huggingface_hub: hub clients raise subclasses of these.
_HUB_ERRORS = (OSError, RuntimeError, ValueError, ImportError)


def _load(transformer: nn.Module, path: str | Path, name: str, timm_name: str) -> None:
    state = read_foundation_file(path)
    misfit = first_misfit(transformer, state)
    if misfit is not None:
        raise BadInput(f"{path}: not the weights of {name} ({timm_name}): {misfit}; {_cure(state, timm_name)}")
    load_foundation_state(transformer, state, path)


def _cure(state: dict[str, Tensor], timm_name: str) -> str:
    """What to do about a file that is not timm_name's: take the model whose it is, where one of ours fits."""
    if from_transformers(state):
        return f"it has the layout of Hugging Face transformers; give {timm_name}'s file as timm or the model's own project publishes it"
    owner = _owner(state)
    return f"it fits {owner}: set model.params.use_vf={owner}, or give a file of {timm_name}" if owner else f"give a file of {timm_name}"


def _owner(state: dict[str, Tensor]) -> str | None:
    """The registered model whose first block and all but the other blocks have the shapes of `state`: widths tell depths."""
    one_block = {key: value for key, value in state.items() if not key.startswith("blocks.") or key.startswith("blocks.0.")}
    for name, entry in FOUNDATION_MODELS.items():
        with torch.device("meta"):
            transformer = build_transformer(entry.timm, depth=1)
        if first_misfit(transformer, one_block) is None:
            return name
    return None
