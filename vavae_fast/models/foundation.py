"""Frozen vision foundation models: what the latents are aligned with (VA-VAE, section 3.2).

    create_foundation_model("dinov2", weights=...)(images) -> features (B, F, H / 16, W / 16)

Anything with `.feature_dim` and `forward(images) -> (B, F, h, w)` can stand in for one. timm builds the transformers;
it is imported when a model is made.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae_fast.errors import BadInput
from vavae_fast.models._torchvision import import_timm
from vavae_fast.models.weights import load_strict, read_state_dict

# Name in a config -> name in timm. `timm:<name>` takes any other vision transformer of timm.
FOUNDATION_MODELS = {
    "dinov2": "vit_large_patch14_dinov2.lvd142m",
    "dinov2-base": "vit_base_patch14_dinov2.lvd142m",
    "dinov2-small": "vit_small_patch14_dinov2.lvd142m",
    "mae": "vit_large_patch16_224.mae",
    "mae-base": "vit_base_patch16_224.mae",
}
# Of the projects' own files: what only their pretraining used.
_PRETRAINING_ONLY = ("mask_token", "decoder_", "head.", "fc_norm.")
_STRIDE = 16  # pixels of the image behind one feature, whatever the model's patch


def create_foundation_model(
    name: str,
    weights: str | Path | None = None,
    random: bool = False,
    input_range: Literal["legacy", "imagenet"] = "legacy",
    grid: tuple[int, int] | None = None,
) -> "FoundationModel":
    """A frozen encoder: a name of FOUNDATION_MODELS, or `timm:<model name>`.

    weights: a local file (.safetensors, .pth; every key must fit), or "hub" to let timm download them; `random=True`
    instead, for tests and control runs. input_range "legacy" feeds images in [-1, 1] as they are, which is how the
    released VA-VAE was trained; "imagenet" first normalises them as the encoder was trained. grid: see FoundationModel.
    """
    if name not in FOUNDATION_MODELS and not name.startswith("timm:"):
        raise BadInput(f"foundation model {name!r}: expected one of {', '.join(FOUNDATION_MODELS)}, or timm:<model name>")
    if input_range not in ("legacy", "imagenet"):
        raise BadInput(f"foundation.input_range: must be legacy or imagenet, got {input_range!r}")
    timm_name = FOUNDATION_MODELS.get(name, name.removeprefix("timm:"))
    if weights is None and not random:
        raise BadInput(f"foundation model {name!r} has no weights; set foundation.weights to a file of {timm_name} "
                       "(.safetensors or .pth), or to hub to let timm download it")  # fmt: skip
    if weights is not None and random:
        raise BadInput(f"foundation model {name!r}: weights {str(weights)!r} and random weights were both asked for; choose one")
    encoder = _build(timm_name, from_hub=weights == "hub")
    if weights not in (None, "hub"):
        load_strict(encoder, read_state_dict(weights), weights, ignore=_PRETRAINING_ONLY)
    return FoundationModel(encoder, input_range, grid)


class FoundationModel(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> patch features (B, feature_dim, H / 16, W / 16); no gradient, always in eval mode.

    The image is resized (bilinear, no antialiasing, as the reference does) so that one patch of the model covers 16 of
    its pixels: 256 becomes 224 for a patch of 14. `grid` (h, w) resamples the features for a tokenizer whose latents are
    not H / 16 wide.

    The encoder stands outside the module tree: it moves with `.to`, but has nothing to optimise, to reduce over
    processes or to save, so no checkpoint of ours carries it.
    """

    def __init__(self, encoder: nn.Module, input_range: Literal["legacy", "imagenet"] = "legacy", grid: tuple[int, int] | None = None):
        super().__init__()
        self._outside = (encoder.requires_grad_(False).eval(),)
        self.feature_dim: int = encoder.num_features
        self.patch: int = encoder.patch_embed.patch_size[0]
        self.grid = grid
        legacy = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        trained = encoder.pretrained_cfg if input_range == "imagenet" else legacy
        mean, std = trained["mean"], trained["std"]
        # ((x + 1) / 2 - mean) / std as one multiply and add; the identity for legacy.
        self.register_buffer("gain", torch.tensor([0.5 / s for s in std]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("offset", torch.tensor([(0.5 - m) / s for m, s in zip(mean, std)]).view(1, 3, 1, 1), persistent=False)

    @property
    def encoder(self) -> nn.Module:
        return self._outside[0]

    def _apply(self, fn, recurse=True):
        self.encoder._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % _STRIDE or width % _STRIDE or 0 in (height, width):
            raise ValueError(f"foundation model: images are {height} x {width}, expected multiples of {_STRIDE}")
        h, w = height // _STRIDE, width // _STRIDE
        x = images
        if self.patch != _STRIDE:
            x = F.interpolate(x, size=(h * self.patch, w * self.patch), mode="bilinear", align_corners=False)
        x = (x * self.gain + self.offset).to(self.gain.dtype)
        tokens = self.encoder.forward_features(x)[:, self.encoder.num_prefix_tokens :]
        features = tokens.transpose(1, 2).unflatten(2, (h, w))
        return features if self.grid in (None, (h, w)) else _resample(features, self.grid)


def _resample(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bilinear to `grid`; smaller maps average what they cover."""
    return F.interpolate(features, size=grid, mode="bilinear", align_corners=False, antialias=True)


def _build(timm_name: str, from_hub: bool) -> nn.Module:
    timm = import_timm()
    if not timm.is_model(timm_name):
        near = timm.list_models(f"*{timm_name.split('.')[0]}*")[:3]
        raise BadInput(f"timm has no model {timm_name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    try:
        encoder = timm.create_model(timm_name, pretrained=from_hub, num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        raise BadInput(f"timm model {timm_name!r} is not a vision transformer that takes images of any size ({error})") from None
    except _HUB_ERRORS as error:
        if not from_hub:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"could not fetch {timm_name} from the hub ({reason[:160]}); download its file where there is a network and set "
                       "foundation.weights to it") from None  # fmt: skip
    if not hasattr(encoder, "forward_features") or not hasattr(encoder, "num_prefix_tokens"):
        raise BadInput(f"timm model {timm_name!r} is not a vision transformer with patch tokens; choose a vit_* model")
    return encoder


# Missing network, missing file, refused access, no huggingface_hub: hub clients raise subclasses of these.
_HUB_ERRORS = (OSError, RuntimeError, ValueError, ImportError)
