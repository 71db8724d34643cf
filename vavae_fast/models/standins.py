"""Two small networks that stand in where the paper uses a foundation model (section 3.2) and LPIPS, so that the demo downloads nothing.

`StandInEncoder` takes the place of DINOv2: a ViT whose tokens the VF loss aligns latents with. `StandInPerceptual` takes
the place of VGG in LPIPS (Zhang et al. 2018, eq. 1, with equal weights for all channels). `training/standins.py` trains both.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vavae_fast.artifacts import replacing
from vavae_fast.errors import BadInput, require
from vavae_fast.models.weights import load_strict

MOST = 1 << 16  # what any number of a stand-in's arguments may be: of blocks, channels, pixels


class StandInEncoder(nn.Module):
    """A small ViT, frozen: images (B, 3, S, S) in [-1, 1] -> features (B, F, g, g), each channel of mean 0 and variance 1.

    Tokens are averaged down to the `grid` x `grid` of the latents. The statistics are buffers that `standardise` fills:
    raw features share a large constant direction, which would satisfy a cosine loss without any structure.

    Positions start at 0.5, not the usual 0.02: with 16 tokens and a few hundred steps, tokens that begin alike stay alike
    (digits, 250 steps: a linear probe on the mean token reads 94 % of held-out classes instead of 77 %).
    """

    def __init__(self, image_size: int = 16, patch_size: int = 4, dim: int = 64, depth: int = 2, heads: int = 4, grid: int = 2):
        super().__init__()
        require(image_size % patch_size == 0, "image_size", image_size, f"a multiple of patch_size ({patch_size})")
        require(dim % heads == 0, "dim", dim, f"a multiple of heads ({heads})")
        side = image_size // patch_size
        require(side % grid == 0, "grid", grid, f"a divisor of the {side} x {side} token grid")
        self.arguments = {"image_size": image_size, "patch_size": patch_size, "dim": dim, "depth": depth, "heads": heads, "grid": grid}
        self.image_size, self.side, self.grid, self.feature_dim = image_size, side, grid, dim
        self.patch = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.position = nn.Parameter(0.5 * torch.randn(1, side * side, dim))
        self.blocks = nn.ModuleList(_Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.register_buffer("mean", torch.zeros(1, dim, 1, 1))
        self.register_buffer("std", torch.ones(1, dim, 1, 1))

    def tokens(self, images: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """images (B, 3, S, S) -> tokens (B, N, F), with gradient; where masked (B, N) is true the patch is `mask_token` (F,)."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images: expected (B, 3, {self.image_size}, {self.image_size}), got {tuple(images.shape)}")
        x = self.patch(images).flatten(2).transpose(1, 2)
        if masked is not None:
            x = torch.where(masked[..., None], mask_token, x)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return (self._pooled(images) - self.mean) / self.std

    @torch.no_grad()
    def standardise(self, images: Tensor, batch: int = 256) -> "StandInEncoder":
        """Set the statistics from images (N, 3, S, S) in [-1, 1] and freeze the weights."""
        features = torch.cat([self._pooled(part) for part in images.split(batch)]).double()
        std, mean = torch.std_mean(features, dim=(0, 2, 3), keepdim=True, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(1e-6))
        return self.requires_grad_(False).eval()

    def _pooled(self, images: Tensor) -> Tensor:
        x = self.tokens(images).transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.avg_pool2d(x, self.side // self.grid)


class _Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, N, D)
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class StandInPerceptual(nn.Module):
    """Distance in the features of a small classifier: x, y (B, 3, S, S) in [-1, 1] -> (B, 1, 1, 1), with gradients to both.

    LPIPS with unit weights: sum over the stages of mean over places of |f(x) - f(y)|^2, f of unit length across channels.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), num_classes: int = 10):
        super().__init__()
        self.arguments = {"widths": list(widths), "num_classes": num_classes}
        inputs = (3, *widths[:-1])
        self.stages = nn.ModuleList(_stage(i, o, stride=1 if n == 0 else 2) for n, (i, o) in enumerate(zip(inputs, widths)))
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, S, S) -> one (B, C_i, S_i, S_i) a stage, after the ReLU; every stage but the first halves S."""
        features, x = [], images
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features

    def logits(self, images: Tensor) -> Tensor:
        """images (B, 3, S, S) -> (B, num_classes): what the features are trained for."""
        return self.head(self.features(images)[-1].mean(dim=(2, 3)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        of_x, of_y = self.features(x), self.features(y)
        return sum((_unit(a) - _unit(b)).square().sum(1, keepdim=True).mean((2, 3), keepdim=True) for a, b in zip(of_x, of_y))


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.GroupNorm(outputs // 8, outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def _unit(features: Tensor) -> Tensor:
    """Unit length across channels; the small constant keeps the gradient finite where every channel is 0."""
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-8)


_KINDS = {kind.__name__: kind for kind in (StandInEncoder, StandInPerceptual)}


def save_standin(network: StandInEncoder | StandInPerceptual, path: Path) -> None:
    """Weights and statistics as safetensors; the constructor's arguments are in the metadata."""
    with replacing(path) as temporary:
        metadata = {"kind": type(network).__name__, "arguments": json.dumps(network.arguments)}
        save_file(network.state_dict(), temporary, metadata)


def load_standin(path: Path) -> StandInEncoder | StandInPerceptual:
    """The frozen network that `save_standin` wrote; `BadInput` names the file and what is wrong with it."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error}); write it again") from None
    if metadata.get("kind") not in _KINDS or "arguments" not in metadata:
        raise BadInput(f"{path}: metadata 'kind' is {metadata.get('kind')!r}, expected one of {', '.join(_KINDS)} with 'arguments'")
    kind = _KINDS[metadata["kind"]]
    try:
        arguments = dict(json.loads(metadata["arguments"]))
        if any(type(value) is int and value > MOST for value in arguments.values()):
            raise ValueError(f"over {MOST}")
        with torch.device("meta"):
            skeleton = kind(**arguments)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise BadInput(f"{path}: its metadata 'arguments' make no {metadata['kind']} ({str(error).splitlines()[0][:160]}); write it again") from None
    load_strict(skeleton, state, path)  # only compares: no memory is asked for before every shape fits
    network = kind(**arguments)
    load_strict(network, state, path)
    return network.requires_grad_(False).eval()
