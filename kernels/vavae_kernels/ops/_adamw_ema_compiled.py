"""The step of `AdamWEMA` as one kernel: its rows of addresses and settings for `csrc/adamw_ema.h`."""

import ctypes
import math
from array import array
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._extension import BuildError, library

_STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the codes of `with_storage`
_ROW = 8  # fields of an AdamwTensor


class Slot(NamedTuple):
    """What one parameter brings to a step, the shards that lie here: all in the parameter's shape, `step` ()."""

    param: Tensor
    grad: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    ema: Tensor | None
    bf16: Tensor | None


class _Settings(ctypes.Structure):
    """AdamwSettings."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "ema_decay", "log_beta1", "log_beta2")),
        *((name, ctypes.c_void_p) for name in ("lr_at", "ema_decay_at", "grad_scale", "found_inf")),
    ]


class CompiledStep:
    """csrc/adamw_ema on one device: the kernel on a GPU, its host build on the CPU. `BuildError` where it cannot be had."""

    def __init__(self, device: torch.device):
        self._device, self._library = device, library("adamw_ema", device)
        self._library.vavae_adamw_ema.argtypes = [
            ctypes.c_void_p,  # rows
            ctypes.c_int64,
            ctypes.POINTER(_Settings),
            ctypes.c_int,  # storage of the parameters
            ctypes.c_int,  # and of the gradients
            ctypes.c_int,  # device
            ctypes.c_void_p,  # stream
        ]
        if device.type == "cuda":
            self._library.vavae_error.restype = ctypes.c_char_p
            with torch.cuda.device(device):
                error = self._library.vavae_adamw_ema_prepare(device.index)
            if error:
                raise BuildError(f"the kernel cannot be loaded on {device}: {self._describe(error)}")

    def _describe(self, error: int) -> str:
        return self._library.vavae_error(error).decode() if self._device.type == "cuda" else f"error {error}"

    def takes(self, slot: Slot) -> bool:
        """Whether the kernel can walk these tensors: its dtypes, state in fp32, everything here, dense and in the parameter's order."""
        param, grad, exp_avg, exp_avg_sq, step, ema, bf16 = slot
        if param.dtype not in _STORAGE or (grad is not None and grad.dtype not in _STORAGE):
            return False
        for t in (step, exp_avg, exp_avg_sq, ema):
            if t is not None and t.dtype != torch.float32:
                return False
        for t in slot:
            if t is not None and t.device != self._device:
                return False
        return in_one_order(param, [t for t in (grad, exp_avg, exp_avg_sq, ema, bf16) if t is not None])

    def __call__(self, slots: list[Slot], group: Mapping[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """One step of `slots` with the settings of `group`; on a GPU in order on the current stream, waiting for nothing.

        found_inf and grad_scale: fp32 tensors of one element on the device; lr and ema_decay of `group` a number or such a tensor.
        """
        rows: dict[tuple[int, int], array] = {}
        written: list[Tensor] = []
        for slot in slots:
            if slot.grad is None and slot.ema is None and slot.bf16 is None:
                continue
            codes = _STORAGE[slot.param.dtype], _STORAGE[(slot.param if slot.grad is None else slot.grad).dtype]
            rows.setdefault(codes, array("q")).extend(_row(slot))
            written += [t for t in (slot.param, slot.ema, slot.bf16) if t is not None]
        settings = _settings(group, found_inf, grad_scale)
        for (param_code, grad_code), table in rows.items():
            self._launch(table, settings, param_code, grad_code)
        torch.autograd.graph.increment_version(written)

    def _launch(self, rows: array, settings: _Settings, param_code: int, grad_code: int) -> None:
        gpu = self._device.type == "cuda"
        with torch.cuda.device(self._device) if gpu else nullcontext():
            stream = torch.cuda.current_stream(self._device).cuda_stream if gpu else 0
            address, fields = rows.buffer_info()
            error = self._library.vavae_adamw_ema(
                address, fields // _ROW, ctypes.byref(settings), param_code, grad_code, self._device.index or 0, stream
            )
        if error:
            raise RuntimeError(f"AdamWEMA: the kernel could not be launched on {self._device}: {self._describe(error)}")


def _row(slot: Slot) -> tuple[int, ...]:
    """The fields of an AdamwTensor: addresses, 0 for what is not there, and the number of elements."""
    param, grad, exp_avg, exp_avg_sq, step, ema, bf16 = slot
    return (
        param.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        0 if ema is None else ema.data_ptr(),
        0 if bf16 is None else bf16.data_ptr(),
        0 if grad is None else step.data_ptr(),
        param.numel(),
    )


def _settings(group: Mapping[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> _Settings:
    beta1, beta2 = group["betas"]
    lr, lr_at = _number_or_address(group["lr"])
    ema_decay, ema_decay_at = _number_or_address(group["ema_decay"])
    return _Settings(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        ema_decay=ema_decay,
        log_beta1=math.log(beta1) if beta1 else -math.inf,
        log_beta2=math.log(beta2) if beta2 else -math.inf,
        lr_at=lr_at,
        ema_decay_at=ema_decay_at,
        grad_scale=_address(grad_scale),
        found_inf=_address(found_inf),
    )


def _number_or_address(value: float | Tensor | None) -> tuple[float, int | None]:
    """A number for the kernel's arguments, or where on the device it lies. None, an average that nobody keeps, is 0."""
    return (0.0, value.data_ptr()) if isinstance(value, Tensor) else (value or 0.0, None)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def in_one_order(param: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether `param` fills its memory without gaps or overlaps, and element i in memory is the same one in all of `others`."""
    dense = param.is_contiguous()
    for t in others:
        if t.shape != param.shape or not (t.is_contiguous() if dense else t.stride() == param.stride()):
            return False
    return dense or _fills_its_memory(param)


def _fills_its_memory(t: Tensor) -> bool:
    """Contiguous, once its axes are sorted."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True
