"""LPIPS: how far apart two images look, as features of VGG16 see them.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation 1, version 0.1 for
VGG: d(x, y) = sum_l mean_hw sum_c w_lc (f_lc(x) - f_lc(y))^2 with features of unit length over channels.

The published weights are two files, and this project never fetches them: torchvision's VGG16 and LPIPS's linear layers.
A VA-VAE training checkpoint holds both, under `loss.perceptual_loss.`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vavae_fast.errors import BadInput
from vavae_fast.models.weights import load_strict, read_state_dict

# VGG16 up to relu5_3, in torchvision's numbering; a slice ends where LPIPS taps it.
_SLICES = (("conv 3 64", "conv 64 64"), ("pool", "conv 64 128", "conv 128 128"), ("pool", "conv 128 256", "conv 256 256", "conv 256 256"),
           ("pool", "conv 256 512", "conv 512 512", "conv 512 512"), ("pool", "conv 512 512", "conv 512 512", "conv 512 512"))  # fmt: skip
SMALLEST_IMAGE = 16  # pixels a side: VGG16 halves them four times
_WIDTHS = (64, 128, 256, 512, 512)
_WANTED = ("VGG16 of torchvision, 'vgg16-397923af.pth' (config key perceptual.vgg_weights)",
           "the linear layers of LPIPS v0.1, 'vgg.pth' (config key perceptual.linear_weights)")  # fmt: skip


class LPIPS(nn.Module):
    """forward(x, y): images (B, 3, H, W) in [-1, 1], at least 16 pixels a side -> distances (B, 1, 1, 1), 0 for equal images.

    Frozen and always in eval mode; gradients reach the images. Built by `from_files`, or by `random` for tests: there is
    no constructor that leaves it untrained by accident.
    """

    def __init__(self, state: Mapping[str, Tensor], source: str | Path):
        super().__init__()
        self.scaling_layer = _Scaling()
        self.net = _VGG16()
        for index, width in enumerate(_WIDTHS):
            setattr(self, f"lin{index}", _Linear(width))
        load_strict(self, state, source)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_files(cls, vgg: str | Path | None, linear: str | Path | None = None) -> "LPIPS":
        """Weights from local files: `vgg` torchvision's VGG16, `linear` LPIPS's layers; or one file, as `vgg`, that holds both."""
        if vgg is None:
            raise BadInput(f"LPIPS: no weights given; wants {_WANTED[0]} and {_WANTED[1]}, downloaded by you from those projects")
        state = read_state_dict(_existing(vgg, _WANTED[0]))
        source = str(vgg)
        if linear is not None:
            state = {**_perceptual_keys(state), **_linear_keys(read_state_dict(_existing(linear, _WANTED[1])), linear)}
            source = f"{vgg} with {linear}"
        state = _perceptual_keys(state)
        if "lin0.model.1.weight" not in state:
            raise BadInput(f"{vgg}: holds no linear layers of LPIPS; give {_WANTED[1]} too")
        return cls(_with_constants(state), source)

    @classmethod
    def random(cls, seed: int = 0) -> "LPIPS":
        """Untrained weights, for tests: a distance in every respect but meaning."""
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for key, shape in _shapes().items():
            draw = torch.randn(shape, generator=generator)
            fan_in = max(1, draw[0].numel())
            # He's scale keeps features alive through 13 layers; a distance needs weights that are not negative.
            state[key] = draw.abs() / fan_in if key.startswith("lin") else draw * (2.0 / fan_in) ** 0.5 if draw.ndim == 4 else 0 * draw
        return cls(_with_constants(state), "LPIPS.random")

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"LPIPS: images have shapes {tuple(x.shape)} and {tuple(y.shape)}, expected two (B, 3, H, W)")
        if min(x.shape[-2:]) < SMALLEST_IMAGE:
            needs = f"VGG16 halves them four times and needs {SMALLEST_IMAGE} pixels a side"
            raise ValueError(f"LPIPS: images are {x.shape[-2]} x {x.shape[-1]}, {needs}")
        features = zip(self.net(self.scaling_layer(x)), self.net(self.scaling_layer(y)))
        return sum(getattr(self, f"lin{index}")(_unit(f), _unit(g)) for index, (f, g) in enumerate(features))


class _Scaling(nn.Module):
    """[-1, 1] -> ImageNet's mean and deviation, as LPIPS v0.1 has them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class _VGG16(nn.Module):
    """Features after relu1_2, 2_2, 3_3, 4_3, 5_3. A layer's name is its number in torchvision's `features`."""

    def __init__(self):
        super().__init__()
        number = 0
        for index, layers in enumerate(_SLICES, start=1):
            part = nn.Sequential()
            for layer in layers:
                for module in _vgg_layer(layer):
                    part.add_module(str(number), module)
                    number += 1
            setattr(self, f"slice{index}", part)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for part in (self.slice1, self.slice2, self.slice3, self.slice4, self.slice5):
            x = part(x)
            features.append(x)
        return features


def _vgg_layer(layer: str) -> list[nn.Module]:
    kind, *widths = layer.split()
    if kind == "pool":
        return [nn.MaxPool2d(2)]
    return [nn.Conv2d(int(widths[0]), int(widths[1]), 3, padding=1), nn.ReLU()]


class _Linear(nn.Module):
    """Weighted squared difference of unit features (B, C, h, w), averaged over the map: (B, 1, 1, 1)."""

    def __init__(self, width: int):
        super().__init__()
        # The published key is model.1: dropout, which never runs here, was model.0.
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))

    def forward(self, f: Tensor, g: Tensor) -> Tensor:
        difference = f - g
        weighted = difference * (difference * self.model[1].weight)  # its gradient takes the memory format of the features, a square's does not
        return weighted.sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)


def _unit(features: Tensor) -> Tensor:
    """Unit length over channels, in float32 at least. Where all channels are 0, vector_norm's gradient is 0, not NaN."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _existing(path: str | Path, wanted: str) -> Path:
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; wants {wanted}, downloaded by you from that project")
    return Path(path)


def _linear_keys(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    found = {key: value for key, value in state.items() if key.startswith("lin")}
    if not found:
        raise BadInput(f"{source}: holds no linear layers (lin0.model.1.weight, ...); wants {_WANTED[1]}")
    return found


def _perceptual_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our keys, which are the reference's, from any of the layouts in the field.

    torchvision: features.N.weight, and a classifier that LPIPS does not use. VA-VAE checkpoint: loss.perceptual_loss.*.
    The lpips package: net.slice*.*, lin*.*, and the latter once more as lins.*.
    """
    prefix = "loss.perceptual_loss."
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    slices = {key.split(".", 2)[2]: key for key in _shapes() if key.startswith("net.")}
    renamed = {}
    for key, value in state.items():
        if key.startswith("features."):
            number = key.removeprefix("features.")
            key = slices.get(number, key)
        if not key.startswith(("classifier.", "lins.")):
            renamed[key] = value
    return renamed


def _with_constants(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The shift and scale that files of the two projects leave out."""
    return {**{f"scaling_layer.{name}": value for name, value in _Scaling().named_buffers()}, **state}


def _shapes() -> dict[str, tuple[int, ...]]:
    """Every key that files hold, with its shape; no memory is used."""
    with torch.device("meta"):
        shapes = {f"net.{key}": tuple(value.shape) for key, value in _VGG16().state_dict().items()}
    return {**shapes, **{f"lin{index}.model.1.weight": (1, width, 1, 1) for index, width in enumerate(_WIDTHS)}}
