"""What every public function checks at its door, once: tensors, floating point, one device, shapes."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def check(condition: bool, op: str, message: str) -> None:
    """Raise ValueError(f"{op}: {message}") unless `condition`."""
    if not condition:
        raise ValueError(f"{op}: {message}")


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """All given tensors are plain, floating point and on one device. None stands for an argument left out."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(f"{op}: {name} is a DTensor; pass its local shard, {name}.to_local()")
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
        device = tensor.device if device is None else device
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the tensors before it on {device}")


def check_shape(op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """`tensor` has exactly `shape`, or was left out."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def check_no_grad(op: str, **tensors: Tensor | None) -> None:
    """The operator has no gradient for these, so asking for one is an error and not a silent zero."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} requires grad, but the operator gives it no gradient; pass {name}.detach()")


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Matrix products inside run in the dtype of their operands: an operator computes the same whatever stands around it."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype given, and at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
