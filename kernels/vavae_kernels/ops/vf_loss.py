"""Vision-foundation alignment of the tokenizer: mcos and mdms.  Yao et al. 2025 (VA-VAE), equations 3 to 6.

With p_i = W z_i the projected latent of token i and f_i the frozen feature:

    mcos = mean_i  relu(1 - m_c - cos(p_i, f_i))
    mdms = mean_ij relu(|cos(p_i, p_j) - cos(f_i, f_j)| - m_d)      over all N x N pairs

The F-channel p is never formed. With G = Wᵀ W (C, C) and u_i = Wᵀ f_i (C,):

    p_i · p_j = z_iᵀ G z_j        ‖p_i‖² = z_iᵀ G z_i        p_i · f_i = z_i · u_i

Without a projection G is the identity and u = f. Norms are clamped from below, at 1e-12 in mdms and 1e-8 in mcos, as
torch's normalize and cosine_similarity do: a zero token stays finite.

Shapes  z (B, C, H, W), projection (F, C) or None (then F = C), features (B, F, H, W) -> mdms, mcos: two scalars, fp32
        (fp64 in, fp64 out), with separate gradients for z and projection. features are frozen: no gradient.
Saved   z, G, u, ‖f‖, the two similarities.  HBM bytes a sample at s bytes: N F s for the features once, N C s for z.
"""

import torch
from torch import Tensor

from .._checks import arithmetic_dtype, check, check_no_grad, check_shape, check_tensors, without_autocast
from .._registry import use_triton
from .flow_loss import COSINE_EPS, unit

NORMALIZE_EPS = 1e-12  # of torch.nn.functional.normalize


def vf_loss_reference(
    z: Tensor, projection: Tensor | None, features: Tensor, distmat_margin: float = 0.0, cos_margin: float = 0.0
) -> tuple[Tensor, Tensor]:
    """z (B, C, H, W), projection (F, C) or None, features (B, F, H, W) -> mdms, mcos."""
    dtype = arithmetic_dtype(z, projection, features)
    z, f = (x.to(dtype).flatten(2).transpose(1, 2) for x in (z, features.detach()))  # (B, N, C), (B, N, F)
    with without_autocast(z):
        if projection is None:
            gz, u = z, f
        else:
            w = projection.to(dtype)
            gz, u = z @ (w.T @ w), f @ w
        f_unit = unit(f, NORMALIZE_EPS, dim=-1)
        f_similarity = f_unit @ f_unit.transpose(1, 2)
        squared_norm = (z * gz).sum(-1)  # ‖p_i‖², (B, N)
        inverse = torch.rsqrt(squared_norm.clamp_min(NORMALIZE_EPS**2))
        z_similarity = (gz @ z.transpose(1, 2)) * inverse.unsqueeze(2) * inverse.unsqueeze(1)
    mdms = torch.relu((z_similarity - f_similarity).abs() - distmat_margin).mean()
    f_norm = f.square().sum(-1).clamp_min(COSINE_EPS**2).sqrt()
    cosine = (z * u).sum(-1) * torch.rsqrt(squared_norm.clamp_min(COSINE_EPS**2)) / f_norm
    return mdms, torch.relu(1 - cos_margin - cosine).mean()


def vf_loss(
    z: Tensor,
    projection: Tensor | None,
    features: Tensor,
    distmat_margin: float = 0.0,
    cos_margin: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """VF loss of latents z (B, C, H, W) against features (B, F, H, W) -> mdms, mcos, two scalars.

    projection (F, C) is the weight of the 1x1 convolution that lifts z to F channels, or None where C = F. Gradients for
    z and projection, apart for mdms and mcos; features requiring grad is a ValueError.
    """
    op = "vf_loss"
    check_tensors(op, z=z, projection=projection, features=features)
    check(z.ndim == 4 and features.ndim == 4, op, f"z and features must be (B, C, H, W), got {tuple(z.shape)}, {tuple(features.shape)}")
    batch, channels, height, width = z.shape
    if projection is None:
        check(features.shape[1] == channels, op, f"z has {channels} channels, features {features.shape[1]}: give a projection (F, C)")
    check_shape(op, "features", features, (batch, features.shape[1], height, width))
    check_shape(op, "projection", projection, (features.shape[1], channels))
    check_no_grad(op, features=features)
    use_triton(op, impl)
    return vf_loss_reference(z, projection, features, distmat_margin, cos_margin)
