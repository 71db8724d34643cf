"""What the metrics take: NumPy arrays or tensors, checked once at the door. Anything else is a `ValueError` of one line."""

import numpy as np
import torch
from torch import Tensor

from vavae_fast.errors import is_integer

Array = np.ndarray | Tensor


def to_tensor(value: Array, name: str, shape: str) -> Tensor:
    """`value` as a detached tensor of its own dtype; `shape` spells its dimensions, as in "N, D" or "N, ...". None may be empty."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        tensor = torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))
    elif isinstance(value, Tensor) and not value.is_complex():
        tensor = value.detach()
    else:
        found = f"NumPy {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name}: expected a NumPy array or a tensor of real numbers, got {found}")
    dims = shape.count(",") + 1
    if tensor.dim() < dims or (tensor.dim() > dims and not shape.endswith("...")):
        raise ValueError(f"{name}: expected shape ({shape}), got {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        raise ValueError(f"{name}: empty, shape {tuple(tensor.shape)}")
    return tensor


def finite_tensor(value: Array, name: str, shape: str) -> Tensor:
    """`to_tensor`, and no NaN or infinity among the values."""
    tensor = to_tensor(value, name, shape)
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; find where they arise, no metric survives them")
    return tensor


def integer(value: int, name: str, least: int, most: int | None = None) -> int:
    """`value` as a plain int from `least` to `most`, both allowed."""
    if not is_integer(value) or value < least or (most is not None and value > most):
        bounds = f"{least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: must be an integer, {bounds}, got {value!r}")
    return int(value)


def same_kind(result: Tensor, given: Array) -> Array:
    """`result` as a NumPy array when `given` is one: arrays in, arrays out."""
    return result.cpu().numpy() if isinstance(given, np.ndarray) else result
