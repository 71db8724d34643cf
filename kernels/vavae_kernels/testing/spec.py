"""What an operator promises, in one record: `testing/specs/<op>.py` holds a `SPEC`, and every check and benchmark reads it.

A contributor adds an operator by writing `ops/<op>.py` and `testing/specs/<op>.py`; tests, offline compilation, the bench and
its report find it through `specs()`.
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .._launch import Config

Shape = Mapping[str, int]
Inputs = dict[str, Any]  # keyword arguments of the public function and of the reference


@dataclass(frozen=True)
class Dtypes:
    """Storage dtypes of a call. stream: the residual stream or the main tensor; other: what comes from a matrix product."""

    stream: torch.dtype
    other: torch.dtype


DTYPES: dict[str, Dtypes] = {
    "fp32": Dtypes(torch.float32, torch.float32),
    "bf16": Dtypes(torch.bfloat16, torch.bfloat16),
    "fp16": Dtypes(torch.float16, torch.float16),
    "mixed": Dtypes(torch.float32, torch.bfloat16),  # what autocast gives: an fp32 stream, bf16 from every matrix product
}


@dataclass(frozen=True)
class Spec:
    """name: the operator's. function, reference: called with `inputs(...)` as keywords; outputs a tensor or a tuple.

    inputs(shape, dtypes, variant, device) draws fresh tensors from torch's global generator, those of `gradients` requiring
    grad. Variants are flags of the operator (norm kind, with or without shift, …); the first is the published model's.
    small: shapes that the interpreter runs; real: those of XL/1 and B/1, for the bench and for offline compilation.
    bytes(shape, dtypes, variant) -> (forward, backward): least traffic with device memory, asserted against what launches touch.
    registers: the most that any kernel may use; stack and spills are 0 always. configs: launch configurations worth trying, by
    kernel, the shipped one first. peers: other libraries' versions by name, `peer(inputs) -> callable` or ImportError.
    """

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[[Shape, Dtypes, str, torch.device], Inputs]
    gradients: tuple[str, ...]
    small: Mapping[str, Shape]
    real: Mapping[str, Shape]
    bytes: Callable[[Shape, Dtypes, str], tuple[int, int]]
    variants: tuple[str, ...] = ("",)
    dtypes: tuple[str, ...] = ("mixed", "fp32", "bf16", "fp16")
    registers: int = 255
    flops: Callable[[Shape], int] | None = None
    configs: Mapping[str, tuple[Config, ...]] = field(default_factory=dict)
    peers: Mapping[str, Callable[[Inputs], Callable[[], Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.dtypes) - set(DTYPES)
        if unknown:
            raise ValueError(f"spec {self.name}: unknown dtypes {sorted(unknown)}; known: {', '.join(DTYPES)}")


def specs() -> dict[str, Spec]:
    """Every operator's spec by name, from the modules of `testing/specs`."""
    package = import_module(f"{__package__}.specs")
    modules = [import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__)]
    return {module.SPEC.name: module.SPEC for module in modules}
