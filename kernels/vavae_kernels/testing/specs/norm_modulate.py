"""`norm_modulate`: adaLN before the first sub-layer and in the final layer."""

import torch

from ...ops.norm_modulate import norm_modulate, norm_modulate_reference
from ..spec import Dtypes, Inputs, Shape, Spec
from .gate_add_norm_modulate import SPEC as GATED


def _inputs(shape: Shape, dtypes: Dtypes, variant: str, device: torch.device) -> Inputs:
    inputs = GATED.inputs(shape, dtypes, variant, device)
    return {"x": inputs.pop("residual"), **{name: value for name, value in inputs.items() if name not in ("y", "gate")}}


def _bytes(shape: Shape, dtypes: Dtypes, variant: str) -> tuple[int, int]:
    """A row costs D (s + o) forward and D (2 s + o) backward."""
    elements = shape["B"] * shape["N"] * shape["D"]
    s, o = dtypes.stream.itemsize, dtypes.other.itemsize
    return elements * (s + o), elements * (2 * s + o)


SPEC = Spec(
    name="norm_modulate",
    function=norm_modulate,
    reference=norm_modulate_reference,
    inputs=_inputs,
    gradients=("x", "scale", "shift", "weight"),
    variants=GATED.variants,
    small=GATED.small,
    real=GATED.real,
    bytes=_bytes,
    registers=168,
    configs=GATED.configs,
)
