"""Vision-foundation alignment of the tokenizer: mcos and mdms.  Yao et al. 2025 (VA-VAE), equations 3 to 6.

With p_i = W z_i the projected latent of token i and f_i the frozen feature:

    mcos = mean_i  relu(1 - m_c - cos(p_i, f_i))
    mdms = mean_ij relu(|cos(p_i, p_j) - cos(f_i, f_j)| - m_d)      over all N x N pairs

Without a projection p = z. Norms are clamped from below, at 1e-12 in mdms and 1e-8 in mcos, as torch's normalize and
cosine_similarity do: a zero token stays finite. The kernels never form p where C < F and C <= 64: `_vf_launch.py` says how.

Shapes  z (B, C, H, W), projection (F, C) or None (then F = C), features (B, F, H, W) -> mdms, mcos: two scalars, fp32
        (fp64 in, fp64 out), with separate gradients for z and projection. features are frozen: no gradient.
Dtypes  any mixture of fp32, bf16, fp16. Arithmetic fp32; the gradients are rounded once, to the dtypes of z and W.
Saved   z, W, f, and in fp32 three tensors (B, N, C): W z in C coordinates and its gradient in each loss. The reference: z,
        p, f, their norms and both similarities.
HBM     bytes a sample, features at s and z at t a number: forward N (2 F s + C t + 16 C), backward N (F s + 2 C t + 20 C),
        no backward pass over F without a gradient for W. No launch is timed on a GPU yet.
"""

import torch
from torch import Tensor

from .._checks import arithmetic_dtype, check, check_no_grad, check_number, check_shape, check_tensors, without_autocast
from .._registry import use_triton
from ._vf_launch import NORMALIZE_EPS, vf_losses
from .flow_loss import COSINE_EPS, unit


def vf_loss_reference(
    z: Tensor, projection: Tensor | None, features: Tensor, distmat_margin: float = 0.0, cos_margin: float = 0.0
) -> tuple[Tensor, Tensor]:
    """z (B, C, H, W), projection (F, C) or None, features (B, F, H, W) -> mdms, mcos."""
    dtype = arithmetic_dtype(z, projection, features)
    z, f = (x.to(dtype).flatten(2).transpose(1, 2) for x in (z, features.detach()))  # (B, N, C), (B, N, F)
    with without_autocast(z):
        p = z if projection is None else z @ projection.to(dtype).T  # (B, N, F)
        difference = _similarity(p) - _similarity(f)
    mdms = torch.relu(difference.abs() - distmat_margin).mean()
    cosine = (unit(p, COSINE_EPS, dim=-1) * unit(f, COSINE_EPS, dim=-1)).sum(-1)
    return mdms, torch.relu(1 - cos_margin - cosine).mean()


def _similarity(x: Tensor) -> Tensor:
    """x (B, N, F) -> (B, N, N): the cosine of every pair of tokens."""
    x = unit(x, NORMALIZE_EPS, dim=-1)
    return x @ x.transpose(1, 2)


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
    z and projection, apart for mdms and mcos; features requiring grad is a ValueError, and so is a batch of no tokens.
    """
    op = "vf_loss"
    check_tensors(op, z=z, features=features, optional=dict(projection=projection))
    check_number(op, "distmat_margin", distmat_margin)
    check_number(op, "cos_margin", cos_margin)
    check(z.ndim == 4 and features.ndim == 4, op, f"z and features must be (B, C, H, W), got {tuple(z.shape)}, {tuple(features.shape)}")
    batch, channels, height, width = z.shape
    if projection is None:
        check(features.shape[1] == channels, op, f"z has {channels} channels, features {features.shape[1]}: give a projection (F, C)")
    check_shape(op, "features", features, (batch, features.shape[1], height, width))
    check_shape(op, "projection", projection, (features.shape[1], channels))
    check(batch * height * width > 0, op, f"z is empty, shape {tuple(z.shape)}: a mean over no tokens is not a number")
    check_no_grad(op, features=features)
    if use_triton(op, impl, z, projection, features):
        return vf_losses(z.flatten(2), projection, features.flatten(2), float(distmat_margin), float(cos_margin))
    return vf_loss_reference(z, projection, features, distmat_margin, cos_margin)
