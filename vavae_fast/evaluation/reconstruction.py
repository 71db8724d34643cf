"""How near a reconstruction is to its image: PSNR, and SSIM (Wang et al. 2004, eq. 13), one value an image, in fp64."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vavae_fast.errors import is_number
from vavae_fast.evaluation.inputs import Array, finite_tensor, same_kind

_RADIUS, _SIGMA = 5, 1.5  # the window: 11 x 11
_K1, _K2 = 0.01, 0.03
BORDERS = ("valid", "reflect")


def psnr(a: Array, b: Array, data_range: float | None = None) -> Array:
    """10 log10(data_range^2 / mse) in dB, of a and b (N, C, H, W) -> (N,); equal images give inf.

    data_range is largest minus smallest possible value: 255 for uint8, 1 for floats unless given (2 for [-1, 1]).
    `ValueError`: different shapes or dtypes, NaN or infinity, no range known for the dtype.
    """
    x, y, data_range = _pair(a, b, data_range)
    mse = (x - y).square().mean(dim=(1, 2, 3))
    return same_kind(10 * (data_range**2 / mse).log10(), a)


def ssim(a: Array, b: Array, data_range: float | None = None, border: str = "valid") -> Array:
    """Mean structural similarity of a and b (N, C, H, W) -> (N,), at most 1; 11 x 11 Gaussian window, sigma 1.5.

    border "valid": windows that lie inside the image, as Wang et al. and scikit-image (gaussian_weights, sigma 1.5,
    use_sample_covariance=False). "reflect": a window around every pixel of the mirrored image, as current torchmetrics.
    data_range and errors as in `psnr`; "valid" needs 11 pixels a side, "reflect" 6.
    """
    x, y, data_range = _pair(a, b, data_range)
    if border not in BORDERS:
        raise ValueError(f"border: must be one of {', '.join(BORDERS)}, got {border!r}")
    smallest = 2 * _RADIUS + 1 if border == "valid" else _RADIUS + 1
    if min(x.shape[2:]) < smallest:
        raise ValueError(f"ssim: border {border!r} needs {smallest} x {smallest} pixels or more, got {x.shape[2]} x {x.shape[3]}")
    if border == "reflect":
        x, y = (F.pad(z, [_RADIUS] * 4, mode="reflect") for z in (x, y))
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    variances = (_window_mean(x * x) - mean_x**2).clamp(min=0) + (_window_mean(y * y) - mean_y**2).clamp(min=0)
    covariance = _window_mean(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    return same_kind(similarity.mean(dim=(1, 2, 3)), a)


def _window_mean(x: Tensor) -> Tensor:
    """Gaussian-weighted mean in every window inside x (N, C, H, W): rows, then columns."""
    offset = torch.arange(-_RADIUS, _RADIUS + 1, dtype=x.dtype, device=x.device)
    weight = (-(offset**2) / (2 * _SIGMA**2)).softmax(dim=0)
    planes = x.flatten(0, 1).unsqueeze(1)
    planes = F.conv2d(F.conv2d(planes, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))
    return planes.unflatten(0, x.shape[:2]).squeeze(2)


def _pair(a: Array, b: Array, data_range: float | None) -> tuple[Tensor, Tensor, float]:
    x, y = finite_tensor(a, "a", "N, C, H, W"), finite_tensor(b, "b", "N, C, H, W")
    if x.shape != y.shape:
        raise ValueError(f"a and b: expected the same shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype:
        raise ValueError(f"a and b: expected the same dtype, got {x.dtype} and {y.dtype}; their value ranges differ")
    if data_range is None:
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise ValueError(f"data_range: no default for {x.dtype}; pass largest minus smallest possible value")
        data_range = 255.0 if x.dtype == torch.uint8 else 1.0
    if not is_number(data_range) or data_range <= 0:
        raise ValueError(f"data_range: must be a positive number, got {data_range!r}")
    return x.to(torch.float64), y.to(device=x.device, dtype=torch.float64), data_range
