"""`vf_loss` on Triton: the two losses and, in the same passes, their gradients, apart for mdms and mcos.

Both losses see p = W z only through inner products p_i · p_j, p_i · f_i. With the thin factorisation W = Q root (QᵀQ = 1,
root C x C) the C numbers y = root z have the same ones: p_i · p_j = y_i · y_j and p_i · f_i = y_i · Qᵀf_i. So tokens cost C
channels and not F, and no digits: y is rounded as p is, while z_iᵀ (Wᵀ W) z_j would square the condition number of W.

    ∂/∂z = rootᵀ ∂y        ∂/∂W = Σ_i ∂p_i z_iᵀ        ∂p = Q ∂y, plus the features' own share in mcos

    vf_gram, vf_factor        W -> root, Q                                        in fp64
    vf_tokens                 z, f, root, Q -> y, norms, mcos, its ∂z, Σ ∂y zᵀ      one pass over the features
    vf_pairs                  y, f, norms -> mdms, its ∂z, Σ ∂y zᵀ                  one pass over the features
    vf_projection_gradient    z, f, Q, Σ ∂y zᵀ -> both ∂W                           one pass over the features

Without a projection y is z: `vf_tokens_direct` and `vf_pairs`. So it is with one that does not shorten p (C >= F, or C above
`MAX_LATENT`): p is then formed outside.
"""

import torch
from torch import Tensor

from .. import _compat
from .._checks import without_autocast
from .._launch import Config, cdiv, choose, launch, power_of_two, processors
from .._registry import register
from ._vf_kernels import vf_factor, vf_gram, vf_pairs, vf_projection_gradients, vf_tokens, vf_tokens_direct
from .flow_loss import COSINE_EPS

NORMALIZE_EPS = 1e-12  # of torch.nn.functional.normalize
MAX_LATENT = 64  # channels of z up to which a program holds the C x C factor

Pair = tuple[Tensor, Tensor]


def _losses(
    z: Tensor, projection: Tensor | None, features: Tensor, distmat_margin: float, cos_margin: float, grad: bool, projection_grad: bool
) -> tuple[Tensor, ...]:
    """z (B, C, N), projection (F, C) or None, features (B, F, N) -> mdms, mcos, ∂mdms/∂z, ∂mcos/∂z (B, C, N), both ∂W (2, F, C).

    All fp32. Without `grad` the gradients are empty, without `projection_grad` those of W.
    """
    outputs = _outputs(z, projection, features, distmat_margin, cos_margin, grad, projection_grad)
    mdms, mcos, dz_mdms, dz_mcos, dw = outputs
    dz_mdms, dz_mcos = (dz if grad else None for dz in (dz_mdms, dz_mcos))
    if projection is None:
        norms, mcos_terms = _tokens_direct(z, features, cos_margin, dz_mcos)
        mdms_terms, _ = _pairs(z, features, norms, distmat_margin, dz_mdms)
    else:
        root, basis = _factor(projection)
        y, norms, mcos_terms, weights = _tokens(z, features, root, basis, cos_margin, dz_mcos, projection_grad)
        mdms_terms, sums = _pairs(y, features, norms, distmat_margin, dz_mdms, z, root, projection_grad)
        if projection_grad:
            torch.sum(_projection_gradients(z, features, y, weights, basis, sums), 0, out=dw)
    torch.sum(mdms_terms, 0, out=mdms)
    torch.sum(mcos_terms, 0, out=mcos)
    return outputs


def _outputs(
    z: Tensor, projection: Tensor | None, features: Tensor, distmat_margin: float, cos_margin: float, grad: bool, projection_grad: bool
) -> tuple[Tensor, ...]:
    mdms, mcos = (_fp32(z, ()) for _ in range(2))
    dz_mdms, dz_mcos = (torch.empty_like(z, dtype=torch.float32) if grad else _fp32(z, (0,)) for _ in range(2))
    return mdms, mcos, dz_mdms, dz_mcos, _fp32(z, (2, *projection.shape) if projection_grad else (0,))


def _factor(projection: Tensor) -> Pair:
    """W (F, C) -> root (C, P) in fp64 and Q (F, P) in fp32 with W = Q root, P being C padded."""
    F, C = projection.shape
    P, R = _padded(C), 32
    config = Config((R,), warps=4 if P <= 32 else 8)
    parts = cdiv(F, R)
    gram = projection.new_empty((parts, P, P), dtype=torch.float64)
    root = projection.new_empty((C, P), dtype=torch.float64)
    basis = _fp32(projection, (F, P))
    launch(vf_gram, (parts,), projection, gram, F, C, *projection.stride(), P=P, R=R, config=config)
    launch(vf_factor, (parts,), projection, gram, root, basis, F, C, *projection.stride(), parts, P=P, R=R, config=config)
    return root, basis


def _tokens(
    z: Tensor, features: Tensor, root: Tensor, basis: Tensor, cos_margin: float, dz: Tensor | None, projection_grad: bool
) -> tuple[Tensor, Pair, Tensor, Pair | tuple[None, None]]:
    """-> y (B, C, N), 1 / ‖y‖ and 1 / ‖f‖ (B, N), terms of mcos, the weights of p and of f in ∂mcos/∂p (B, N)."""
    B, C, N = z.shape
    F, P = features.shape[1], basis.shape[1]
    config = choose("vf_tokens", (C, F, z.dtype, features.dtype), Config((64, 64), 4, 3), z.device)
    I, K = min(config.tile[0], _padded(N)), config.tile[1]
    programs = B * cdiv(N, I)
    y = _fp32(z, (B, N, C))
    norms = _fp32(z, (B, N)), _fp32(z, (B, N))
    weights = (_fp32(z, (B, N)), _fp32(z, (B, N))) if projection_grad else (None, None)
    terms = _fp32(z, (programs,))
    launch(
        vf_tokens, (programs,), z, features, root, basis, y, *norms, *weights, terms, dz,
        B, N, C, F, *z.stride(), *features.stride(), *_strides(dz),
        MARGIN=cos_margin, NORM_EPS=NORMALIZE_EPS, COSINE_EPS=COSINE_EPS, P=P, I=I, K=K, STAGES=config.stages, config=config,
    )  # fmt: skip
    return y.transpose(1, 2), norms, terms, weights


def _tokens_direct(z: Tensor, features: Tensor, cos_margin: float, dz: Tensor | None) -> tuple[Pair, Tensor]:
    """-> 1 / ‖z‖ and 1 / ‖f‖ (B, N), terms of mcos."""
    B, C, N = z.shape
    config = choose("vf_tokens_direct", (C, z.dtype, features.dtype), Config((16, 128), 4, 2), z.device)
    I, K = config.tile
    norms = _fp32(z, (B, N)), _fp32(z, (B, N))
    terms = _fp32(z, (B * cdiv(N, I),))
    launch(
        vf_tokens_direct, (len(terms),), z, features, *norms, terms, dz, B, N, C, *z.stride(), *features.stride(), *_strides(dz),
        MARGIN=cos_margin, NORM_EPS=NORMALIZE_EPS, COSINE_EPS=COSINE_EPS, I=I, K=K, STAGES=config.stages, config=config,
    )  # fmt: skip
    return norms, terms


def _pairs(
    y: Tensor, features: Tensor, norms: Pair, distmat_margin: float, dz: Tensor | None,
    z: Tensor | None = None, root: Tensor | None = None, projection_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """-> terms of mdms, Σ ∂y zᵀ (programs, P, P). z and root: y is root z, else it is z itself."""
    B, C, N = y.shape
    F = features.shape[1]
    config = choose("vf_pairs", (C, F, y.dtype, features.dtype), Config((64, 64, 64), 4, 3), y.device)
    I, J, K = config.tile
    I, J = min(I, _padded(N)), min(J, _padded(N))
    P = _padded(C) if root is not None else min(_padded(C), 128)
    programs = B * cdiv(N, I)
    terms = _fp32(y, (programs,))
    sums = _fp32(y, (programs, P, P)) if projection_grad else None
    chunks = 1 if dz is None else max(cdiv(C, P), 1)
    wide = {name: _compat.INTERPRETED or x.dtype == torch.float32 for name, x in dict(Y_WIDE=y, F_WIDE=features).items()}
    launch(
        vf_pairs, (programs, chunks), y, features, *norms, terms, dz, z, root, sums,
        B, N, C, F, *y.stride(), *features.stride(), *_strides(z), *_strides(dz),
        MARGIN=distmat_margin, NORM_EPS=NORMALIZE_EPS, WHOLE=C <= P, **wide, P=P, I=I, J=J, K=K, STAGES=config.stages, config=config,
    )  # fmt: skip
    return terms, sums


def _projection_gradients(z: Tensor, features: Tensor, y: Tensor, weights: Pair, basis: Tensor, sums: Tensor) -> Tensor:
    """-> shares of ∂mdms/∂W and ∂mcos/∂W (splits, 2, F, C)."""
    B, C, N = z.shape
    F, P = basis.shape
    config = choose("vf_projection_gradients", (C, F, z.dtype, features.dtype), Config((32, 64), 4, 3), z.device)
    R, I = config.tile
    I = min(I, _padded(N))
    splits = min(power_of_two(processors(z.device) / cdiv(F, R)), power_of_two(B * cdiv(N, I)))
    shares = _fp32(z, (splits, 2, F, C))
    launch(
        vf_projection_gradients, (cdiv(F, R), splits), z, features, y, *weights, basis, sums, shares,
        B, N, C, F, splits, len(sums), *z.stride(), *features.stride(),
        P=P, R=R, I=I, STAGES=config.stages, config=config,
    )  # fmt: skip
    return shares


def _fp32(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _padded(count: int) -> int:
    """The power of two that holds `count`, and at least the 16 that a tensor core wants."""
    return max(16, 1 << (count - 1).bit_length())


def _strides(tensor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tensor is None else tensor.stride()


_losses_op = register(
    "vf_loss",
    "(Tensor z, Tensor? projection, Tensor features, float distmat_margin, float cos_margin, bool grad, bool projection_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _losses,
    _outputs,
)


class _VFLoss(torch.autograd.Function):
    """Both losses with their gradients: backward only scales and adds."""

    @staticmethod
    def forward(ctx, z, projection, features, distmat_margin, cos_margin, projection_grad):
        mdms, mcos, *gradients = _losses_op(z, projection, features, distmat_margin, cos_margin, True, projection_grad)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = z.dtype, None if projection is None else projection.dtype
        ctx.projection_grad = projection_grad
        ctx.set_materialize_grads(False)
        return mdms, mcos

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *cotangents):
        dz_mdms, dz_mcos, dw = ctx.saved_tensors
        z_dtype, projection_dtype = ctx.dtypes
        dz = _weighted(cotangents, (dz_mdms, dz_mcos), z_dtype)
        return dz, _weighted(cotangents, dw.unbind(), projection_dtype) if ctx.projection_grad else None, None, None, None, None


def _weighted(cotangents: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor | None:
    """Σ cotangent · gradient, rounded once; a loss without a cotangent takes no part, whatever its gradient is."""
    terms = [cotangent * gradient for cotangent, gradient in zip(cotangents, gradients) if cotangent is not None]
    return sum(terms[1:], start=terms[0]).to(dtype) if terms else None


def vf_losses(
    z: Tensor, projection: Tensor | None, features: Tensor, distmat_margin: float, cos_margin: float
) -> Pair:
    """z (B, C, N), projection (F, C) or None, features (B, F, N) -> mdms, mcos, fp32 scalars."""
    if projection is not None and (projection.shape[1] > MAX_LATENT or projection.shape[1] >= projection.shape[0]):
        with without_autocast(z):
            z, projection = (z.float().transpose(1, 2) @ projection.float().T).transpose(1, 2), None
    projection_grad = torch.is_grad_enabled() and projection is not None and projection.requires_grad
    if projection_grad or (torch.is_grad_enabled() and z.requires_grad):
        return _VFLoss.apply(z, projection, features, distmat_margin, cos_margin, projection_grad)
    return _losses_op(z, projection, features, distmat_margin, cos_margin, False, False)[:2]
