"""`vf_loss` on Triton: the two losses and, in the same passes, their gradients, apart for mdms and mcos.

Both losses see p = W z only through inner products p_i · p_j, p_i · f_i. With the thin factorisation W = Q root (QᵀQ = 1,
root C x C) the C numbers y = root z have the same ones: p_i · p_j = y_i · y_j and p_i · f_i = y_i · Qᵀf_i. So tokens cost C
channels and not F, and no digits: y is rounded as p is, while z_iᵀ (Wᵀ W) z_j would square the condition number of W.

    ∂/∂z = rootᵀ ∂y        ∂/∂W = Σ_i ∂p_i z_iᵀ        ∂p = Q ∂y, plus in mcos what f has outside Q's range

    vf_gram, vf_factor        W -> root, Q                                     in fp64
    vf_tokens                 z, f, root, Q -> y, norms, mcos, its ∂y          one pass over the features
    vf_pairs                  y, f, norms -> mdms, its ∂y                      one pass over the features
    vf_tokens_backward        both ∂y and cotangents, root -> ∂z
    vf_projection_backward    the same, z, f, Q -> ∂W                          one pass over the features

Without a projection y is z: `vf_tokens_direct`, `vf_pairs`, `vf_tokens_backward`. So it is with one that does not shorten p
(C >= F, or C above `MAX_LATENT`): p is then formed outside.
"""

import torch
from torch import Tensor

from .. import _compat
from .._checks import without_autocast
from .._launch import Config, cdiv, choose, launch, power_of_two, processors
from .._registry import register
from ._vf_kernels import vf_factor, vf_gram, vf_pairs, vf_projection_backward, vf_tokens, vf_tokens_backward, vf_tokens_direct
from .flow_loss import COSINE_EPS

NORMALIZE_EPS = 1e-12  # of torch.nn.functional.normalize
MAX_LATENT = 64  # channels of z up to which a program holds the C x C factor
CHANNELS = 128  # of y whose gradient a program holds

Pair = tuple[Tensor, Tensor]


def _forward(z: Tensor, projection: Tensor | None, features: Tensor, distmat_margin: float, cos_margin: float, grad: bool) -> tuple[Tensor, ...]:
    """z (B, C, N), projection (F, C) or None, features (B, F, N) -> mdms, mcos, and with `grad` what `_backward` wants, else empty:

    ∂mdms/∂y, ∂mcos/∂y, y (B, N, C), weights of p and f in ∂mcos/∂p (2, B, N), root (C, P) and Q (F, P). All fp32 but root, fp64.
    Without a projection y, weights, root and Q are empty.
    """
    outputs = _forward_outputs(z, projection, features, distmat_margin, cos_margin, grad)
    mdms, mcos, dy_mdms, dy_mcos, y, weights, root, basis = outputs
    dy_mdms, dy_mcos = (dy if grad else None for dy in (dy_mdms, dy_mcos))
    norms = _fp32(z, (2, z.shape[0], z.shape[2]))
    if projection is None:
        y = z.transpose(1, 2)
        mcos_terms = _tokens_direct(z, features, norms, cos_margin, dy_mcos)
    else:
        _factor(projection, root, basis)
        mcos_terms = _tokens(z, features, root, basis, y, norms, weights, cos_margin, dy_mcos)
    torch.sum(_pairs(y, features, norms, distmat_margin, dy_mdms), 0, out=mdms)
    torch.sum(mcos_terms, 0, out=mcos)
    return outputs


def _forward_outputs(
    z: Tensor, projection: Tensor | None, features: Tensor, distmat_margin: float, cos_margin: float, grad: bool
) -> tuple[Tensor, ...]:
    B, C, N = z.shape
    mdms, mcos = (_fp32(z, ()) for _ in range(2))
    dy_mdms, dy_mcos = (_fp32(z, (B, N, C) if grad else (0,)) for _ in range(2))
    if projection is None:
        return mdms, mcos, dy_mdms, dy_mcos, *(_fp32(z, (0,)) for _ in range(4))
    root = z.new_empty((C, _padded(C)), dtype=torch.float64)
    return mdms, mcos, dy_mdms, dy_mcos, _fp32(z, (B, N, C)), _fp32(z, (2, B, N)), root, _fp32(z, (features.shape[1], _padded(C)))


def _factor(projection: Tensor, root: Tensor, basis: Tensor) -> None:
    """W (F, C) = Q root: writes root (C, P) in fp64 and Q, `basis` (F, P), P being C padded."""
    F, C = projection.shape
    P, R = root.shape[1], 32
    config = Config((R,), warps=4 if P <= 32 else 8)
    parts = cdiv(F, R)
    gram = root.new_empty((parts, P, P))
    launch(vf_gram, (parts,), projection, gram, F, C, *projection.stride(), P=P, R=R, config=config)
    launch(vf_factor, (parts,), projection, gram, root, basis, F, C, *projection.stride(), parts, P=P, R=R, config=config)


def _tokens(
    z: Tensor, features: Tensor, root: Tensor, basis: Tensor, y: Tensor, norms: Tensor, weights: Tensor, cos_margin: float, dy: Tensor | None
) -> Tensor:
    """Writes y, norms 1 / ‖y‖ and 1 / ‖f‖, and with dy the weights and dy -> terms of mcos."""
    B, C, N = z.shape
    F, P = basis.shape
    config = choose("vf_tokens", (C, F, z.dtype, features.dtype), Config((32, 64), 4, 3), z.device)
    I, K = min(config.tile[0], _padded(N)), config.tile[1]
    terms = _fp32(z, (B * cdiv(N, I),))
    launch(
        vf_tokens, terms.shape, z, features, root, basis, y, *norms, *weights, terms, dy, B, N, C, F, *z.stride(), *features.stride(),
        MARGIN=cos_margin, NORM_EPS=NORMALIZE_EPS, COSINE_EPS=COSINE_EPS, P=P, I=I, K=K, STAGES=config.stages, config=config,
    )  # fmt: skip
    return terms


def _tokens_direct(z: Tensor, features: Tensor, norms: Tensor, cos_margin: float, dy: Tensor | None) -> Tensor:
    """Writes norms 1 / ‖z‖ and 1 / ‖f‖ (2, B, N), and dy -> terms of mcos."""
    B, C, N = z.shape
    config = choose("vf_tokens_direct", (C, z.dtype, features.dtype), Config((16, 64), 4, 2), z.device)
    I, K = config.tile
    terms = _fp32(z, (B * cdiv(N, I),))
    launch(
        vf_tokens_direct, terms.shape, z, features, *norms, terms, dy, B, N, C, *z.stride(), *features.stride(),
        MARGIN=cos_margin, NORM_EPS=NORMALIZE_EPS, COSINE_EPS=COSINE_EPS, I=I, K=K, STAGES=config.stages, config=config,
    )  # fmt: skip
    return terms


def _pairs(y: Tensor, features: Tensor, norms: Tensor, distmat_margin: float, dy: Tensor | None) -> Tensor:
    """y (B, N, C); writes dy -> terms of mdms."""
    B, N, C = y.shape
    F = features.shape[1]
    P = min(_padded(C), CHANNELS)
    wide = dict(Y_WIDE=_is_wide(y), F_WIDE=_is_wide(features))
    default = Config((64, 64, 64), 8, 3) if P <= 32 and not wide["F_WIDE"] else Config((64, 32, 32), 8, 2)  # registers decide
    config = choose("vf_pairs", (C, F, y.dtype, features.dtype), default, y.device)
    I, J, K = config.tile
    I, J = min(I, _padded(N)), min(J, _padded(N))
    terms = _fp32(y, (B * cdiv(N, I),))
    launch(
        vf_pairs, (len(terms), _chunks(C) if dy is not None else 1), y, features, *norms, terms, dy, B, N, C, F, *y.stride(), *features.stride(),
        MARGIN=distmat_margin, NORM_EPS=NORMALIZE_EPS, **wide, P=P, I=I, J=J, K=K, L=max(16, min(K, P // 2)), STAGES=config.stages, config=config,
    )  # fmt: skip
    return terms


def _backward(
    g_mdms: Tensor | None, g_mcos: Tensor | None, z: Tensor, projection: Tensor | None, features: Tensor,
    dy_mdms: Tensor, dy_mcos: Tensor, y: Tensor, weights: Tensor, root: Tensor, basis: Tensor, projection_grad: bool,
) -> Pair:  # fmt: skip
    """Cotangents (), the inputs and what `_forward` saved -> ∂z like z, and ∂W like W or empty."""
    B, C, N = z.shape
    dz = torch.empty_like(z)
    dq, dq_size = (_fp32(z, (B, N, C)), _fp32(z, (B, N))) if projection_grad else (None, None)
    factors = (root, y, weights[0]) if projection is not None else (None, None, None)
    I, P = 32, min(_padded(C), CHANNELS)
    launch(
        vf_tokens_backward, (B * cdiv(N, I), _chunks(C)), dy_mdms, dy_mcos, g_mdms, g_mcos, *factors, dz, dq, dq_size,
        N, C, *dz.stride(), P=P, I=I, config=Config((I,)),
    )  # fmt: skip
    if not projection_grad:
        return dz, _fp32(z, (0,))
    shares = _projection_shares(z, features, g_mcos, weights[1], basis, dq, dq_size)
    return dz, torch.sum(shares, 0).to(projection.dtype)


def _backward_outputs(
    g_mdms: Tensor | None, g_mcos: Tensor | None, z: Tensor, projection: Tensor | None, features: Tensor,
    dy_mdms: Tensor, dy_mcos: Tensor, y: Tensor, weights: Tensor, root: Tensor, basis: Tensor, projection_grad: bool,
) -> Pair:  # fmt: skip
    dw = projection.new_empty(projection.shape) if projection_grad else _fp32(z, (0,))
    return torch.empty_like(z), dw


def _projection_shares(z: Tensor, features: Tensor, g_mcos: Tensor | None, f_weight: Tensor, basis: Tensor, dq: Tensor, dq_size: Tensor) -> Tensor:
    """-> shares of ∂W (splits, F, C)."""
    B, C, N = z.shape
    F, P = basis.shape
    config = choose("vf_projection_backward", (C, F, z.dtype, features.dtype), Config((64, 32), 4, 4), z.device)
    R, I = config.tile
    I = min(I, _padded(N))
    splits = min(power_of_two(processors(z.device) / cdiv(F, R)), power_of_two(B * cdiv(N, I)))
    shares = _fp32(z, (splits, F, C))
    launch(
        vf_projection_backward, (cdiv(F, R), splits), z, features, g_mcos, f_weight, basis, dq, dq_size, shares,
        B, N, C, F, splits, *z.stride(), *features.stride(), P=P, R=R, I=I, STAGES=config.stages, config=config,
    )  # fmt: skip
    return shares


def _fp32(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _is_wide(x: Tensor) -> bool:
    """Whether x is multiplied in halves; the interpreter has no bf16 products."""
    return _compat.INTERPRETED or x.dtype == torch.float32


def _padded(count: int) -> int:
    """The power of two that holds `count`, and at least the 16 that a tensor core wants."""
    return max(16, 1 << (count - 1).bit_length())


def _chunks(channels: int) -> int:
    """Programs that share the gradient of a token; one also where there is no channel."""
    return max(cdiv(channels, CHANNELS), 1)


_forward_op = register(
    "vf_loss",
    "(Tensor z, Tensor? projection, Tensor features, float distmat_margin, float cos_margin, bool grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_outputs,
)
_backward_op = register(
    "vf_loss_backward",
    "(Tensor? g_mdms, Tensor? g_mcos, Tensor z, Tensor? projection, Tensor features, Tensor dy_mdms, Tensor dy_mcos, Tensor y,"
    " Tensor weights, Tensor root, Tensor basis, bool projection_grad) -> (Tensor, Tensor)",
    _backward,
    _backward_outputs,
)


class _VFLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, projection, features, distmat_margin, cos_margin):
        mdms, mcos, *saved = _forward_op(z, projection, features, distmat_margin, cos_margin, True)
        ctx.save_for_backward(z, projection, features, *saved)
        ctx.set_materialize_grads(False)
        return mdms, mcos

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_mdms, g_mcos):
        projection_grad = ctx.needs_input_grad[1]
        dz, dw = _backward_op(g_mdms, g_mcos, *ctx.saved_tensors, projection_grad)
        return dz, dw if projection_grad else None, None, None, None


def vf_losses(z: Tensor, projection: Tensor | None, features: Tensor, distmat_margin: float, cos_margin: float) -> Pair:
    """z (B, C, N), projection (F, C) or None, features (B, F, N) -> mdms, mcos, fp32 scalars."""
    if projection is not None and (projection.shape[1] > MAX_LATENT or projection.shape[1] >= projection.shape[0]):
        with without_autocast(z):
            z, projection = (z.float().transpose(1, 2) @ projection.float().T).transpose(1, 2), None
    if torch.is_grad_enabled() and (z.requires_grad or (projection is not None and projection.requires_grad)):
        return _VFLoss.apply(z, projection, features, distmat_margin, cos_margin)
    return _forward_op(z, projection, features, distmat_margin, cos_margin, False)[:2]
