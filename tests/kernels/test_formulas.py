"""The elementwise operators, the group norm and the flow's, each against PyTorch's own or the reference's values."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vavae_kernels import flow_interpolate, flow_loss, group_norm_silu, rms_norm, swiglu

B, C = 2, 4


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_rms_norm_is_torchs():
    x, weight = randn(4, 7), randn(7)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), F.rms_norm(x, (7,), weight, 1e-3))
    torch.testing.assert_close(rms_norm(x, None), F.rms_norm(x, (7,), eps=1e-6))
    assert rms_norm(torch.zeros(2, 3), None).abs().max() == 0


def test_swiglu_is_silu_times_the_second_half():
    a, b = randn(2, 5), randn(2, 5)
    torch.testing.assert_close(swiglu(torch.cat([a, b], dim=-1)), F.silu(a) * b)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cotangent_format", [torch.contiguous_format, torch.channels_last])
def test_group_norm_silu_keeps_the_memory_format(memory_format, cotangent_format):
    x = randn(2, 8, 3, 5).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = randn(8), randn(8)
    y = group_norm_silu(x, 4, weight, bias)
    assert y.is_contiguous(memory_format=memory_format)
    expected = F.silu(F.group_norm(x, 4, weight, bias, 1e-6))
    torch.testing.assert_close(y, expected)
    cotangent = randn(2, 8, 3, 5).contiguous(memory_format=cotangent_format)
    torch.testing.assert_close(torch.autograd.grad(y, x, cotangent), torch.autograd.grad(expected, x, cotangent))
    with pytest.raises(ValueError, match="8 channels do not divide into 3 groups"):
        group_norm_silu(x, 3, weight, bias)


def test_flow_path_goes_from_noise_to_data():
    x0, x1 = torch.randn(3, 4), torch.randn(3, 4)
    ends = flow_interpolate(x0, x1, torch.zeros(3)), flow_interpolate(x0, x1, torch.ones(3))
    assert torch.equal(ends[0], x0) and torch.equal(ends[1], x1)


def test_flow_loss_is_torchs():
    v, x0, x1 = randn(B, C, 3, 2), randn(B, C, 3, 2), randn(B, C, 3, 2)
    mse, cosine = flow_loss(v, x0, x1)
    torch.testing.assert_close(mse, F.mse_loss(v, x1 - x0, reduction="none").mean((1, 2, 3)))
    torch.testing.assert_close(cosine, (1 - F.cosine_similarity(v, x1 - x0, dim=1)).mean((1, 2)))


def test_flow_loss_of_zero_vectors_is_finite():
    v = torch.zeros(1, C, 2, 2, requires_grad=True)
    x = torch.randn(1, C, 2, 2)
    mse, cosine = flow_loss(v, x, x)
    assert mse.item() == 0 and cosine.item() == 1
    assert torch.autograd.grad((mse + cosine).sum(), v)[0].isfinite().all()


def test_flow_loss_is_the_references(golden_dir):
    golden = load_file(golden_dir / "transport.safetensors")
    mse, cosine = flow_loss(golden["pred"], golden["x0"], golden["x1"])
    torch.testing.assert_close(mse, golden["mse"])
    torch.testing.assert_close(cosine, golden["cos"])
