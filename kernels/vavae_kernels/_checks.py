"""What every public function checks at its door, once: tensors, floating point, one device, shapes, numbers."""

import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # narrower ones PyTorch does not promote
# Asked once: Dynamo of PyTorch 2.11 cannot trace the question.
_HAVE_AUTOCAST = frozenset(d for d in ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia", "maia") if torch.amp.is_autocast_available(d))


def check(condition: bool, op: str, message: str) -> None:
    """Raise ValueError(f"{op}: {message}") unless `condition`."""
    if not condition:
        raise ValueError(f"{op}: {message}")


def is_integer(value: Any) -> bool:
    """A whole number of Python or NumPy; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite real number of Python or NumPy; a tensor is none."""
    if is_integer(value):
        return abs(int(value)) <= sys.float_info.max
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_number(op: str, name: str, value: Any) -> None:
    """`value` is a finite number."""
    check(is_number(value), op, f"{name} must be a finite number, got {value!r}")


def check_eps(op: str, eps: Any) -> None:
    """What keeps a norm from a division by zero: a finite number, 0 or more."""
    check(is_number(eps) and eps >= 0, op, f"eps must be a finite number, 0 or more, got {eps!r}")


def check_out_dtype(op: str, dtype: Any) -> None:
    """None, for the default, or a floating dtype."""
    known = dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    check(known, op, f"out_dtype must be a floating dtype or None, got {dtype!r}")


def check_tensors(op: str, *, optional: Mapping[str, Tensor | None] | None = None, **tensors: Tensor) -> None:
    """All are plain, dense, of `DTYPES` and on one device; only those of `optional` may be None, for an argument left out."""
    optional = optional or {}
    device = None
    for name, tensor in {**tensors, **optional}.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(f"{op}: {name} is a DTensor; pass its local shard, {name}.to_local()")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}; float64, float32, bfloat16 and float16 are taken")
        if tensor.layout != torch.strided:
            raise ValueError(f"{op}: {name} must be dense, got layout {tensor.layout}; pass {name}.to_dense()")
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
    return torch.autocast(device, enabled=False) if device in _HAVE_AUTOCAST else nullcontext()


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype given, and at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
