"""patch(): fused operators in models that know nothing of them, keys unchanged, undone without trace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vavae_fast.models import LightningDiT
from vavae_fast.models._torchvision import import_timm
from vavae_kernels import patch, patching
from vavae_kernels.patching import PATCHES

D, H, N = 32, 4, 9


class Attention(nn.Module):
    """As timm writes it: q, k, v from one projection, norms and dropouts that may be idle."""

    def __init__(self, q_norm=nn.Identity, dropout=0.0, extra=nn.Identity):
        super().__init__()
        self.num_heads, self.head_dim = H, D // H
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.q_norm, self.k_norm = q_norm(D // H), q_norm(D // H)
        self.attn_drop, self.norm = nn.Dropout(dropout), extra(D)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D // H)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        return self.proj(self.norm(out.transpose(1, 2).flatten(2)))


class DiTBlock(nn.Module):
    """As DiT and SiT write it."""

    def __init__(self, attention=Attention, chunks=6, affine=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, elementwise_affine=affine, eps=1e-6)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=affine, eps=1e-6)
        self.attn = attention()
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, chunks * D))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None])
        return x + gate2[:, None] * self.mlp(self.norm2(x) * (1 + scale2[:, None]) + shift2[:, None])


def lightning(**changes) -> LightningDiT:
    form = dict(use_swiglu=True, use_rope=True, use_rmsnorm=True)
    form = {**dict(input_size=3, patch_size=1, in_channels=4, hidden_size=D, depth=2, num_heads=H, num_classes=5), **form, **changes}
    model = LightningDiT(**form)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def inputs():
    return torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.rand(2, dtype=torch.float64), torch.tensor([1, 5])


@pytest.mark.parametrize("ops", [None, *([op] for op in PATCHES)], ids=lambda ops: "all" if ops is None else ops[0])
@pytest.mark.parametrize("changes", [{}, dict(use_qknorm=True), dict(wo_shift=True), dict(use_rmsnorm=False, use_qknorm=True)])
def test_lightningdit_keeps_outputs_gradients_and_keys(ops, changes):
    model = lightning(**changes)
    batch, keys = inputs(), list(model.state_dict())
    expected = model(*batch)
    grads = torch.autograd.grad(expected.square().sum(), [p for p in model.parameters() if p.requires_grad])
    handle = patch(model, ops)
    assert set(handle.report.values()) == {f"fused: {op}" for op in ops or PATCHES}
    out = model(*batch)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    fused_grads = torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(fused_grads, grads, rtol=1e-8, atol=1e-10)
    assert list(model.state_dict()) == keys
    handle.undo()
    assert torch.equal(model(*batch), expected)
    assert not any("forward" in vars(module) for module in model.modules())
    handle.undo()


@pytest.mark.parametrize("op", PATCHES)
def test_the_operator_is_really_called(op, monkeypatch):
    def bomb(*_, **__):
        raise ArithmeticError(op)

    model = lightning()
    patch(model, [op])
    monkeypatch.setattr(patching, op, bomb)
    with pytest.raises(ArithmeticError, match=op):
        model(*inputs())


@pytest.mark.parametrize("q_norm", [nn.Identity, nn.LayerNorm])
def test_a_dit_block_of_another_code_base(q_norm):
    block = DiTBlock(lambda: Attention(q_norm)).double()
    x, c = torch.randn(2, N, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    expected = block(x, c)
    handle = patch(block)
    assert handle.report == {"": "fused: gate_add_norm_modulate", "attn": "fused: qk_norm_rope_attention"}
    torch.testing.assert_close(block(x, c), expected, rtol=1e-10, atol=1e-12)
    mask = torch.randn(2, H, N, N, dtype=torch.float64)
    masked = block.attn(x, attn_mask=mask)
    handle.undo()
    assert torch.equal(masked, block.attn(x, attn_mask=mask))  # the operator has no mask: the module's own forward runs


def test_timms_masks_still_work():
    """timm's own Attention: patched, `attn_mask` and `is_causal` give what they gave, and without them the operator runs."""
    timm_attention = import_timm().layers.attention.Attention
    for keywords in (dict(attn_mask=torch.randn(N, N, dtype=torch.float64)), dict(is_causal=True), dict(is_causal=False), {}):
        attention = timm_attention(D, H, qk_norm=True, norm_layer=nn.LayerNorm).double()
        x = torch.randn(2, N, D, dtype=torch.float64)
        expected = attention(x, **keywords)
        assert patch(attention).report[""] == "fused: qk_norm_rope_attention"
        torch.testing.assert_close(attention(x, **keywords), expected, rtol=1e-10, atol=1e-12)


def test_a_mask_keeps_the_rotary_table():
    class RotaryAttention(Attention):
        def forward(self, x, rope=None, attn_mask=None):
            return x + rope if attn_mask is None else x + rope + attn_mask

    RotaryAttention.__name__ = "Attention"
    attention = RotaryAttention()
    patch(attention)
    assert attention(torch.ones(1), rope=torch.ones(1), attn_mask=torch.ones(1)).item() == 3


def attention_with(**changes) -> nn.Module:
    """An Attention with LayerNorm of q and k, and other values at dotted names."""
    attention = Attention(nn.LayerNorm)
    for name, value in changes.items():
        *path, last = name.split("__")
        setattr(attention.get_submodule(".".join(path)), last, value)
    return attention


@pytest.mark.parametrize("scale, fused_attn, same", [((D // H) ** -0.5, False, True), (0.3, True, True), (0.3, False, False)])
def test_a_scale_counts_where_the_module_multiplies_by_it(scale, fused_attn, same):
    report = patch(attention_with(scale=scale, fused_attn=fused_attn)).report[""]
    usual = f"left: Attention, its scale is 0.3, not head_dim ** -0.5 = {(D // H) ** -0.5:g}"
    assert report == ("fused: qk_norm_rope_attention" if same else usual)


def two_sided_linear(dim: int) -> nn.Module:
    return nn.Linear(dim, dim)


@pytest.mark.parametrize(
    "make, path, reason",
    [
        (lambda: DiTBlock(lambda: Attention(dropout=0.1)), "attn", "Attention, its attn_drop (Dropout) is not part of the fused form"),
        (lambda: DiTBlock(lambda: Attention(extra=nn.LayerNorm)), "attn", "Attention, its norm (LayerNorm) is not part of the fused form"),
        (lambda: DiTBlock(lambda: Attention(two_sided_linear)), "attn", "Attention, its q_norm is a Linear, its k_norm a Linear"),
        (lambda: attention_with(k_norm__eps=1e-3), "", "Attention, its q_norm has eps 1e-05, its k_norm 0.001"),
        (lambda: attention_with(scale=0.5), "", "Attention, its scale is 0.5, not head_dim ** -0.5 = 0.353553"),
        (lambda: DiTBlock(chunks=7), "", "DiTBlock, its modulation has 7 chunks"),
        (lambda: DiTBlock(chunks=4), "", "DiTBlock, its modulation has 4 chunks"),
        (lambda: DiTBlock(affine=True), "", "DiTBlock, its norm has a bias"),
        (lambda: lightning(fused=True), "blocks.0", "FusedLightningDiTBlock, it is fused already"),
        (lambda: nn.Linear(2, 2), "", "Linear, no module in it is of a form known here"),
    ],
)
def test_what_differs_is_left_and_said(make, path, reason):
    model = make()
    assert patch(model).report[path] == f"left: {reason}"
    assert "forward" not in vars(model.get_submodule(path))


def test_patching_twice_is_refused_politely():
    model = lightning()
    first = patch(model)
    second = patch(model)
    assert all("already has a forward of its own" in line for line in second.report.values())
    second.undo()
    assert "forward" in vars(model.blocks[0])
    first.undo()


def test_a_copy_of_a_patched_model_stands_alone():
    model = lightning()
    patch(model)
    twin = copy.deepcopy(model)
    batch = inputs()
    expected = model(*batch)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(twin(*batch), expected)


def test_unknown_operators_raise():
    with pytest.raises(ValueError, match="unknown operator 'flash'; known: qk_norm_rope_attention, swiglu"):
        patch(lightning(), ["flash"])


def test_the_report_reads_as_a_summary():
    assert str(patch(lightning())).splitlines() == [
        "2 x fused: gate_add_norm_modulate",
        "2 x fused: qk_norm_rope_attention",
        "2 x fused: swiglu",
    ]
