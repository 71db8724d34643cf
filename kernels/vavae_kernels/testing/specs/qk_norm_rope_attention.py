"""`qk_norm_rope_attention` as training calls it: the prologue's kernels, and PyTorch's attention."""

import torch

from ...ops.qk_norm_rope_attention import qk_norm_rope_attention, qk_norm_rope_attention_reference
from ..spec import Dtypes, Inputs, Shape, Spec
from .qk_norm_rope import AFFINE, packed_inputs


def flops(shape: Shape) -> int:
    """Of both products, a multiplication and an addition counted apart."""
    return 4 * shape["B"] * shape["H"] * shape["N"] ** 2 * shape["D"]


def _inputs(shape: Shape, dtypes: Dtypes, variant: str, device: torch.device) -> Inputs:
    """The norms' weights have qkv's dtype: q and k are rounded to it on their way to a library's attention, so that gradients of
    fp32 weights would carry its error, as in any model that calls one."""
    inputs = packed_inputs(shape, dtypes, variant, device)
    affine = {name: inputs[name].detach().to(dtypes.other).requires_grad_() for name in AFFINE if inputs.get(name) is not None}
    return inputs | affine


def _bytes(shape: Shape, dtypes: Dtypes, variant: str) -> tuple[int, int]:
    """U = q once. Forward: prologue 4 U, attention q, k, v and its output. Backward: attention those, its output's and their
    cotangents; prologue dq, dk, dv and dqkv, with a norm q and k too."""
    unit = shape["B"] * shape["N"] * shape["H"] * shape["D"] * dtypes.other.itemsize
    return 8 * unit, (14 if variant == "rope" else 16) * unit


SPEC = Spec(
    name="qk_norm_rope_attention",
    function=qk_norm_rope_attention,
    reference=qk_norm_rope_attention_reference,
    inputs=_inputs,
    gradients=("qkv", *AFFINE),
    variants=("rope", "rms rope"),
    dtypes=("mixed", "fp32", "fp16"),
    small={
        "two samples": dict(B=2, N=3, H=2, D=24),
        "one token": dict(B=1, N=1, H=2, D=8),
        "no samples": dict(B=0, N=3, H=2, D=24),
        "no tokens": dict(B=2, N=0, H=2, D=24),
    },
    real={"XL/1": dict(B=256, N=256, H=16, D=72)},
    bytes=_bytes,
    registers=224,
    flops=flops,
)
