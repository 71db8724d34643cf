"""The Inception network of FID: TensorFlow's graph of 2015-12-05 (Szegedy et al. 2015, arXiv 1512.00567), in PyTorch.

State-dict keys are those of the port that pytorch-fid and torch-fidelity share (`KNOWN_FILE`). It differs from
torchvision's network in four places: 1,008 classes, average pools that do not count their padding, a max pool in the
last block, and TensorFlow 1's bilinear resize. Weights come from a local file, never from the network.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vavae_fast import artifacts
from vavae_fast.errors import BadInput
from vavae_fast.torch_files import read_torch

KNOWN_FILE = "pt_inception-2015-12-05-6726825d.pth"
KNOWN_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_SIZE = 299
Pool = Callable[[Tensor], Tensor]
_SPATIAL_CHANNELS = 7  # of Mixed_6d.branch1x1: 17 x 17 x 7 = 2,023 values, about as many as pool_3 has


class InceptionFeatures(NamedTuple):
    """What one batch of N images gives, fp32."""

    pool: Tensor  # (N, 2048): pool_3, for FID, precision and recall
    spatial: Tensor  # (N, 2023): the first 7 channels of Mixed_6d.branch1x1 in NHWC order, for sFID (Nash et al. 2021)
    logits: Tensor  # (N, 1008), without the bias, for the inception score


def load_inception(path: Path | str | None, device: torch.device | str = "cpu") -> "Inception":
    """The network with the weights in `path`, in evaluation mode on `device`; `.sha256` and `.recognised` say which they are.

    `BadInput` names the file and the flag when there is no such file, or when it is not these weights.
    """
    cure = f"pass --inception PATH with a copy of {KNOWN_FILE}"
    if path is None:
        raise BadInput(f"Inception weights: none given; FID, sFID, IS, precision and recall need them: {cure}")
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file, so there are no Inception weights; {cure}")
    state = read_torch(path, cure)
    network = Inception()
    wanted, found = _shapes(network.state_dict()), _shapes(state) if isinstance(state, dict) else {}
    wrong = sorted(wanted.items() ^ found.items())
    if wrong:
        key = wrong[0][0]
        differing = len({name for name, _ in wrong})
        expected, got = wanted.get(key, "nothing"), found.get(key, "nothing")
        raise BadInput(f"{path}: not these Inception weights, {differing} keys differ, first {key}: expected {expected}, got {got}; {cure}")
    network.load_state_dict(state, strict=False)  # every key was compared above; batch counters, which old files lack, do not matter
    network.sha256 = artifacts.sha256(path)
    return network.to(device).eval().requires_grad_(False)


def _shapes(state: dict) -> dict[str, tuple]:
    return {key: tuple(getattr(value, "shape", ())) for key, value in state.items() if not str(key).endswith("num_batches_tracked")}


def resize_tensorflow1(x: Tensor, size: int = _SIZE) -> Tensor:
    """TensorFlow 1's `resize_bilinear` with default flags: x (N, C, H, W) float -> (N, C, size, size).

    Pixel i of the output reads position i * H / size: no half-pixel shift, no antialiasing.
    """

    def positions(n: int) -> tuple[Tensor, Tensor, Tensor]:
        position = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = position.to(torch.int64)
        return low, (low + 1).clamp(max=n - 1), (position - low).to(x.dtype)

    top, bottom, down = positions(x.shape[2])
    left, right, across = positions(x.shape[3])
    x = x[..., left] + (x[..., right] - x[..., left]) * across  # not torch.lerp: its rounding is another
    return x[..., top, :] + (x[..., bottom, :] - x[..., top, :]) * down[:, None]


@contextmanager
def full_fp32() -> Iterator[None]:
    """Matrix products and convolutions in IEEE fp32 within: no TF32, whatever the program has set outside."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


class ConvNorm(nn.Module):
    """Convolution, batch normalisation with its running moments, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, same: bool = True):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else 0
        self.conv = nn.Conv2d(c_in, c_out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches, concatenated along channels; the last one, `branch_pool` or a bare pool, starts with a pool.

    `branches` maps a name to its steps (c_out, kernel). One step is the module `name`; several are name_1, name_2, ...;
    a tuple of steps in a step's place is a fork, name_2a and name_2b, whose outputs are concatenated. With `stride` 2 the
    last step of every branch halves the size, without padding.
    """

    def __init__(self, c_in: int, branches: dict[str, list], pool: Pool, stride: int = 1):
        super().__init__()
        self.pool = pool
        self.branches = {name: self._branch(c_in, name, steps, stride) for name, steps in branches.items()}

    def _branch(self, c_in: int, name: str, steps: list, stride: int) -> list[list[str]]:
        stages = []
        for i, step in enumerate(steps, start=1):
            forks = step if isinstance(step[0], tuple) else (step,)
            halve = stride == 2 and i == len(steps)
            stages.append([])
            for letter, (c_out, kernel) in zip("ab" if len(forks) > 1 else ("",), forks):
                key = f"{name}_{i}{letter}" if len(steps) > 1 else name
                self.add_module(key, ConvNorm(c_in, c_out, kernel, stride if halve else 1, same=not halve))
                stages[-1].append(key)
            c_in = c_out
        return stages

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for name, stages in self.branches.items():
            y = self.pool(x) if name == "branch_pool" else x
            for keys in stages:
                y = torch.cat([self.get_submodule(key)(y) for key in keys], dim=1)
            outputs.append(y)
        if "branch_pool" not in self.branches:
            outputs.append(self.pool(x))
        return torch.cat(outputs, dim=1)


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


def _mixed_35(c_in: int, pooled: int) -> Mixed:
    branches = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pooled, 1)],
    }
    return Mixed(c_in, branches, _average)


def _mixed_17(c: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    branches = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(c, 1), (c, row), (192, column)],
        "branch7x7dbl": [(c, 1), (c, column), (c, row), (c, column), (192, row)],
        "branch_pool": [(192, 1)],
    }
    return Mixed(768, branches, _average)


def _mixed_8(c_in: int, pool: Pool) -> Mixed:
    fork = ((384, (1, 3)), (384, (3, 1)))
    branches = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), fork],
        "branch3x3dbl": [(448, 1), (384, 3), fork],
        "branch_pool": [(192, 1)],
    }
    return Mixed(c_in, branches, pool)


class Inception(nn.Module):
    """uint8 images (N, 3, H, W), on any device -> `InceptionFeatures` on its own. Weights come with `load_inception`."""

    sha256: str | None = None  # of the file the weights came from

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, same=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, same=False)
        self.Mixed_5b = _mixed_35(192, 32)
        self.Mixed_5c = _mixed_35(256, 64)
        self.Mixed_5d = _mixed_35(288, 64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, _halve, stride=2)
        self.Mixed_6b = _mixed_17(128)
        self.Mixed_6c = _mixed_17(160)
        self.Mixed_6d = _mixed_17(160)
        self.Mixed_6e = _mixed_17(192)
        self.Mixed_7a = Mixed(
            768, {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]}, _halve, stride=2
        )
        self.Mixed_7b = _mixed_8(1280, _average)
        self.Mixed_7c = _mixed_8(2048, _max)  # the graph's own slip, kept: FID is defined by it
        self.fc = nn.Linear(2048, 1008)

    @property
    def recognised(self) -> bool:
        """Whether the weights are the ones that published FIDs use."""
        return self.sha256 == KNOWN_SHA256

    @torch.inference_mode()
    def forward(self, images: Tensor) -> InceptionFeatures:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        weight = self.fc.weight
        with full_fp32(), torch.autocast(weight.device.type, enabled=False):
            return self._features(images.to(weight.device).to(weight.dtype))

    def _features(self, x: Tensor) -> InceptionFeatures:
        x = (resize_tensorflow1(x) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x)))  # (N, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halve(x))))  # (N, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (N, 768, 17, 17)
        spatial = self.Mixed_6d.branch1x1(x)[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))  # (N, 1280, 8, 8)
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))
        return InceptionFeatures(pool, spatial, pool @ self.fc.weight.mT)
