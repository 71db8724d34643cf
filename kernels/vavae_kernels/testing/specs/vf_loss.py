"""`vf_loss`: alignment of the latent with a vision foundation model's features."""

import torch
from torch import Tensor

from ..._launch import Config
from ...ops.vf_loss import vf_loss, vf_loss_reference
from ..spec import Dtypes, Inputs, Shape, Spec


def _inputs(shape: Shape, dtypes: Dtypes, variant: str, device: torch.device) -> Inputs:
    """Latents and features in two clusters each, at odds with one another.

    A gradient of mdms jumps where a pair's difference is at the margin: rounding decides there, and no error bound holds. Here
    the differences crowd round few values, of either sign and on both sides of the margin, and the margin is none of them.
    mcos likewise: a token's cosine with its feature is far below the margin's or far above it.
    """
    B, F, H, W = (shape[letter] for letter in "BFHW")
    C = F if variant == "no projection" else shape["C"]
    margins = (0.0, 0.0) if variant == "no margins" else (0.25, 0.5)
    centre = torch.randn(B, C, 1, device=device)
    projection = None if variant == "no projection" else torch.randn(F, C, device=device) / C**0.5
    image = centre if projection is None else projection @ centre
    spread = (0.3, 1.5) if variant == "no margins" else (0.3, 0.3)  # cosines of a cluster's tokens: 0.9 and 0.3, or 0.9 and 0.9
    z, features = (_clusters(x, s, H * W) for x, s in zip((centre, image), spread))
    if variant != "no margins":  # tokens first in memory, as a vision transformer leaves them
        features = features.transpose(1, 2).contiguous().transpose(1, 2)
    return dict(
        z=z.unflatten(2, (H, W)).to(dtypes.stream).requires_grad_(),
        projection=None if projection is None else projection.to(dtypes.stream).requires_grad_(),
        features=features.to(dtypes.other).unflatten(2, (H, W)),
        distmat_margin=margins[0],
        cos_margin=margins[1],
    )


def _clusters(centre: Tensor, spread: float, count: int) -> Tensor:
    """`count` tokens (B, C, N) about ± centre (B, C, 1), which has components of unit variance."""
    batch, channels, _ = centre.shape
    side = torch.randn(batch, 1, count, device=centre.device).sign()
    return side * centre + spread * torch.randn(batch, channels, count, device=centre.device)


def _bytes(shape: Shape, dtypes: Dtypes, variant: str) -> tuple[int, int]:
    """Forward: features, twice, and z -> y, read again, and two gradients of y. Backward: those, features, z -> dz and dW.

    Every pass over the features counts, though those of the published batch, 17 MB, leave device memory once: L2 keeps them.
    """
    tokens = shape["B"] * shape["H"] * shape["W"]
    features = tokens * shape["F"] * dtypes.other.itemsize
    if variant == "no projection":
        z, y = (tokens * shape["F"] * size for size in (dtypes.stream.itemsize, 4))
        return 2 * features + 2 * z + 2 * y, 2 * y + z
    z, y = (tokens * shape["C"] * size for size in (dtypes.stream.itemsize, 4))
    weight = shape["F"] * shape["C"] * dtypes.stream.itemsize
    return 2 * features + z + 4 * y + 2 * weight, features + 2 * z + 5 * y + weight


SPEC = Spec(
    name="vf_loss",
    function=vf_loss,
    reference=vf_loss_reference,
    inputs=_inputs,
    gradients=("z", "projection"),
    variants=("published", "no margins", "no projection"),
    small={
        "two samples": dict(B=2, C=8, F=24, H=4, W=4),
        "odd": dict(B=3, C=5, F=37, H=3, W=7),
        "one token": dict(B=1, C=4, F=12, H=1, W=1),
        "several tiles": dict(B=1, C=17, F=72, H=5, W=13),
        "short features": dict(B=2, C=9, F=6, H=2, W=4),
        "no features": dict(B=2, C=3, F=0, H=2, W=3),
    },
    real={"f16d32": dict(B=32, C=32, F=1024, H=16, W=16), "512": dict(B=16, C=32, F=1024, H=32, W=32)},
    bytes=_bytes,
    registers=255,
    configs={
        "vf_tokens": (Config((32, 64), 4, 3), Config((64, 64), 4, 3), Config((64, 32), 4, 3)),
        "vf_pairs": (Config((64, 64, 64), 8, 3), Config((64, 64, 64), 4, 3), Config((64, 128, 64), 8, 3), Config((32, 64, 64), 4, 3)),
        "vf_projection_backward": (Config((64, 32), 4, 4), Config((64, 64), 4, 3), Config((128, 32), 8, 3)),
    },
)
