"""What a block of LightningDiT-XL/1 really moves, counted on fake tensors at batch 32: fused beside plain, under autocast."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vavae_fast.models.lightningdit import FusedLightningDiTBlock, LightningDiTBlock
from vavae_fast.models.lightningdit_layers import RotaryEmbedding2D

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from vavae_kernels._launch import watched
from vavae_kernels._registry import auto_means
from vavae_kernels.testing.traffic import Traffic

B, N, D, H = 32, 256, 1152, 16


def block_traffic(block_class) -> tuple[Traffic, Traffic]:
    """Forward and backward of one block in the middle of the model."""
    with FakeTensorMode(), auto_means("triton"):
        block, rope = block_class(D, H, 4.0, False, True, True, False), RotaryEmbedding2D(D // H, 16)
        x = torch.empty(B, N, D, requires_grad=True)
        y, gate = (torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((B, N, D), (B, D)))
        c = torch.empty(B, D, requires_grad=True)
        fused = block_class is FusedLightningDiTBlock
        forward, backward = Traffic(), Traffic()
        with watched(forward._launched, run=False), forward, torch.autocast("cpu", torch.bfloat16):
            out = block(x, y, gate, c, rope) if fused else (block(x, c, rope),)
        wanted = [*((x, y, gate) if fused else (x,)), c, *block.parameters()]
        with watched(backward._launched, run=False), backward:
            torch.autograd.grad(out, wanted, [torch.empty_like(o) for o in out])
    return forward, backward


def test_nothing_runs_between_the_operators_of_a_fused_block():
    """Forward: four launches, five matrix products, one attention; PyTorch otherwise only casts weights and touches c."""
    forward, backward = block_traffic(FusedLightningDiTBlock)
    assert [launch.kernel.fn.__name__ for launch in forward.launches] == ["adaptive_norm_fwd", "qk_norm_rope_fwd", "adaptive_norm_fwd", "swiglu_fwd"]
    assert set(forward.operations) == {"silu", "_to_copy", "addmm", "_scaled_dot_product_flash_attention_for_cpu"}
    assert forward.operations.count("addmm") == 5
    parameters_and_c = 5 * 2 + 1
    assert forward.operations.count("_to_copy") == parameters_and_c
    assert len(backward.launches) == 6
    elementwise = {"mul", "add", "neg", "div", "pow", "clone", "stack"}
    assert not elementwise & set(backward.operations)


def test_a_fused_block_moves_less_than_half_of_what_a_plain_one_does():
    """Every byte counts, matrix products too; in eager mode, where no compiler joins operations."""
    for ours, eager, share in zip(block_traffic(FusedLightningDiTBlock), block_traffic(LightningDiTBlock), (0.40, 0.35)):
        assert ours.bytes <= share * eager.bytes, f"{ours.bytes / eager.bytes:.3f} of the plain block's {eager.bytes:,} bytes"
