"""Train the demo's stand-ins in seconds on one CPU thread.

The encoder learns without labels, from two tasks: tell which two views show the same image (SimCLR, Chen et al. 2020,
eq. 1), and fill in hidden patches (He et al. 2022); a recipe may leave one out. A supervised encoder and the perceptual
network learn to classify, as VGG did.
Every result is a function of (images, seed, steps, batch); the global random state stays as it was.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae_fast.errors import require
from vavae_fast.models.standins import StandInEncoder, StandInPerceptual

Progress = Callable[[int, int, Tensor], None]  # (steps done, steps, loss): the loss is a () tensor, still on its device


TASKS = ("views", "patches")


@dataclass(frozen=True)
class EncoderRecipe:
    """The shape of an encoder, and which of `TASKS` it learns from; a supervised one learns from labels instead."""

    patch_size: int = 4
    dim: int = 64
    depth: int = 2
    heads: int = 4
    tasks: tuple[str, ...] = TASKS
    lr: float = 2e-3

    def __post_init__(self):
        require(bool(self.tasks) and set(self.tasks) <= set(TASKS), "tasks", self.tasks, f"one or more of {', '.join(TASKS)}")

    def encoder(self, image_size: int, grid: int) -> StandInEncoder:
        """Initialised from the global generator."""
        return StandInEncoder(image_size, self.patch_size, self.dim, self.depth, self.heads, grid)


def train_encoder(
    images: Tensor, seed: int, steps: int = 250, batch: int = 64, device: str = "cpu", grid: int = 2, progress: Progress | None = None,
    recipe: EncoderRecipe = EncoderRecipe(),
) -> StandInEncoder:  # fmt: skip
    """images (N, 3, S, S) uint8, no labels -> a frozen encoder, standardised on `images`."""
    pixels = _pixels(images, batch, device)
    with _initialised_from(seed):
        encoder = recipe.encoder(images.shape[-1], grid)
        heads = _Heads(encoder.feature_dim, encoder.patch.kernel_size[0])
    network = nn.ModuleDict({"encoder": encoder, "heads": heads}).to(device)

    def loss(generator: torch.Generator) -> Tensor:
        views = pixels[_draw(len(pixels), batch, generator).to(device)].repeat(2, 1, 1, 1)  # rows i and i + batch show one image
        views = jitter(affine(views, generator), generator)
        found = []
        if "views" in recipe.tasks:
            found.append(contrastive_loss(heads.embed(encoder.tokens(views).mean(1))))
        if "patches" in recipe.tasks:
            views = views[: batch // 2]  # the cheaper task learns from fewer
            hidden = (torch.rand(len(views), encoder.side**2, generator=generator) < 0.75).to(device)
            found.append(heads.fill_in_loss(encoder.tokens(views, hidden, heads.mask_token), views, hidden))
        return sum(found)

    _descend(network, loss, seed, steps, recipe.lr, progress)
    return encoder.standardise(pixels)


def train_supervised_encoder(
    images: Tensor, labels: Tensor, seed: int, steps: int = 250, batch: int = 64, device: str = "cpu", grid: int = 2,
    progress: Progress | None = None, recipe: EncoderRecipe = EncoderRecipe(),
) -> StandInEncoder:  # fmt: skip
    """images (N, 3, S, S) uint8, labels (N,) int64 -> the same encoder, which learned to classify by its mean token."""
    require(labels.shape == images.shape[:1], "labels", tuple(labels.shape), f"of shape ({len(images)},), one a image")
    pixels, labels = _pixels(images, batch, device), labels.to(device)
    with _initialised_from(seed):
        encoder = recipe.encoder(images.shape[-1], grid)
        head = nn.Linear(encoder.feature_dim, int(labels.max()) + 1)
    network = nn.ModuleDict({"encoder": encoder, "head": head}).to(device)

    def loss(generator: torch.Generator) -> Tensor:
        index = _draw(len(pixels), batch, generator).to(device)
        views = jitter(affine(pixels[index], generator), generator)
        return F.cross_entropy(head(encoder.tokens(views).mean(1)), labels[index])

    _descend(network, loss, seed, steps, recipe.lr, progress)
    return encoder.standardise(pixels)


def random_encoder(
    images: Tensor, seed: int, device: str = "cpu", grid: int = 2, recipe: EncoderRecipe = EncoderRecipe()
) -> StandInEncoder:  # fmt: skip
    """The control: the encoder of `train_encoder` before its first step, standardised on `images` in the same way."""
    with _initialised_from(seed):
        encoder = recipe.encoder(images.shape[-1], grid)
    return encoder.to(device).standardise(_pixels(images, 1, device))


def train_perceptual(
    images: Tensor, labels: Tensor, seed: int, steps: int = 250, batch: int = 64, device: str = "cpu", progress: Progress | None = None,
    widths: tuple[int, ...] = (16, 32, 64),
) -> StandInPerceptual:  # fmt: skip
    """images (N, 3, S, S) uint8, labels (N,) int64 -> a frozen classifier whose features measure distances."""
    require(labels.shape == images.shape[:1], "labels", tuple(labels.shape), f"of shape ({len(images)},), one a image")
    pixels, labels = _pixels(images, batch, device), labels.to(device)
    with _initialised_from(seed):
        network = StandInPerceptual(widths, int(labels.max()) + 1)
    network.to(device)

    def loss(generator: torch.Generator) -> Tensor:
        index = _draw(len(pixels), batch, generator).to(device)
        return F.cross_entropy(network.logits(affine(pixels[index], generator)), labels[index])

    _descend(network, loss, seed, steps, lr=2e-3, progress=progress)
    return network.requires_grad_(False).eval()


def contrastive_loss(embedding: Tensor, temperature: float = 0.2) -> Tensor:
    """NT-Xent. embedding (2B, D), rows i and i + B of one image -> (): cross-entropy of finding the partner among 2B - 1 others."""
    unit = F.normalize(embedding, dim=1)
    similarity = (unit @ unit.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(unit), device=unit.device).roll(len(unit) // 2)
    return F.cross_entropy(similarity, partner)


class _Heads(nn.Module):
    """What only training needs: the contrastive embedding, the mask token and the pixels it must become."""

    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.embed = nn.Sequential(nn.Linear(dim, 2 * dim), nn.BatchNorm1d(2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.to_pixels = nn.Linear(dim, 3 * patch_size**2)

    def fill_in_loss(self, tokens: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error of the hidden patches' pixels. tokens (B, N, D), images (B, 3, S, S), hidden (B, N) bool."""
        target = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        error = (self.to_pixels(tokens) - target).square().mean(2)
        return (error * hidden).sum() / hidden.sum().clamp_min(1)


def affine(images: Tensor, generator: torch.Generator, angle: float = 15.0, scale: float = 0.15, shift: float = 0.125) -> Tensor:
    """A small random rotation (degrees), zoom, shear and shift (parts of the side) of each image (B, C, S, S); edges repeat."""
    turn, zoom, shear, right, down = (torch.rand(5, len(images), generator=generator) * 2 - 1).to(images.device)
    turn, zoom = turn * math.radians(angle), 1 + zoom * scale
    shear, right, down = shear * math.radians(angle), right * 2 * shift, down * 2 * shift
    matrix = torch.stack(
        (zoom * turn.cos(), -zoom * (turn + shear).sin(), right, zoom * turn.sin(), zoom * (turn + shear).cos(), down), dim=1
    )
    grid = F.affine_grid(matrix.unflatten(1, (2, 3)), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast 0.6 to 1.4 about -1 (black) and noise of 0.1: images (B, C, S, S) in [-1, 1] -> the same, not clamped."""
    gain = (0.6 + 0.8 * torch.rand(len(images), 1, 1, 1, generator=generator)).to(images.device)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return (images + 1) * gain - 1 + 0.1 * noise


def _pixels(images: Tensor, batch: int, device: str) -> Tensor:
    """uint8 (N, 3, S, S) -> float in [-1, 1] on `device`."""
    require(images.dtype == torch.uint8, "images", str(images.dtype), "uint8")
    require(images.ndim == 4 and images.shape[1] == 3, "images", tuple(images.shape), "of shape (N, 3, S, S)")
    require(len(images) >= batch, "images", len(images), f"at least one batch ({batch})")
    return images.to(device).float() / 127.5 - 1


def _draw(count: int, batch: int, generator: torch.Generator) -> Tensor:
    """`batch` different indices below `count`: the same image twice would be its own negative."""
    return torch.randperm(count, generator=generator)[:batch]


def _descend(network: nn.Module, loss_of, seed: int, steps: int, lr: float, progress: Progress | None) -> None:
    """AdamW with a linear warm-up over a tenth of the steps and a cosine to 0; random numbers come from one CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    warmup = max(1, steps // 10)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        loss = loss_of(generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, steps, loss.detach())


@contextmanager
def _initialised_from(seed: int):
    """Parameters made inside are a function of `seed`; the global CPU generator is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
