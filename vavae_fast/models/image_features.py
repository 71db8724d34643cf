"""Global features of images by a foundation model: a space besides Inception's to take Fréchet distances in.

FID saturates, and Inception's 1,000 classes decide what it sees; distances in DINOv2's space follow people's judgement more closely
(Stein et al. 2023, "Exposing flaws of generative model evaluation metrics and their unfair treatment of diffusion models").
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae_fast import artifacts
from vavae_fast.models.foundation import create_foundation_model
from vavae_fast.models.inference import matmul_precision
from vavae_fast.pixels import to_unit

_PIXELS = 256  # images come at this size to the encoder, whose patch then covers 16 of them


class ImageFeatures(nn.Module):
    """uint8 images (n, 3, H, W) -> (n, D) float32: the class token after the last norm, or the mean over patches where there is none.

    `name` is a name of FOUNDATION_MODELS or `timm:<model name>`; weights: its file, or "hub". Images are resized (bicubic,
    antialiased) to 16 x 16 patches, 224 pixels for a patch of 14, and normalised as the model was trained; all in float32. `sha256` of
    the file, None for the hub's.
    """

    def __init__(self, name: str, weights: str | Path, random: bool = False):
        super().__init__()
        self.name = name
        self.sha256 = None if random or str(weights) == "hub" else artifacts.sha256(Path(weights))
        self.encoder = create_foundation_model(name, None if random else weights, random=random, input_range="trained").model

    @torch.inference_mode()
    @matmul_precision("fp32")
    def forward(self, images: Tensor) -> Tensor:
        encoder = self.encoder
        side = _PIXELS // encoder.pixels_per_patch * encoder.patch
        x = to_unit(images.to(encoder.gain.device))
        if x.shape[2:] != (side, side):
            x = F.interpolate(x, size=(side, side), mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
        features = encoder.transformer.forward_features(x * encoder.gain + encoder.offset)
        if encoder.makes_maps:
            return features.flatten(2).mean(2).float()
        tokens = features if encoder.prefix_tokens == 0 else features[:, :1]
        return tokens.mean(1).float()
