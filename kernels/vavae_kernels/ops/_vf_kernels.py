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
    for r in tl.range(R, loop_unroll_factor=4):  # four loads in flight
        w_row = projection + tl.cast(r, tl.int64) * w_f
        w_P = tl.load(w_row + c_P.to(tl.int64) * w_c, mask=c_P < tl.where(first + r < F, C, 0), other=0.0).to(tl.float64)
        gram_PP += w_P[:, None] * w_P[None, :]
    tl.store(gram + (tl.program_id(0) * P + c_P[:, None]) * P + c_P[None, :], gram_PP)


@triton.jit
def vf_factor(projection, gram, root, basis, F, C, w_f, w_c, PARTS, P: tl.constexpr, R: tl.constexpr):
    """W = Q root with root upper triangular and QᵀQ = 1, by Cholesky's WᵀW = rootᵀ root in fp64. One program: R rows of Q.

    Every program factors WᵀW anew, which costs less than one more launch, with the columns of W scaled to length 1. A pivot
    that is rounding belongs to a column that depends on those before it: its row of root and its column of Q are zero, which
    moves W z by less than fp32 rounds it.
    """
    c_P = tl.arange(0, P)
    f_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    in_RP = (f_R < F)[:, None] & (c_P < C)[None, :]
    left_PP = tl.zeros((P, P), tl.float64)
    for part in tl.range(PARTS, loop_unroll_factor=4):
        left_PP += tl.load(gram + (part * P + c_P[:, None]) * P + c_P[None, :])
    length_P = tl.sqrt(tl.sum(tl.where(c_P[:, None] == c_P[None, :], left_PP, 0.0), 0))
    inverse_P = tl.where(length_P > 0, 1.0 / tl.where(length_P > 0, length_P, 1.0), 0.0)
    left_PP *= inverse_P[:, None] * inverse_P[None, :]
    q_RP = tl.load(projection + f_R[:, None] * w_f + c_P.to(tl.int64)[None, :] * w_c, mask=in_RP, other=0.0).to(tl.float64) * inverse_P[None, :]
    for k in range(C):
        row_P = tl.sum(tl.where((c_P == k)[:, None], left_PP, 0.0), 0)
        pivot = tl.sum(tl.where(c_P == k, row_P, 0.0), 0)
        kept = pivot > C * 2.220446049250313e-16
        scale = tl.where(kept, 1.0 / tl.sqrt(tl.where(kept, pivot, 1.0)), 0.0)
        row_P = tl.where(c_P >= k, row_P * scale, 0.0)
        left_PP -= row_P[:, None] * row_P[None, :]
        q_R = tl.sum(tl.where((c_P == k)[None, :], q_RP, 0.0), 1) * scale
        q_RP = tl.where((c_P == k)[None, :], q_R[:, None], q_RP - q_R[:, None] * row_P[None, :])
        if tl.program_id(0) == 0:
            tl.store(root + k * P + c_P, row_P * length_P)
    tl.store(basis + f_R[:, None] * P + c_P[None, :], q_RP.to(tl.float32), mask=(f_R < F)[:, None])


@triton.jit
def _cosine_loss(
    dot_I, square_I, f_square_I, y_inverse, f_inverse, losses, at_I, in_I,
    B, N, MARGIN: tl.constexpr, NORM_EPS: tl.constexpr, COSINE_EPS: tl.constexpr,
):  # fmt: skip
    """mcos of I tokens with p · f = dot: stores its sum and 1 / ‖p‖, 1 / ‖f‖ -> the weights in ∂mcos/∂p = weight_f f + weight_p p."""
    norm_I = tl.sqrt(square_I)
    f_norm_I = tl.sqrt(f_square_I)
    tl.store(y_inverse + at_I, 1.0 / tl.maximum(norm_I, NORM_EPS), mask=in_I)
    tl.store(f_inverse + at_I, 1.0 / tl.maximum(f_norm_I, NORM_EPS), mask=in_I)
    p_inverse_I = 1.0 / tl.maximum(norm_I, COSINE_EPS)
    f_inverse_I = 1.0 / tl.maximum(f_norm_I, COSINE_EPS)
    cosine_I = dot_I * p_inverse_I * f_inverse_I
    hinge_I = 1.0 - MARGIN - cosine_I
    mean = 1.0 / (B * 1.0) / N
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(in_I, tl.maximum(hinge_I, 0.0), 0.0), 0) * mean)
    slope_I = tl.where(in_I & (hinge_I > 0), -mean, 0.0) * p_inverse_I
    weight_p_I = tl.where(norm_I >= COSINE_EPS, -slope_I * cosine_I * p_inverse_I, 0.0)  # a clamped norm is a constant
    return slope_I * f_inverse_I, weight_p_I


@triton.jit
def vf_tokens(
    z, features, root, basis, y, y_inverse, f_inverse, y_weight, f_weight, losses, dy,
    B, N, C, F, z_b, z_c, z_n, f_b, f_c, f_n,
    MARGIN: tl.constexpr, NORM_EPS: tl.constexpr, COSINE_EPS: tl.constexpr,
    P: tl.constexpr, I: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = root z, both inverse norms, mcos and ∂mcos/∂y. One program: I tokens of one sample."""
    tiles = tl.cdiv(N, I)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n_I = ((tl.program_id(0) % tiles) * I + tl.arange(0, I)).to(tl.int64)
    in_I = n_I < N
    c_P = tl.arange(0, P).to(tl.int64)
    in_IP = in_I[:, None] & (c_P < C)[None, :]

    y_IP = tl.zeros((I, P), tl.float64)
    for c in tl.range(C, loop_unroll_factor=4):
        z_I = tl.load(z + b * z_b + tl.cast(c, tl.int64) * z_c + n_I * z_n, mask=in_I, other=0.0).to(tl.float64)
        y_IP += z_I[:, None] * tl.load(root + c_P * P + c, mask=c_P < C, other=0.0)[None, :]
    y_IP = y_IP.to(tl.float32)
    at_IP = (b * N + n_I)[:, None] * C + c_P[None, :]
    tl.store(y + at_IP, y_IP, mask=in_IP)

    fq_IP = tl.zeros((I, P), tl.float32)  # Qᵀ f: the feature in the space of y
    f_square_I = tl.zeros((I,), tl.float32)
    for start in tl.range(0, F, K, num_stages=STAGES):
        f_K = (start + tl.arange(0, K)).to(tl.int64)
        in_IK = in_I[:, None] & (f_K < F)[None, :]
        f_IK = tl.load(features + b * f_b + n_I[:, None] * f_n + f_K[None, :] * f_c, mask=in_IK, other=0.0).to(tl.float32)
        q_KP = tl.load(basis + f_K[:, None] * P + c_P[None, :], mask=(f_K < F)[:, None], other=0.0)
        fq_IP = tl.dot(f_IK, q_KP, fq_IP, input_precision="tf32x3")
        f_square_I += tl.sum(f_IK * f_IK, 1)

    weight_f_I, weight_y_I = _cosine_loss(
        tl.sum(y_IP * fq_IP, 1), tl.sum(y_IP * y_IP, 1), f_square_I, y_inverse, f_inverse, losses, b * N + n_I, in_I,
        B, N, MARGIN, NORM_EPS, COSINE_EPS,
    )  # fmt: skip
    if dy is not None:
        tl.store(dy + at_IP, weight_f_I[:, None] * fq_IP + weight_y_I[:, None] * y_IP, mask=in_IP)
        tl.store(y_weight + b * N + n_I, weight_y_I, mask=in_I)
        tl.store(f_weight + b * N + n_I, weight_f_I, mask=in_I)


@triton.jit
def vf_tokens_direct(
    z, features, y_inverse, f_inverse, losses, dy,
    B, N, C, z_b, z_c, z_n, f_b, f_c, f_n,
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
        z_IK, f_IK = _channels(z_I, f_I, start + tl.arange(0, K), in_I, C, z_c, f_c)
        square_I += tl.sum(z_IK * z_IK, 1)
        f_square_I += tl.sum(f_IK * f_IK, 1)
        dot_I += tl.sum(z_IK * f_IK, 1)

    weight_f_I, weight_z_I = _cosine_loss(
        dot_I, square_I, f_square_I, y_inverse, f_inverse, losses, b * N + n_I, in_I, B, N, MARGIN, NORM_EPS, COSINE_EPS
    )
    if dy is not None:
        for start in tl.range(0, C, K, num_stages=STAGES):
            c_K = (start + tl.arange(0, K)).to(tl.int64)
            z_IK, f_IK = _channels(z_I, f_I, c_K, in_I, C, z_c, f_c)
            dy_IK = weight_f_I[:, None] * f_IK + weight_z_I[:, None] * z_IK
            tl.store(dy + (b * N + n_I)[:, None] * C + c_K[None, :], dy_IK, mask=in_I[:, None] & (c_K < C)[None, :])


@triton.jit
def _channels(z_I, f_I, c_K, in_I, C, z_c, f_c):
    """K channels of the tokens at the pointers z_I and f_I."""
    c_K = c_K.to(tl.int64)
    in_IK = in_I[:, None] & (c_K < C)[None, :]
    z_IK = tl.load(z_I[:, None] + c_K[None, :] * z_c, mask=in_IK, other=0.0).to(tl.float32)
    f_IK = tl.load(f_I[:, None] + c_K[None, :] * f_c, mask=in_IK, other=0.0).to(tl.float32)
    return z_IK, f_IK


@triton.jit
def _halves(x):
    """256 x ~ high + low, two fp16 of 11 bits each. For x a part of a unit vector nothing underflows that counts."""
    high = (256 * x).to(tl.float16)
    return high, (256 * x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _dot_of_units(a, b, sum):
    """sum + 65536 a b, a and b being parts of unit vectors; low times low is below fp32's rounding."""
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    sum = tl.dot(a_low, b_high, sum)
    sum = tl.dot(a_high, b_low, sum)
    return tl.dot(a_high, b_high, sum)


@triton.jit
def _cosines(x, inverse, n_I, n_J, N, C, x_c, x_n, K: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr):
    """cos(x_i, x_j) of tokens i and j of one sample, K channels at a time: [I, J]. WIDE: x is multiplied in halves.

    Factors that wait for the end of the loop are loaded there: through it they would take the registers of a tile.
    """
    in_I = n_I < N
    in_J = n_J < N
    if WIDE:
        inverse_I = tl.load(inverse + n_I, mask=in_I, other=0.0)
        inverse_J = tl.load(inverse + n_J, mask=in_J, other=0.0)
    dots_IJ = tl.zeros((n_I.shape[0], n_J.shape[0]), tl.float32)
    for start in tl.range(0, C, K, num_stages=STAGES):
        c_K = start + tl.arange(0, K)
        x_IK = tl.load(x + n_I.to(tl.int64)[:, None] * x_n + c_K.to(tl.int64)[None, :] * x_c, mask=in_I[:, None] & (c_K < C)[None, :], other=0.0)
        x_KJ = tl.load(x + n_J.to(tl.int64)[None, :] * x_n + c_K.to(tl.int64)[:, None] * x_c, mask=in_J[None, :] & (c_K < C)[:, None], other=0.0)
        if WIDE:
            dots_IJ = _dot_of_units(x_IK.to(tl.float32) * inverse_I[:, None], x_KJ.to(tl.float32) * inverse_J[None, :], dots_IJ)
        else:
            dots_IJ = tl.dot(x_IK, x_KJ, dots_IJ)
    if WIDE:
        return dots_IJ * (1 / 65536)
    inverse_I = tl.load(inverse + n_I, mask=in_I, other=0.0)
    inverse_J = tl.load(inverse + n_J, mask=in_J, other=0.0)
    return dots_IJ * inverse_I[:, None] * inverse_J[None, :]


@triton.jit
def vf_pairs(
    y, features, y_inverse, f_inverse, losses, dy,
    B, N, C, F, y_b, y_n, y_c, f_b, f_c, f_n,
    MARGIN: tl.constexpr, NORM_EPS: tl.constexpr, Y_WIDE: tl.constexpr, F_WIDE: tl.constexpr,
    P: tl.constexpr, I: tl.constexpr, J: tl.constexpr, K: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """mdms and ∂mdms/∂y. One program: I tokens of one sample against all of its tokens, and the gradient of P channels of y.

    The similarities live in registers, J tokens at a time, K channels of f and L of y a step; programs of other channels compute
    them anew. With M the sign of the difference D where its margin is exceeded, and ŷ = y / ‖y‖:

        ∂mdms/∂y_i = 2 / (B N² ‖y_i‖) (Σ_j M_ij ŷ_j - ŷ_i Σ_j M_ij cos(y_i, y_j))
    """
    tiles = tl.cdiv(N, I)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n_I = (tl.program_id(0) % tiles) * I + tl.arange(0, I)
    in_I = n_I < N
    c_P = (tl.program_id(1) * P + tl.arange(0, P)).to(tl.int64)
    y += b * y_b
    features += b * f_b
    y_inverse += b * N
    f_inverse += b * N

    loss_I = tl.zeros((I,), tl.float32)
    along_I = tl.zeros((I,), tl.float32)
    pull_IP = tl.zeros((I, P), tl.float32)
    for start in range(0, N, J):
        n_J = start + tl.arange(0, J)
        in_J = n_J < N
        f_cosine_IJ = _cosines(features, f_inverse, n_I, n_J, N, F, f_c, f_n, K, F_WIDE, STAGES)
        y_cosine_IJ = _cosines(y, y_inverse, n_I, n_J, N, C, y_c, y_n, L, Y_WIDE, STAGES)
        f_inverse_I = tl.load(f_inverse + n_I, mask=in_I, other=0.0)
        y_inverse_I = tl.load(y_inverse + n_I, mask=in_I, other=0.0)
        y_inverse_J = tl.load(y_inverse + n_J, mask=in_J, other=0.0)
        unclamped_I = (y_inverse_I < 1.0 / NORM_EPS) & (f_inverse_I < 1.0 / NORM_EPS)
        itself_IJ = (n_I[:, None] == n_J[None, :]) & unclamped_I[:, None]  # cosine 1 with itself, twice: no rounding to punish
        difference_IJ = tl.where(itself_IJ, 0.0, y_cosine_IJ - f_cosine_IJ)
        excess_IJ = tl.abs(difference_IJ) - MARGIN
        exceeds_IJ = (excess_IJ > 0) & in_I[:, None] & in_J[None, :]
        loss_I += tl.sum(tl.where(exceeds_IJ, excess_IJ, 0.0), 1)
        if dy is not None:
            sign_IJ = tl.where(exceeds_IJ & (difference_IJ != 0), tl.where(difference_IJ > 0, 1.0, -1.0), 0.0)
            along_I += tl.sum(sign_IJ * y_cosine_IJ, 1)
            y_JP = tl.load(y + n_J.to(tl.int64)[:, None] * y_n + c_P[None, :] * y_c, mask=in_J[:, None] & (c_P < C)[None, :], other=0.0)
            high_JP, low_JP = _halves(y_JP.to(tl.float32) * y_inverse_J[:, None])
            pull_IP = tl.dot(sign_IJ.to(tl.float16), low_JP, pull_IP)
            pull_IP = tl.dot(sign_IJ.to(tl.float16), high_JP, pull_IP)

    mean = 1.0 / (B * 1.0) / N / N
    if tl.program_id(1) == 0:
        tl.store(losses + tl.program_id(0), tl.sum(loss_I, 0) * mean)
    if dy is not None:
        n_I = n_I.to(tl.int64)
        in_IP = in_I[:, None] & (c_P < C)[None, :]
        y_inverse_I = tl.load(y_inverse + n_I, mask=in_I, other=0.0)
        y_IP = tl.load(y + n_I[:, None] * y_n + c_P[None, :] * y_c, mask=in_IP, other=0.0).to(tl.float32)
        along_I = tl.where(y_inverse_I < 1.0 / NORM_EPS, along_I * y_inverse_I, 0.0)  # a clamped norm is a constant
        dy_IP = (2 * mean * y_inverse_I)[:, None] * (pull_IP * (1 / 256) - along_I[:, None] * y_IP)
        tl.store(dy + (b * N + n_I)[:, None] * C + c_P[None, :], dy_IP, mask=in_IP)


@triton.jit
def vf_tokens_backward(
    dy_mdms, dy_mcos, g_mdms, g_mcos, root, y, y_weight, dz, dq, dq_size,
    N, C, dz_b, dz_c, dz_n, P: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """∂z = rootᵀ ∂y, ∂y weighted by the cotangents g, of which one may be absent. One program: I tokens, P channels.

    For ∂W: ∂p = Q dq + g_mcos f_weight f with dq = g_mdms ∂mdms/∂y + g_mcos y_weight y; its largest part lies in dq_size.
    """
    tiles = tl.cdiv(N, I)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n_I = ((tl.program_id(0) % tiles) * I + tl.arange(0, I)).to(tl.int64)
    c_P = (tl.program_id(1) * P + tl.arange(0, P)).to(tl.int64)
    in_IP = (n_I < N)[:, None] & (c_P < C)[None, :]
    at_IP = (b * N + n_I)[:, None] * C + c_P[None, :]
    dy_IP = tl.zeros((I, P), tl.float32)
    if g_mdms is not None:
        dy_IP = tl.load(g_mdms) * tl.load(dy_mdms + at_IP, mask=in_IP, other=0.0)
    dq_IP = dy_IP
    if g_mcos is not None:
        dy_IP += tl.load(g_mcos) * tl.load(dy_mcos + at_IP, mask=in_IP, other=0.0)
    dz_IP = dy_IP
    if root is not None:
        root_PP = tl.load(root + c_P[:, None] * P + c_P[None, :], mask=(c_P < C)[:, None], other=0.0).to(tl.float32)
        dz_IP = tl.dot(dy_IP, root_PP, input_precision="tf32x3")
    tl.store(dz + b * dz_b + n_I[:, None] * dz_n + c_P[None, :] * dz_c, dz_IP.to(dz.dtype.element_ty), mask=in_IP)
    if dq is not None:
        if g_mcos is not None:
            y_IP = tl.load(y + at_IP, mask=in_IP, other=0.0)
            dq_IP += (tl.load(g_mcos) * tl.load(y_weight + b * N + n_I, mask=n_I < N, other=0.0))[:, None] * y_IP
        tl.store(dq + at_IP, dq_IP, mask=in_IP)
        tl.store(dq_size + b * N + n_I, tl.maximum(tl.max(tl.abs(dq_IP), 1), 1e-30), mask=n_I < N)


@triton.jit
def vf_projection_backward(
    z, features, g_mcos, f_weight, basis, dq, dq_size, shares,
    B, N, C, F, SPLITS, z_b, z_c, z_n, f_b, f_c, f_n,
    P: tl.constexpr, R: tl.constexpr, I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """∂W = Σ_i ∂p_i z_iᵀ with `vf_tokens_backward`'s ∂p. One program: R rows and every SPLITS-th tile of tokens.

    Q dq is formed token by token and not after the sum: where p and f are aligned it nearly cancels f's share.
    """
    f_R = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    split = tl.program_id(1)
    in_R = f_R < F
    c_P = tl.arange(0, P).to(tl.int64)
    q_RP = tl.load(basis + f_R[:, None] * P + c_P[None, :], mask=in_R[:, None], other=0.0)
    dw_RP = tl.zeros((R, P), tl.float32)
    tiles = tl.cdiv(N, I)
    for step in tl.range(0, tl.cdiv(B * tiles, SPLITS), num_stages=STAGES):
        tile = step * SPLITS + split
        b = (tile // tiles).to(tl.int64)
        n_I = ((tile % tiles) * I + tl.arange(0, I)).to(tl.int64)
        in_I = n_I < tl.where(tile < B * tiles, N, 0)
        in_PI = (c_P < C)[:, None] & in_I[None, :]
        size_I = tl.load(dq_size + b * N + n_I, mask=in_I, other=1.0)
        dq_PI = tl.load(dq + (b * N + n_I)[None, :] * C + c_P[:, None], mask=in_PI, other=0.0)
        dp_RI = _dot_of_units(q_RP, dq_PI / size_I[None, :], tl.zeros((R, I), tl.float32)) * (size_I / 65536)[None, :]
        if g_mcos is not None:
            weight_I = tl.load(g_mcos) * tl.load(f_weight + b * N + n_I, mask=in_I, other=0.0)
            in_RI = in_R[:, None] & in_I[None, :]
            f_RI = tl.load(features + b * f_b + n_I[None, :] * f_n + f_R[:, None] * f_c, mask=in_RI, other=0.0)
            dp_RI += weight_I[None, :] * f_RI.to(tl.float32)
        z_IP = tl.load(z + b * z_b + n_I[:, None] * z_n + c_P[None, :] * z_c, mask=tl.trans(in_PI), other=0.0).to(tl.float32)
        dw_RP = tl.dot(dp_RI, z_IP, dw_RP, input_precision="tf32x3")
    in_RP = in_R[:, None] & (c_P < C)[None, :]
    tl.store(shares + (split.to(tl.int64) * F + f_R)[:, None] * C + c_P[None, :], dw_RP, mask=in_RP)
