"""Similarity maps: how alike one token is to every place of its grid. Latents aligned with a foundation model (VA-VAE, section 3.2) show
the maps of its features; latents that are not show noise."""

import torch
import torch.nn.functional as F

from vavae_fast.evaluation.inputs import Array, finite_tensor, same_kind


def similarity_map(features: Array, token: tuple[int, int] | None = None) -> Array:
    """features (B, C, h, w) -> (B, h, w) float32: the cosine of the token at (row, column) with each place; 1 at its own.

    Default: the token in the middle, (h // 2, w // 2). A zero token has cosine 0 with everything. `ValueError`: a token outside the grid,
    NaN or infinity.
    """
    x = finite_tensor(features, "features", "B, C, h, w").to(torch.float32)
    row, column = token or (x.shape[2] // 2, x.shape[3] // 2)
    if not (0 <= row < x.shape[2] and 0 <= column < x.shape[3]):
        raise ValueError(f"token: ({row}, {column}) is outside a grid of {x.shape[2]} x {x.shape[3]}")
    return same_kind(F.cosine_similarity(x, x[:, :, row, column, None, None], dim=1), features)
