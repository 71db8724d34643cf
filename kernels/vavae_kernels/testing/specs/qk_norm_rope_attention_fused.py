"""`qk_norm_rope_attention` as sampling calls it with backend="fused": one kernel, no gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..._launch import Config
from ...ops.qk_norm_rope_attention import qk_norm_rope_attention, qk_norm_rope_attention_reference
from ..spec import Dtypes, Inputs, Shape, Spec
from .qk_norm_rope import packed_inputs
from .qk_norm_rope_attention import flops


def _one_kernel(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None = None, k_weight: Tensor | None = None,
    q_bias: Tensor | None = None, k_bias: Tensor | None = None, norm: str | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """The single kernel where Triton is asked for; what "auto" does otherwise."""
    backend = "fused" if impl == "triton" else "auto"
    return qk_norm_rope_attention(qkv, cos, sin, q_weight, k_weight, q_bias, k_bias, norm, impl=impl, backend=backend)


def _inputs(shape: Shape, dtypes: Dtypes, variant: str, device: torch.device) -> Inputs:
    inputs = packed_inputs(shape, dtypes, variant, device)
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _bytes(shape: Shape, dtypes: Dtypes, variant: str) -> tuple[int, int]:
    """qkv once, the output once."""
    return 4 * shape["B"] * shape["N"] * shape["H"] * shape["D"] * dtypes.other.itemsize, 0


def _prologue_and_sdpa(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: qk_norm_rope_attention(**inputs, impl="triton")


SPEC = Spec(
    name="qk_norm_rope_attention_fused",
    function=_one_kernel,
    reference=qk_norm_rope_attention_reference,
    inputs=_inputs,
    gradients=(),
    variants=("rope", "rms rope"),
    small={
        "two samples": dict(B=2, N=16, H=3, D=72),
        "a ragged tile": dict(B=3, N=7, H=2, D=24),
        "several tiles": dict(B=1, N=137, H=1, D=64),
        "one token": dict(B=2, N=1, H=1, D=128),
        "no samples": dict(B=0, N=7, H=3, D=72),
        "no tokens": dict(B=2, N=0, H=3, D=72),
    },
    real={
        "XL/1": dict(B=256, N=256, H=16, D=72),
        "B/1": dict(B=256, N=256, H=12, D=64),
        "XL/1 b32": dict(B=32, N=256, H=16, D=72),
    },
    bytes=_bytes,
    flops=flops,
    configs={
        "qk_norm_rope_attention_fwd": (
            Config((128, 64), warps=4, stages=1), Config((128, 64), warps=8, stages=1), Config((64, 64), warps=4, stages=1),
            Config((64, 64), warps=4, stages=2), Config((128, 128), warps=8, stages=1), Config((128, 32), warps=8, stages=1),
            Config((256, 32), warps=8, stages=1), Config((128, 64), warps=8, stages=2),
        ),
    },
    peers={"prologue and sdpa": _prologue_and_sdpa},
)  # fmt: skip
