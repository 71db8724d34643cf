"""vf_loss: the formulas written out, its accuracy whatever the projection is, zero tokens, and the reference's values."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vavae_kernels import _compat, vf_loss
from vavae_kernels.testing.spec import specs
from vavae_kernels.testing.traffic import forward_and_backward

no_triton = pytest.mark.skipif(_compat.TRITON_VERSION is None, reason="Triton is not installed: pip install triton")
each_impl = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=no_triton)])
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def textbook_vf_loss(z, projection, features, distmat_margin, cos_margin):
    """The formulas with the projected latent written out: what the operator must equal."""
    p = z if projection is None else F.conv2d(z, projection[:, :, None, None])
    p_unit, f_unit = (F.normalize(x.flatten(2), dim=1) for x in (p, features))
    p_similarity, f_similarity = (torch.einsum("bci,bcj->bij", x, x) for x in (p_unit, f_unit))
    mdms = F.relu((p_similarity - f_similarity).abs() - distmat_margin).mean()
    return mdms, F.relu(1 - cos_margin - F.cosine_similarity(features, p)).mean()


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("margins", [(0.0, 0.0), (0.25, 0.5)])
def test_vf_loss_is_the_textbook_and_its_gradients_come_apart(projected, margins):
    features = randn(2, 12, 3, 4)
    z = randn(2, 5 if projected else 12, 3, 4).requires_grad_()
    projection = randn(12, 5).requires_grad_() if projected else None
    inputs = [z] if projection is None else [z, projection]
    for ours, textbook in zip(vf_loss(z, projection, features, *margins), textbook_vf_loss(z, projection, features, *margins)):
        torch.testing.assert_close(ours, textbook)
        expected = torch.autograd.grad(textbook, inputs, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(ours, inputs, retain_graph=True), expected)


@each_impl
def test_vf_loss_with_zero_tokens_is_finite(impl):
    for projection in (None, torch.randn(6, 6, device=DEVICE), torch.randn(6, 4, device=DEVICE)):
        z, features = torch.randn(2, 6 if projection is None else projection.shape[1], 3, 3, device=DEVICE), torch.randn(2, 6, 3, 3, device=DEVICE)
        z[0, :, 1, 1] = 0
        features[1, :, 2, 2] = 0
        z.requires_grad_()
        losses = vf_loss(z, projection, features, impl=impl)
        expected = textbook_vf_loss(z, projection, features, 0.0, 0.0)
        for loss, textbook in zip(losses, expected):
            torch.testing.assert_close(loss, textbook)
            assert torch.autograd.grad(loss, z, retain_graph=True)[0].isfinite().all()


@no_triton
def test_channels_and_rows_of_the_projection_further_apart_than_32_bits():
    """Offsets that an int32 would wrap; the memory between is never touched, so it costs none."""
    z, projection = torch.randn(1, 3, 1, 2, device=DEVICE).bfloat16(), torch.randn(5, 3, device=DEVICE).bfloat16()
    apart = [torch.empty_strided(x.shape, strides, dtype=x.dtype, device=DEVICE).copy_(x)
             for x, strides in ((z, (1, 2**30 + 8, 2, 1)), (projection, (2**29 + 8, 1)))]  # fmt: skip
    features = torch.randn(1, 5, 1, 2, device=DEVICE)
    found, expected = (
        (*losses, *torch.autograd.grad(losses[0] + losses[1], inputs))
        for inputs in ([x.requires_grad_() for x in apart], [z.requires_grad_(), projection.requires_grad_()])
        for losses in [vf_loss(*inputs, features, impl="triton")]
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def badly_conditioned(decades: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z (2, 8, 4, 4) in the two directions that W (64, 8), of condition number 10 ** decades, shrinks most."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, 8, generator=generator, dtype=torch.float64))[0] for n in (64, 8))
    w = left @ torch.diag(torch.logspace(0, -decades, 8, dtype=torch.float64)) @ right.T
    z = torch.einsum("ck,bkhw->bchw", right[:, -2:], torch.randn(2, 2, 4, 4, generator=generator, dtype=torch.float64))
    features = torch.randn(2, 64, 4, 4, generator=generator, dtype=torch.float64)
    return z.float().to(DEVICE), w.float().to(DEVICE), features.float().to(DEVICE)


@each_impl
@pytest.mark.parametrize("decades", [0, 3, 5])
def test_a_badly_conditioned_projection_costs_no_more_digits_than_the_projected_latent_has(decades, impl):
    """Error against fp64 of losses and gradients: at most twice that of the formulas in fp32, and one rounding.

    W squared, as in z W^T W z, would lose twice the digits: cosines beyond 1 at a condition number of 1e5.
    """

    def ours(*inputs):
        return vf_loss(*inputs, impl=impl)

    errors = {ours: [0.0] * 6, textbook_vf_loss: [0.0] * 6}
    rounding = [0.0] * 6
    for seed in range(3):
        inputs = badly_conditioned(decades, seed)

        def results(function, dtype, inputs=inputs):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs[:2]]
            losses = function(*leaves, inputs[2].to(dtype), 0.0, 0.0)
            grads = [grad for loss in losses for grad in torch.autograd.grad(loss, leaves, retain_graph=True)]
            return [x.detach().double() for x in (*losses, *grads)]

        exact = results(textbook_vf_loss, torch.float64)
        rounding = [max(old, x.norm().item() * torch.finfo(torch.float32).eps) for old, x in zip(rounding, exact)]
        for function, worst in errors.items():
            errors[function] = [max(old, (x - y).norm().item()) for old, x, y in zip(worst, results(function, torch.float32), exact)]
    for mine, eager, one in zip(errors[ours], errors[textbook_vf_loss], rounding):
        assert mine <= 2 * (eager + one)


@no_triton
@pytest.mark.parametrize("cotangents", [(1.0, None), (None, 1.0), (2.0, -3.0)])
def test_a_loss_without_a_cotangent_takes_no_part(cotangents):
    """One loss, the other or both: the kernels' gradients are the textbook's, also in columns of W that are zero or depend on others."""
    z, w, features = torch.randn(2, 6, 3, 3, device=DEVICE), torch.randn(20, 6, device=DEVICE), torch.randn(2, 20, 3, 3, device=DEVICE)
    w[:, 1] = 0
    w[:, 4] = w[:, 0] + w[:, 2]
    leaves = [z.requires_grad_(), w.requires_grad_()]

    def gradients(losses):
        total = sum(g * loss for g, loss in zip(cotangents, losses) if g is not None)
        return torch.autograd.grad(total, leaves)

    for ours, expected in zip(gradients(vf_loss(*leaves, features, impl="triton")), gradients(textbook_vf_loss(*leaves, features, 0.0, 0.0))):
        assert (ours - expected).norm() <= 1e-4 * expected.norm()


@no_triton
def test_a_real_batch_takes_a_fifth_of_a_megabyte_an_image():
    """Beyond inputs and outputs, in forward and backward together; and no tensor holds p or a matrix of pairs."""
    spec = specs()["vf_loss"]
    shape = spec.real["f16d32"]
    B, C, F, N = (*(shape[letter] for letter in "BCF"), shape["H"] * shape["W"])
    forward, backward = forward_and_backward(spec, "f16d32", "mixed", "published")
    outputs = 4 * (2 + B * C * N + F * C)  # the losses, dz and dW
    assert forward.allocated + backward.allocated - outputs <= 0.2e6 * B
    launches = (*forward.launches, *backward.launches)
    features = max((t for launch in launches for t in launch.tensors()), key=torch.Tensor.numel)
    assert features.dtype == torch.bfloat16 and features.numel() == B * F * N
    others = {t.numel() for launch in launches for t in launch.tensors() if t.dtype != torch.bfloat16}
    assert max(others) < B * N * min(N, F)


def test_a_batch_of_no_tokens_is_refused():
    for shape in ((0, 3, 2, 2), (2, 3, 0, 2)):
        with pytest.raises(ValueError, match=r"vf_loss: z is empty, shape \("):
            vf_loss(torch.zeros(shape), None, torch.zeros(shape))


def test_vf_loss_is_the_references(golden_dir):
    golden = load_file(golden_dir / "vf_loss.safetensors")
    for case in sorted({key.split(".")[0] for key in golden}):
        z = golden[f"{case}.z"].requires_grad_()
        mdms, mcos = vf_loss(z, None, golden[f"{case}.aux"], *golden[f"{case}.margins"].tolist())
        for name, loss in (("mdms", mdms), ("mcos", mcos)):
            torch.testing.assert_close(loss, golden[f"{case}.{name}"].float(), rtol=1e-5, atol=1e-7)
            grad = torch.autograd.grad(loss, z, retain_graph=True)[0]
            expected = golden[f"{case}.grad_{name}"]
            assert (grad - expected).norm() <= 1e-4 * expected.norm() + 1e-8
