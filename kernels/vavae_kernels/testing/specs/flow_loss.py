"""`flow_loss`: squared and direction error of the velocity."""

import torch

from ..._launch import Config
from ...ops.flow_loss import flow_loss, flow_loss_reference
from ..spec import Dtypes, Inputs, Shape, Spec


def _inputs(shape: Shape, dtypes: Dtypes, variant: str, device: torch.device) -> Inputs:
    """Noise and data are NCHW. The velocity comes from the network: its tokens, seen as an image, or NCHW too.

    No velocity is near zero: the gradient of its direction grows as 1 / ‖v‖, and with it everyone's rounding.
    """
    B, C, H, W = shape.values()
    v = torch.randn(B, H, W, C, device=device)
    v[..., 0] += 3.0
    v = v.to(dtypes.other).permute(0, 3, 1, 2)
    x0, x1 = (torch.randn(B, C, H, W, device=device).to(dtypes.stream) for _ in range(2))
    return dict(v=(v if variant == "tokens" else v.contiguous()).requires_grad_(), x0=x0, x1=x1)


def _bytes(shape: Shape, dtypes: Dtypes, variant: str) -> tuple[int, int]:
    """Forward reads v, x0, x1; backward reads them again and writes dv."""
    B, C, H, W = shape.values()
    s, o = dtypes.stream.itemsize, dtypes.other.itemsize
    return B * C * H * W * (2 * s + o), B * C * H * W * (2 * s + 2 * o)


TILES = tuple(Config((P, 32), warps) for P, warps in ((64, 4), (32, 4), (128, 4), (128, 8), (32, 2)))

SPEC = Spec(
    name="flow_loss",
    function=flow_loss,
    reference=flow_loss_reference,
    inputs=_inputs,
    gradients=("v",),
    variants=("tokens", "nchw"),
    small={
        "latents": dict(B=2, C=32, H=4, W=4),
        "odd": dict(B=3, C=5, H=3, W=7),
        "several programs": dict(B=2, C=32, H=16, W=9),
        "many channels": dict(B=1, C=150, H=3, W=3),
        "one pixel": dict(B=3, C=4, H=1, W=1),
        "one channel": dict(B=2, C=1, H=3, W=5),
        "no samples": dict(B=0, C=4, H=2, W=2),
    },
    real={"f16d32 b256": dict(B=256, C=32, H=16, W=16), "f16d32 b32": dict(B=32, C=32, H=16, W=16)},
    bytes=_bytes,
    registers=128,
    configs={"flow_loss_fwd": TILES, "flow_loss_bwd": TILES},
)
