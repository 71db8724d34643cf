"""fp8 products: which layers, the same keys, a loss near that of bf16. The hardware's roundings are emulated."""

import sys

import pytest
import torch

from vavae_fast.errors import BadInput
from vavae_fast.models import LightningDiT, fp8

FORM = dict(input_size=4, patch_size=1, in_channels=4, hidden_size=64, depth=2, num_heads=4, num_classes=5, use_swiglu=True, use_rope=True,
            use_rmsnorm=True, mlp_ratio=3.0)  # fmt: skip


TRAINING = ("train.fp8", "train.fp8=false")


def loss_and_gradients(model):
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(8, 4, 4, 4, generator=generator), torch.rand(8, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (model(x, t, torch.arange(8) % 5).float() - x).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [False, True])
def test_blocks_multiply_in_fp8_and_nothing_else_changes(fused):
    pytest.importorskip("torchao", reason="pip install torchao")
    torch.manual_seed(0)
    model = LightningDiT(**FORM, fused=fused).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    twin = LightningDiT(**FORM, fused=fused).eval()
    twin.load_state_dict(model.state_dict())
    assert fp8.convert_to_fp8(twin, emulate=True) == 2 * 4
    assert {type(m).__name__ for n, m in twin.named_modules() if n.endswith((".qkv", ".proj", ".w12", ".w3")) and "blocks" in n} == {"Float8Linear"}
    assert all("Float8" not in type(m).__name__ for n, m in twin.named_modules() if "adaLN" in n or not n.startswith("blocks"))
    assert list(twin.state_dict()) == list(model.state_dict())
    (loss, grads), (other, others) = loss_and_gradients(model), loss_and_gradients(twin)
    assert other != loss and abs(other - loss) < 0.05 * loss
    for name, grad in grads.items():
        assert others[name].dtype == torch.float32
        assert (others[name] - grad).norm() < 0.3 * grad.norm() + 1e-4, name


def test_what_fp8_needs_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(fp8, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="train.fp8 needs torchao: pip install torchao"):
        fp8.require_fp8(torch.device("cpu"), *TRAINING)
    monkeypatch.setattr(fp8, "find_spec", lambda name: sys)
    with pytest.raises(BadInput, match="compute capability 8.9 or more, this is a CPU; set train.fp8=false"):
        fp8.require_fp8(torch.device("cpu"), *TRAINING)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(BadInput, match="sample.precision=fp8 needs .* this is 8.0; set sample.precision=bf16"):
        fp8.require_fp8(torch.device("cuda"), "sample.precision=fp8", "sample.precision=bf16")
