"""Which implementation of an operator runs, and how its launchers become operators of PyTorch."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _compat, _launch

IMPLEMENTATIONS = ("auto", "triton", "torch")
NAMESPACE = "vavae_kernels"
LAUNCHERS: dict[str, Callable[..., Any]] = {}  # of every registered operator, by name: what the CUDA key runs
STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what kernels load and store; their arithmetic is fp32
_auto = "auto"


@contextmanager
def auto_means(impl: str) -> Iterator[None]:
    """Inside, impl="auto" means `impl`: how a whole model runs on its kernels in the interpreter, or on the references of a GPU."""
    global _auto
    before, _auto = _auto, impl
    try:
        yield
    finally:
        _auto = before


def use_triton(op: str, impl: str, *tensors: Tensor | None, reason: str | None = None) -> bool:
    """Whether operator `op` runs its Triton kernel on `tensors`, else its reference.

    "auto" takes the kernel for CUDA tensors of fp32, bf16 and fp16. "triton" insists on it, also on CPU tensors under
    TRITON_INTERPRET=1, and raises ValueError where it cannot run; so does an unknown `impl`. `reason`, if there is one, says
    why the kernel does not take this call, whatever its tensors' dtypes and device: "takes this, got that".
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    impl = _auto if impl == "auto" else impl
    if impl == "torch":
        return False
    given = [t for t in tensors if t is not None]
    odd_dtypes = [t.dtype for t in given if t.dtype not in STORAGE_DTYPES]
    on_gpu = all(t.is_cuda for t in given)
    if impl == "auto":
        if on_gpu and _compat.TRITON_VERSION is None and not torch.compiler.is_compiling():
            _say_triton_is_missing()
        return on_gpu and _compat.TRITON_VERSION is not None and not odd_dtypes and reason is None
    if _compat.TRITON_VERSION is None:
        raise ValueError(f"{op}: impl='triton', but Triton is not installed: pip install triton, or impl='auto'")
    if odd_dtypes:
        raise ValueError(f"{op}: the Triton kernel takes float32, bfloat16 and float16, got {odd_dtypes[0]}; use impl='torch'")
    if reason is not None:
        raise ValueError(f"{op}: the Triton kernel {reason}; use impl='torch'")
    if not on_gpu and not _compat.INTERPRETED and not _launch.recording():
        raise ValueError(f"{op}: impl='triton' needs CUDA tensors, or TRITON_INTERPRET=1 for CPU tensors; use impl='auto'")
    return True


def _say_triton_is_missing() -> None:
    """The default filter of `warnings` shows it once."""
    warnings.warn("vavae_kernels: Triton is not installed, operators run their PyTorch reference: pip install triton", stacklevel=4)


def register(name: str, schema: str, launcher: Callable, fake: Callable) -> Callable[..., Any]:
    """Define the operator vavae_kernels::<name> and return its overload.

    `fake` gives outputs of the right shape, dtype and strides. The operator is opaque to Inductor on purpose: tracing would
    hand Python floats to Triton as fp64. Autograd is the `autograd.Function` around it, at a third of the overhead of
    `register_autograd`. CPU tensors reach the launcher too: only the interpreter can run it there, and `use_triton` says so.
    While launches are only recorded, fake tensors reach it as well: real shapes then cost no memory.
    """
    LAUNCHERS[name] = launcher
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CUDA", "CPU"):
        torch.library.impl(qualified, key, launcher)
    torch.library.register_fake(qualified, lambda *arguments: (launcher if _launch.recording() else fake)(*arguments))
    return getattr(getattr(torch.ops, NAMESPACE), name).default
