"""The Triton kernels of `vf_loss`; `_vf_launch.py` says in what order they run and what passes between them.

Letters in names: I, J tokens of a tile, K channels of one step of a sum, P channels of the vectors y, padded to a power of
two, R rows. Offsets are int64. Products of fp32 tiles run as tf32x3, three tensor-core products that keep fp32's digits;
bf16 and fp16 tiles multiply as they are, which is exact.
"""

from .._compat import tl, triton


@triton.jit
def vf_gram(projection, gram, F, C, w_f, w_c, P: tl.constexpr, R: tl.constexpr):
    """One program: the share of R rows in WᵀW. fp64, where products of fp32 numbers are exact."""
    c_P = tl.arange(0, P)
    gram_PP = tl.zeros((P, P), tl.float64)
    first = tl.program_id(0) * R
    projection += first.to(tl.int64) * w_f
    for r in range(tl.minimum(R, F - first)):
        w_P = tl.load(projection + r * w_f + c_P * w_c, mask=c_P < C, other=0.0).to(tl.float64)
        gram_PP += w_P[:, None] * w_P[None, :]
    tl.store(gram + tl.program_id(0) * P * P + c_P[:, None] * P + c_P[None, :], gram_PP)


@triton.jit
def vf_factor(projection, gram, root, basis, F, C, w_f, w_c, PARTS, P: tl.constexpr, R: tl.constexpr):
    """W = Q root with root upper triangular and QᵀQ = 1, by Cholesky's WᵀW = rootᵀ root in fp64. One program: R rows of Q.

    Every program factors WᵀW anew, which costs less than one more launch. A pivot that is rounding belongs to a column that
    depends on those before it: its row of root and its column of Q are zero, which moves W z by less than fp32 rounds it.
    """
    c_P = tl.arange(0, P)
    f_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    in_RP = (f_R < F)[:, None] & (c_P < C)[None, :]
    q_RP = tl.load(projection + f_R[:, None] * w_f + c_P[None, :] * w_c, mask=in_RP, other=0.0).to(tl.float64)
    left_PP = tl.zeros((P, P), tl.float64)
    for part in range(PARTS):
        left_PP += tl.load(gram + part * P * P + c_P[:, None] * P + c_P[None, :])
    diagonal_P = tl.sum(tl.where(c_P[:, None] == c_P[None, :], left_PP, 0.0), 0)
    rounding_P = diagonal_P * C * 2.220446049250313e-16
    for k in range(C):
        row_P = tl.sum(tl.where((c_P == k)[:, None], left_PP, 0.0), 0)
        pivot = tl.sum(tl.where(c_P == k, row_P, 0.0), 0)
        kept = pivot > tl.sum(tl.where(c_P == k, rounding_P, 0.0), 0)
        scale = tl.where(kept, 1.0 / tl.sqrt(tl.where(kept, pivot, 1.0)), 0.0)
        row_P = tl.where(c_P >= k, row_P * scale, 0.0)
        left_PP -= row_P[:, None] * row_P[None, :]
        q_R = tl.sum(tl.where((c_P == k)[None, :], q_RP, 0.0), 1) * scale
        q_RP = tl.where((c_P == k)[None, :], q_R[:, None], q_RP - q_R[:, None] * row_P[None, :])
        if tl.program_id(0) == 0:
            tl.store(root + k * P + c_P, row_P)
    tl.store(basis + f_R[:, None] * P + c_P[None, :], q_RP.to(tl.float32), mask=(f_R < F)[:, None])


@triton.jit
def _cosine_terms(dot_I, norm_I, f_norm_I, in_I, B, N, MARGIN: tl.constexpr, EPS: tl.constexpr):
    """mcos of tokens with p · f = dot -> its terms, and the weights of f and p in ∂mcos/∂p = weight_f f + weight_p p."""
    p_inverse_I = 1.0 / tl.maximum(norm_I, EPS)
    f_inverse_I = 1.0 / tl.maximum(f_norm_I, EPS)
    cosine_I = dot_I * p_inverse_I * f_inverse_I
    hinge_I = 1.0 - MARGIN - cosine_I
    mean = 1.0 / (B * 1.0) / N
    term_I = tl.where(in_I, tl.maximum(hinge_I, 0.0), 0.0) * mean
    slope_I = tl.where(in_I & (hinge_I > 0), -mean, 0.0) * p_inverse_I
    weight_p_I = tl.where(norm_I >= EPS, -slope_I * cosine_I * p_inverse_I, 0.0)  # a clamped norm is a constant
    return term_I, slope_I * f_inverse_I, weight_p_I


@triton.jit
def vf_tokens(
    z, features, root, basis, y, y_inverse, f_inverse, y_weight, f_weight, losses, dz,
    B, N, C, F, z_b, z_c, z_n, f_b, f_c, f_n, dz_b, dz_c, dz_n,
    MARGIN: tl.constexpr, NORM_EPS: tl.constexpr, COSINE_EPS: tl.constexpr,
    P: tl.constexpr, I: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = root z, both inverse norms, and mcos. One program: I tokens of one sample."""
    tiles = tl.cdiv(N, I)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n_I = ((tl.program_id(0) % tiles) * I + tl.arange(0, I)).to(tl.int64)
    in_I = n_I < N
    c_P = tl.arange(0, P)
    in_IP = in_I[:, None] & (c_P < C)[None, :]

    y_IP = tl.zeros((I, P), tl.float64)
    for c in range(C):
        z_I = tl.load(z + b * z_b + c * z_c + n_I * z_n, mask=in_I, other=0.0).to(tl.float64)
        y_IP += z_I[:, None] * tl.load(root + c_P * P + c, mask=c_P < C, other=0.0)[None, :]
    y_IP = y_IP.to(tl.float32)
    tl.store(y + (b * N + n_I)[:, None] * C + c_P[None, :], y_IP, mask=in_IP)

    fq_IP = tl.zeros((I, P), tl.float32)  # Qᵀ f: the feature in the space of y
    square_I = tl.zeros((I,), tl.float32)
    for start in tl.range(0, F, K, num_stages=STAGES):
        f_K = (start + tl.arange(0, K)).to(tl.int64)
        in_IK = in_I[:, None] & (f_K < F)[None, :]
        f_IK = tl.load(features + b * f_b + n_I[:, None] * f_n + f_K[None, :] * f_c, mask=in_IK, other=0.0).to(tl.float32)
        q_KP = tl.load(basis + f_K[:, None] * P + c_P[None, :], mask=(f_K < F)[:, None], other=0.0)
        fq_IP = tl.dot(f_IK, q_KP, fq_IP, input_precision="tf32x3")
        square_I += tl.sum(f_IK * f_IK, 1)

    norm_I = tl.sqrt(tl.sum(y_IP * y_IP, 1))
    f_norm_I = tl.sqrt(square_I)
    tl.store(y_inverse + b * N + n_I, 1.0 / tl.maximum(norm_I, NORM_EPS), mask=in_I)
    tl.store(f_inverse + b * N + n_I, 1.0 / tl.maximum(f_norm_I, NORM_EPS), mask=in_I)
    term_I, weight_f_I, weight_y_I = _cosine_terms(tl.sum(y_IP * fq_IP, 1), norm_I, f_norm_I, in_I, B, N, MARGIN, COSINE_EPS)
    tl.store(losses + tl.program_id(0), tl.sum(term_I, 0))
    if dz is not None:
        dy_IP = weight_f_I[:, None] * fq_IP + weight_y_I[:, None] * y_IP
        _store_through_root(dy_IP, root, dz + b * dz_b, n_I, in_IP, C, dz_n, dz_c, P)
    if f_weight is not None:
        tl.store(y_weight + b * N + n_I, weight_y_I, mask=in_I)
        tl.store(f_weight + b * N + n_I, weight_f_I, mask=in_I)


@triton.jit
def _store_through_root(dy_IP, root, dz, n_I, in_IP, C, dz_n, dz_c, P: tl.constexpr):
    """dz = rootᵀ dy."""
    c_P = tl.arange(0, P)
    root_PP = tl.load(root + c_P[:, None] * P + c_P[None, :], mask=(c_P < C)[:, None], other=0.0).to(tl.float32)
    dz_IP = tl.dot(dy_IP, root_PP, input_precision="tf32x3")
    tl.store(dz + n_I[:, None] * dz_n + c_P.to(tl.int64)[None, :] * dz_c, dz_IP, mask=in_IP)


@triton.jit
def vf_tokens_direct(
    z, features, y_inverse, f_inverse, losses, dz,
    B, N, C, z_b, z_c, z_n, f_b, f_c, f_n, dz_b, dz_c, dz_n,
    MARGIN: tl.constexpr, NORM_EPS: tl.constexpr, COSINE_EPS: tl.constexpr, I: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`vf_tokens` without a projection: y is z itself, of as many channels as the features."""
    tiles = tl.cdiv(N, I)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n_I = ((tl.program_id(0) % tiles) * I + tl.arange(0, I)).to(tl.int64)
    in_I = n_I < N
    z_I = z + b * z_b + n_I * z_n
    f_I = features + b * f_b + n_I * f_n

    square_I = tl.zeros((I,), tl.float32)
    f_square_I = tl.zeros((I,), tl.float32)
    dot_I = tl.zeros((I,), tl.float32)
    for start in tl.range(0, C, K, num_stages=STAGES):
        c_K = (start + tl.arange(0, K)).to(tl.int64)
        in_IK = in_I[:, None] & (c_K < C)[None, :]
        z_IK = tl.load(z_I[:, None] + c_K[None, :] * z_c, mask=in_IK, other=0.0).to(tl.float32)
        f_IK = tl.load(f_I[:, None] + c_K[None, :] * f_c, mask=in_IK, other=0.0).to(tl.float32)
        square_I += tl.sum(z_IK * z_IK, 1)
        f_square_I += tl.sum(f_IK * f_IK, 1)
        dot_I += tl.sum(z_IK * f_IK, 1)

    norm_I = tl.sqrt(square_I)
    f_norm_I = tl.sqrt(f_square_I)
    tl.store(y_inverse + b * N + n_I, 1.0 / tl.maximum(norm_I, NORM_EPS), mask=in_I)
    tl.store(f_inverse + b * N + n_I, 1.0 / tl.maximum(f_norm_I, NORM_EPS), mask=in_I)
    term_I, weight_f_I, weight_z_I = _cosine_terms(dot_I, norm_I, f_norm_I, in_I, B, N, MARGIN, COSINE_EPS)
    tl.store(losses + tl.program_id(0), tl.sum(term_I, 0))
    if dz is not None:
        for start in tl.range(0, C, K, num_stages=STAGES):
            c_K = (start + tl.arange(0, K)).to(tl.int64)
            in_IK = in_I[:, None] & (c_K < C)[None, :]
            z_IK = tl.load(z_I[:, None] + c_K[None, :] * z_c, mask=in_IK, other=0.0).to(tl.float32)
            f_IK = tl.load(f_I[:, None] + c_K[None, :] * f_c, mask=in_IK, other=0.0).to(tl.float32)
            dz_IK = weight_f_I[:, None] * f_IK + weight_z_I[:, None] * z_IK
            tl.store(dz + b * dz_b + n_I[:, None] * dz_n + c_K[None, :] * dz_c, dz_IK, mask=in_IK)


@triton.jit
def _halves(x):
    """x ~ high + low, two fp16 of 11 bits each. For x = 256 times a part of a unit vector nothing underflows that counts."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _cosines(x, inverse_I, inverse_J, n_I, n_J, in_I, in_J, C, x_c, x_n, K: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr):
    """cos(x_i, x_j) of tokens i and j of one sample, K channels at a time: [I, J]. WIDE: x is multiplied in halves."""
    dots_IJ = tl.zeros((n_I.shape[0], n_J.shape[0]), tl.float32)
    for start in tl.range(0, C, K, num_stages=STAGES):
        c_K = (start + tl.arange(0, K)).to(tl.int64)
        x_IK = tl.load(x + n_I[:, None] * x_n + c_K[None, :] * x_c, mask=in_I[:, None] & (c_K < C)[None, :], other=0.0)
        x_KJ = tl.load(x + n_J[None, :] * x_n + c_K[:, None] * x_c, mask=in_J[None, :] & (c_K < C)[:, None], other=0.0)
        if WIDE:
            dots_IJ = _dot(_halves(x_IK.to(tl.float32) * (256 * inverse_I)[:, None]), _halves(x_KJ.to(tl.float32) * (256 * inverse_J)[None, :]), dots_IJ)  # noqa: E501
        else:
            dots_IJ = tl.dot(x_IK, x_KJ, dots_IJ)
    if WIDE:
        return dots_IJ * (1 / 65536)
    return dots_IJ * inverse_I[:, None] * inverse_J[None, :]


@triton.jit
def _dot(a, b, sum):
    """sum + a b of two pairs of halves; low times low is below fp32's rounding."""
    sum = tl.dot(a[1], b[0], sum)
    sum = tl.dot(a[0], b[1], sum)
    return tl.dot(a[0], b[0], sum)


@triton.jit
def vf_pairs(
    y, features, y_inverse, f_inverse, losses, dz, z, root, sums,
    B, N, C, F, y_b, y_c, y_n, f_b, f_c, f_n, z_b, z_c, z_n, dz_b, dz_c, dz_n,
    MARGIN: tl.constexpr, NORM_EPS: tl.constexpr, WHOLE: tl.constexpr, Y_WIDE: tl.constexpr, F_WIDE: tl.constexpr,
    P: tl.constexpr, I: tl.constexpr, J: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """mdms. One program: I tokens of one sample against all of its tokens, and the gradient of P channels of y.

    The similarities live in registers, J tokens at a time; programs of other channels compute them anew. WHOLE: P holds all
    channels. With M the sign of the difference D where its margin is exceeded, and ŷ = y / ‖y‖:

        ∂mdms/∂y_i = 2 / (B N² ‖y_i‖) (Σ_j M_ij ŷ_j - ŷ_i Σ_j M_ij cos(y_i, y_j))
    """
    tiles = tl.cdiv(N, I)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n_I = ((tl.program_id(0) % tiles) * I + tl.arange(0, I)).to(tl.int64)
    in_I = n_I < N
    c_P = (tl.program_id(1) * P + tl.arange(0, P)).to(tl.int64)
    in_IP = in_I[:, None] & (c_P < C)[None, :]
    y += b * y_b
    features += b * f_b
    y_inverse_I = tl.load(y_inverse + b * N + n_I, mask=in_I, other=0.0)
    f_inverse_I = tl.load(f_inverse + b * N + n_I, mask=in_I, other=0.0)
    y_unclamped_I = y_inverse_I < 1.0 / NORM_EPS
    unclamped_I = y_unclamped_I & (f_inverse_I < 1.0 / NORM_EPS)
    y_IP = tl.load(y + n_I[:, None] * y_n + c_P[None, :] * y_c, mask=in_IP, other=0.0).to(tl.float32)
    unit_IP = y_IP * y_inverse_I[:, None]

    loss_I = tl.zeros((I,), tl.float32)
    along_I = tl.zeros((I,), tl.float32)
    pull_IP = tl.zeros((I, P), tl.float32)
    for start in range(0, N, J):
        n_J = (start + tl.arange(0, J)).to(tl.int64)
        in_J = n_J < N
        y_inverse_J = tl.load(y_inverse + b * N + n_J, mask=in_J, other=0.0)
        f_inverse_J = tl.load(f_inverse + b * N + n_J, mask=in_J, other=0.0)
        f_cosine_IJ = _cosines(features, f_inverse_I, f_inverse_J, n_I, n_J, in_I, in_J, F, f_c, f_n, K, F_WIDE, STAGES)
        y_JP = tl.load(y + n_J[:, None] * y_n + c_P[None, :] * y_c, mask=in_J[:, None] & (c_P < C)[None, :], other=0.0)
        high_JP, low_JP = _halves(y_JP.to(tl.float32) * (256 * y_inverse_J)[:, None])
        if WHOLE:
            zero_IJ = tl.zeros((I, J), tl.float32)
            y_cosine_IJ = _dot(_halves(256 * unit_IP), (tl.trans(high_JP), tl.trans(low_JP)), zero_IJ) * (1 / 65536)
        else:
            y_cosine_IJ = _cosines(y, y_inverse_I, y_inverse_J, n_I, n_J, in_I, in_J, C, y_c, y_n, K, Y_WIDE, STAGES)
        itself_IJ = (n_I[:, None] == n_J[None, :]) & unclamped_I[:, None]  # cosine 1 with itself, twice: no rounding to punish
        difference_IJ = tl.where(itself_IJ, 0.0, y_cosine_IJ - f_cosine_IJ)
        excess_IJ = tl.abs(difference_IJ) - MARGIN
        exceeds_IJ = (excess_IJ > 0) & in_I[:, None] & in_J[None, :]
        loss_I += tl.sum(tl.where(exceeds_IJ, excess_IJ, 0.0), 1)
        if dz is not None:
            sign_IJ = tl.where(exceeds_IJ & (difference_IJ != 0), tl.where(difference_IJ > 0, 1.0, -1.0), 0.0)
            along_I += tl.sum(sign_IJ * y_cosine_IJ, 1)
            pull_IP = tl.dot(sign_IJ.to(tl.float16), low_JP, pull_IP)
            pull_IP = tl.dot(sign_IJ.to(tl.float16), high_JP, pull_IP)

    mean = 1.0 / (B * 1.0) / N / N
    if tl.program_id(1) == 0:
        tl.store(losses + tl.program_id(0), tl.sum(loss_I, 0) * mean)
    if dz is not None:
        along_I = tl.where(y_unclamped_I, along_I, 0.0)  # a clamped norm is a constant
        dy_IP = (2 * mean * y_inverse_I)[:, None] * (pull_IP * (1 / 256) - along_I[:, None] * unit_IP)
        if root is None:
            tl.store(dz + b * dz_b + n_I[:, None] * dz_n + c_P[None, :] * dz_c, dy_IP, mask=in_IP)
        else:
            _store_through_root(dy_IP, root, dz + b * dz_b, n_I, in_IP, C, dz_n, dz_c, P)
        if sums is not None:
            z_IP = tl.load(z + b * z_b + n_I[:, None] * z_n + c_P[None, :] * z_c, mask=in_IP, other=0.0).to(tl.float32)
            sum_PP = tl.dot(tl.trans(dy_IP), z_IP, input_precision="tf32x3")
            tl.store(sums + tl.program_id(0).to(tl.int64) * P * P + c_P[:, None] * P + c_P[None, :], sum_PP)


@triton.jit
def vf_projection_gradients(
    z, features, y, y_weight, f_weight, basis, sums, shares,
    B, N, C, F, SPLITS, SUMS, z_b, z_c, z_n, f_b, f_c, f_n,
    P: tl.constexpr, R: tl.constexpr, I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """∂W = Σ_i ∂p_i z_iᵀ. One program: R rows of both, and one of SPLITS shares of the sum.

    In mcos ∂p = f_weight f + y_weight Q y, which is summed token by token: the two nearly cancel where p and f are aligned. In
    mdms ∂p = Q ∂y, and `vf_pairs` left Σ ∂y zᵀ, a matrix a program. A share is every SPLITS-th tile of tokens, and matrix.
    """
    f_R = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    split = tl.program_id(1)
    in_R = f_R < F
    c_P = tl.arange(0, P).to(tl.int64)
    in_RP = in_R[:, None] & (c_P < C)[None, :]
    q_RP = tl.load(basis + f_R[:, None] * P + c_P[None, :], mask=in_R[:, None], other=0.0)

    sum_PP = tl.zeros((P, P), tl.float32)
    for step in range(tl.cdiv(SUMS - split, SPLITS)):
        sum_PP += tl.load(sums + (split.to(tl.int64) + step * SPLITS) * (P * P) + c_P[:, None] * P + c_P[None, :])
    mdms_RP = tl.dot(q_RP, sum_PP, input_precision="tf32x3")
    tl.store(shares + (2 * split * F + f_R)[:, None] * C + c_P[None, :], mdms_RP, mask=in_RP)

    mcos_RP = tl.zeros((R, P), tl.float32)
    tiles = tl.cdiv(N, I)
    for step in tl.range(0, tl.cdiv(B * tiles - split, SPLITS), num_stages=STAGES):
        tile = split.to(tl.int64) + step * SPLITS
        b = tile // tiles
        n_I = (tile % tiles) * I + tl.arange(0, I)
        in_I = n_I < N
        in_IP = in_I[:, None] & (c_P < C)[None, :]
        f_RI = tl.load(features + b * f_b + n_I[None, :] * f_n + f_R[:, None] * f_c, mask=in_R[:, None] & in_I[None, :], other=0.0)
        y_PI = tl.load(y + (b * N + n_I)[None, :] * C + c_P[:, None], mask=tl.trans(in_IP), other=0.0)
        z_IP = tl.load(z + b * z_b + n_I[:, None] * z_n + c_P[None, :] * z_c, mask=in_IP, other=0.0).to(tl.float32)
        y_weight_I = tl.load(y_weight + b * N + n_I, mask=in_I, other=0.0)
        f_weight_I = tl.load(f_weight + b * N + n_I, mask=in_I, other=0.0)
        dp_RI = f_weight_I[None, :] * f_RI.to(tl.float32) + y_weight_I[None, :] * tl.dot(q_RP, y_PI, input_precision="tf32x3")
        mcos_RP = tl.dot(dp_RI, z_IP, mcos_RP, input_precision="tf32x3")
    tl.store(shares + ((2 * split + 1) * F + f_R)[:, None] * C + c_P[None, :], mcos_RP, mask=in_RP)
