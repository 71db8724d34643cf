"""patch(): fused operators in models that know nothing of them, keys unchanged, undone without trace."""

import copy
import io
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vavae_fast.models import LightningDiT
from vavae_kernels import attention_backends, patch, patching_forms, register_backend
from vavae_kernels.patching import OPERATORS

D, H, N = 32, 4, 9
OF_LIGHTNINGDIT = ("qk_norm_rope_attention", "swiglu", "gate_add_norm_modulate", "norm_modulate")


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


class FinalLayer(nn.Module):
    """As DiT and SiT write it."""

    def __init__(self, chunks=2, norm=None):
        super().__init__()
        self.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6) if norm is None else norm
        self.linear = nn.Linear(D, 4)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, chunks * D))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(self.norm_final(x) * (1 + scale[:, None]) + shift[:, None])


class RMSNorm(nn.Module):
    def __init__(self, dim, offset=0.0, mean=False, eps=1e-6, weight=None):
        super().__init__()
        self.eps, self.offset, self.mean = eps, offset, mean
        self.weight = nn.Parameter(torch.ones(dim) - offset if weight is None else weight)

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.mean else x
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def lightning(**changes) -> LightningDiT:
    form = dict(use_swiglu=True, use_rope=True, use_rmsnorm=True)
    form = {**dict(input_size=3, patch_size=1, in_channels=4, hidden_size=D, depth=2, num_heads=H, num_classes=5), **form, **changes}
    model = LightningDiT(**form)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def inputs(dtype=torch.float64):
    return torch.randn(2, 4, 3, 3, dtype=dtype), torch.rand(2, dtype=dtype), torch.tensor([1, 5])


def outputs_and_gradients(model, batch):
    out = model(*batch)
    grads = torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad])
    return [out.detach(), *grads]


# results, keys, undo


@pytest.mark.parametrize("ops", [None, *([op] for op in OF_LIGHTNINGDIT)], ids=lambda ops: "all" if ops is None else ops[0])
@pytest.mark.parametrize("changes", [{}, dict(use_qknorm=True), dict(wo_shift=True), dict(use_rmsnorm=False, use_qknorm=True)])
def test_lightningdit_keeps_outputs_gradients_and_keys(ops, changes):
    model = lightning(**changes)
    batch, keys = inputs(), list(model.state_dict())
    expected, *grads = outputs_and_gradients(model, batch)
    handle = patch(model, ops)
    assert set(handle.report.values()) == {f"fused: {op}" for op in ops or OF_LIGHTNINGDIT}
    out, *fused_grads = outputs_and_gradients(model, batch)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fused_grads, grads, rtol=1e-8, atol=1e-10)
    assert list(model.state_dict()) == keys
    handle.undo()
    assert torch.equal(model(*batch), expected)
    assert not any("forward" in vars(module) for module in model.modules())
    handle.undo()


@pytest.mark.parametrize("changes", [{}, dict(use_qknorm=True), dict(wo_shift=True), dict(use_rmsnorm=False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_in_low_precision_keep_the_numerics_rule(changes, dtype):
    """|patched - fp64| <= 2 (|as it was - fp64| + one rounding band), for the output and the worst gradient, each by its own size.

    Not gradient by gradient: the error of one of eight numbers is luck, and half of it more so.
    """
    model = lightning(**changes)
    model.to(dtype)
    exact_model, batch = copy.deepcopy(model).double(), inputs(dtype)
    exact = outputs_and_gradients(exact_model, [x.double() if x.is_floating_point() else x for x in batch])
    eager = outputs_and_gradients(model, batch)
    patch(model)
    ours = outputs_and_gradients(model, batch)
    assert [o.dtype for o in ours] == [e.dtype for e in eager]

    def errors(found):
        return [((x - true).abs().max() / true.abs().max()).item() for x, true in zip(found, exact)]

    (output, *mine), (as_it_was, *theirs) = errors(ours), errors(eager)
    assert output <= 2 * (as_it_was + torch.finfo(dtype).eps)
    assert max(mine) <= 2 * (max(theirs) + torch.finfo(dtype).eps)


def test_autocast_gives_what_it_gave():
    """fp32 weights and stream, bf16 products: the dtype of the result, and its error, stay."""
    model = lightning().float()
    exact_model, batch = copy.deepcopy(model).double(), inputs(torch.float32)
    exact = exact_model(*[x.double() if x.is_floating_point() else x for x in batch])
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(*batch)
        patch(model)
        ours = model(*batch)
    band = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert ours.dtype == eager.dtype and (ours - exact).abs().max() <= 2 * ((eager - exact).abs().max() + band)


@pytest.mark.parametrize("op", OF_LIGHTNINGDIT)
def test_the_operator_is_really_called(op, monkeypatch):
    def bomb(*_, **__):
        raise ArithmeticError(op)

    model = lightning()
    patch(model, [op])
    monkeypatch.setattr(patching_forms, op, bomb)
    with pytest.raises(ArithmeticError, match=op):
        model(*inputs())


@pytest.mark.parametrize("q_norm", [nn.Identity, nn.LayerNorm, nn.RMSNorm], ids=lambda norm: norm.__name__)
def test_a_dit_block_of_another_code_base(q_norm):
    norm = (lambda dim: nn.RMSNorm(dim, eps=1e-5)) if q_norm is nn.RMSNorm else q_norm
    block = DiTBlock(lambda: Attention(norm)).double()
    x, c = torch.randn(2, N, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    expected = block(x, c)
    handle = patch(block)
    assert handle.report == {"": "fused: gate_add_norm_modulate", "attn": "fused: qk_norm_rope_attention"}
    torch.testing.assert_close(block(x, c), expected, rtol=1e-10, atol=1e-12)
    mask = torch.randn(2, H, N, N, dtype=torch.float64)
    masked = block.attn(x, attn_mask=mask)
    handle.undo()
    assert torch.equal(masked, block.attn(x, attn_mask=mask))  # the operator has no mask: the module's own forward runs


def test_a_mask_keeps_the_rotary_table_and_another_table_its_forward():
    class RotaryAttention(Attention):
        def forward(self, x, rope=None, attn_mask=None):
            return x + rope if attn_mask is None else x + rope + attn_mask

    RotaryAttention.__name__ = "Attention"
    attention = RotaryAttention()
    assert patch(attention).report == {"": "fused: qk_norm_rope_attention"}
    assert attention(torch.ones(1), rope=torch.ones(1), attn_mask=torch.ones(1)).item() == 3
    assert attention(torch.ones(1), rope=torch.ones(1)).item() == 2  # no freqs_cos: not a table that the operator knows


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_the_backend_computes_the_attention(backend, monkeypatch):
    """LightningDiT with QK-norm and rotary embedding, by each backend that runs here; and by one of ours, which is called."""
    model, batch = lightning(use_qknorm=True), inputs()
    expected = model(*batch)
    handle = patch(model, backend=backend)
    torch.testing.assert_close(model(*batch), expected, rtol=1e-10, atol=1e-12)
    handle.undo()
    monkeypatch.setattr(attention_backends, "BACKENDS", dict(attention_backends.BACKENDS))
    calls = []
    register_backend("counted", lambda q, k, v, scale: calls.append(q.shape) or F.scaled_dot_product_attention(q, k, v, scale=scale))
    patch(model, backend="counted")
    torch.testing.assert_close(model(*batch), expected, rtol=1e-10, atol=1e-12)
    assert calls == 2 * [(2, H, N, D // H)]


# what is left, and why


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


def with_one_more(module: nn.Module, name: str, value) -> nn.Module:
    """`module` with a parameter, child or attribute that its form does not have."""
    setattr(module, name, value)
    return module


def hooked(block: nn.Module) -> nn.Module:
    block.norm2.register_forward_hook(lambda module, args, out: None)
    return block


class ConditionedBlock(DiTBlock):
    def forward(self, x, c, mask):
        return super().forward(x, c) * mask


ConditionedBlock.__name__ = "DiTBlock"


class AnyArguments(DiTBlock):
    def forward(self, *args):
        return super().forward(*args)


AnyArguments.__name__ = "DiTBlock"


class GatedRMSNorm(RMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * gate


GatedRMSNorm.__name__ = "RMSNorm"


@pytest.mark.parametrize(
    "make, path, reason",
    [
        (lambda: DiTBlock(lambda: Attention(dropout=0.1)), "attn", "its attn_drop drops out with p = 0.1, which the operator does not"),
        (lambda: DiTBlock(lambda: Attention(extra=nn.LayerNorm)), "attn", "its norm (LayerNorm) is not part of the fused form"),
        (lambda: DiTBlock(lambda: Attention(two_sided_linear)), "attn", "its q_norm is a Linear, its k_norm a Linear"),
        (lambda: attention_with(k_norm__eps=1e-3), "", "its q_norm has eps 1e-05, its k_norm 0.001"),
        (lambda: attention_with(scale=0.5), "", "its scale is 0.5, not head_dim ** -0.5 = 0.353553"),
        (lambda: attention_with(q_norm=nn.LayerNorm(D), k_norm=nn.LayerNorm(D)), "", "its q_norm does not normalise a head of 8"),
        (lambda: attention_with(q_norm=nn.LayerNorm((N, D // H))), "", "its q_norm is a LayerNorm, its k_norm a LayerNorm"),
        (lambda: attention_with(num_heads=5), "", "qkv does not split into three equal sets of heads"),
        (lambda: attention_with(qkv=nn.Identity()), "", "qkv does not split into three equal sets of heads"),
        (lambda: attention_with(temperature=nn.Parameter(torch.ones(H))), "", "its temperature is not part of the fused form"),
        (lambda: with_one_more(Attention(), "gate", nn.Linear(D, D)), "", "its gate (Linear) is not part of the fused form"),
        (lambda: DiTBlock(chunks=7), "", "its modulation has 7 chunks"),
        (lambda: DiTBlock(chunks=4), "", "its modulation has 4 chunks"),
        (lambda: DiTBlock(affine=True), "", "its norm1 has a bias"),
        (lambda: with_one_more(DiTBlock(), "norm2", nn.BatchNorm1d(N)), "", "its norm2 (BatchNorm1d) is no LayerNorm or RMSNorm over one axis"),
        (lambda: with_one_more(DiTBlock(), "norm1", RMSNorm(D, offset=1.0)), "", "its norm1 (RMSNorm) is no LayerNorm or RMSNorm over one axis"),
        (lambda: with_one_more(DiTBlock(), "adaLN_modulation", nn.Linear(D, 6 * D)), "", "its modulation has 0 chunks"),
        (lambda: with_one_more(DiTBlock(), "ls1", nn.Linear(D, D)), "", "its ls1 (Linear) is not part of the fused form"),
        (lambda: with_one_more(DiTBlock(), "gamma", nn.Parameter(torch.ones(D))), "", "its gamma is not part of the fused form"),
        (lambda: hooked(DiTBlock()), "", "its norm2 has a hook or a forward of its own, which would not be called"),
        (lambda: ConditionedBlock(), "", "its forward takes (x, c, mask)"),
        (lambda: AnyArguments(), "", "its forward takes (*args)"),
        (lambda: FinalLayer(chunks=3), "", "its modulation has 3 chunks"),
        (lambda: FinalLayer(norm=nn.LayerNorm(D)), "", "its norm_final has a bias"),
        (lambda: lightning(fused=True), "blocks.0", "it is fused already"),
        (lambda: lightning(fused=True), "final_layer", "it is fused already"),
        (lambda: nn.Linear(2, 2), "", "no module in it is of a form known here"),
        (lambda: RMSNorm(D, offset=1.0), "", "its forward computes something else"),
        (lambda: RMSNorm(D, mean=True), "", "its forward computes something else"),
        (lambda: GatedRMSNorm(D), "", "its forward takes (x, gate)"),
        (lambda: RMSNorm(D, eps=None), "", "its eps is None"),
        (lambda: RMSNorm(D, weight=torch.ones(N, D)), "", "it does not normalise one axis"),
        (lambda: RMSNorm(D).to("meta"), "", "its weight is not here; patch after loading and before sharding"),
        (lambda: with_one_more(RMSNorm(D), "bias", nn.Parameter(torch.ones(D))), "", "its bias is not part of the fused form"),
        (lambda: nn.RMSNorm((N, D), eps=1e-6), "", "it does not normalise one axis"),
    ],
)
def test_what_differs_is_left_and_said(make, path, reason):
    model = make()
    before = copy.deepcopy(vars(model.get_submodule(path)).get("forward"))
    assert patch(model).report[path] == f"left: {type(model.get_submodule(path)).__name__}, {reason}"
    assert vars(model.get_submodule(path)).get("forward") == before


@pytest.mark.parametrize("norm", [RMSNorm(D), nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-3, elementwise_affine=False)])
def test_an_rms_norm_that_stands_alone(norm, monkeypatch):
    model, x = nn.Sequential(norm, nn.Linear(D, D)), torch.randn(2, N, D)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
    expected = model(x)
    handle = patch(model, ["rms_norm"])
    assert handle.report == {"0": "fused: rms_norm"}
    torch.testing.assert_close(model(x), expected)
    monkeypatch.setattr(patching_forms, "rms_norm", None)
    with pytest.raises(TypeError):
        model(x)
    handle.undo()
    assert torch.equal(model(x), expected)


def test_an_rms_norm_with_a_weight_of_another_dtype_returns_what_it_returned():
    norm, x = nn.Sequential(RMSNorm(D)), torch.randn(2, D).bfloat16()
    expected = norm(x)
    patch(norm, ["rms_norm"])
    assert expected.dtype == torch.float32 and torch.equal(norm(x), expected)


def test_a_norm_inside_of_a_fused_module_is_not_patched_by_itself():
    """Unless only the norm is asked for."""
    model, batch = lightning(use_qknorm=True), inputs()
    expected = model(*batch)
    assert not any("norm1" in path or "q_norm" in path for path in patch(model).report)
    alone = lightning(use_qknorm=True)
    report = patch(alone, ["rms_norm"]).report
    assert len(report) == 2 * 4 + 1 and set(report.values()) == {"fused: rms_norm"}
    alone.load_state_dict(model.state_dict())
    torch.testing.assert_close(alone(*batch), expected, rtol=1e-10, atol=1e-12)


# asking for what cannot be


@pytest.mark.parametrize(
    "model, ops, message",
    [
        (lightning(), ["flash"], "unknown operator 'flash'; known: qk_norm_rope_attention, attention, swiglu"),
        (lightning(), "swiglu", "ops is a list of operators, got the text 'swiglu'; pass ['swiglu']"),
        (lightning(), [], "ops is empty; known operators: qk_norm_rope_attention"),
        (lightning(use_swiglu=False), ["norm_modulate", "swiglu"], "no module takes swiglu: none is of a form known here; nothing was replaced"),
        (
            DiTBlock(lambda: Attention(dropout=0.5)),
            ["qk_norm_rope_attention", "gate_add_norm_modulate"],
            "no module takes qk_norm_rope_attention (attn: left: Attention, its attn_drop drops out with p = 0.5, which the operator does not)",
        ),
    ],
)
def test_what_is_asked_for_and_cannot_be_is_an_error(model, ops, message):
    """A patch that does nothing, in silence, is how an upstream rename goes unnoticed."""
    with pytest.raises(ValueError, match=f"^patch: {re.escape(message)}"):
        patch(model, ops)
    assert not any("forward" in vars(module) for module in model.modules())


def test_operators_that_are_no_list_are_named():
    with pytest.raises(TypeError, match="^patch: ops is a list of operators, got 3$"):
        patch(lightning(), 3)


def test_a_backend_that_cannot_be_is_an_error_before_anything_is_replaced():
    model = lightning()
    for backend, message in (("flash3", "unknown backend 'flash3'"), ("xformers", "xformers is not installed; pip install xformers")):
        with pytest.raises(ValueError, match=f"^patch: .*{message}"):
            patch(model, backend=backend)
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(TypeError, match="patch: model must be a torch.nn.Module, got OrderedDict"):
        patch(model.state_dict())


# life after patch()


def test_patching_twice_is_refused_politely():
    model = lightning()
    first = patch(model)
    second = patch(model)
    assert all("it is patched already" in line for line in second.report.values())
    assert len(second.report) == len(first.report)
    with pytest.raises(ValueError, match="no module takes rms_norm"):
        patch(model, ["rms_norm"])  # the norms inside of what is fused are not called any more
    second.undo()
    assert "forward" in vars(model.blocks[0])
    with pytest.raises(ValueError, match="no module takes swiglu .*it is patched already"):
        patch(model, ["swiglu"])
    first.undo()
    assert "forward" not in vars(model.blocks[0])


def test_one_operator_after_another():
    model, batch = lightning(use_qknorm=True), inputs()
    expected = model(*batch)
    handles = [patch(model, [op]) for op in OF_LIGHTNINGDIT]
    torch.testing.assert_close(model(*batch), expected, rtol=1e-10, atol=1e-12)
    for handle in handles:
        handle.undo()
    assert torch.equal(model(*batch), expected)


def test_a_forward_of_somebody_else_is_left_before_and_after():
    model = lightning()
    model.blocks[0].forward = lambda x, c, rope: x
    handle = patch(model)
    assert handle.report["blocks.0"] == "left: LightningDiTBlock, it already has a forward of its own"
    theirs = model.blocks[1].forward = lambda x, c, rope: x
    handle.undo()
    assert vars(model.blocks[1])["forward"] is theirs and "forward" not in vars(model.final_layer)


def test_a_module_that_stands_at_two_places_is_patched_once_and_reported_twice():
    block = DiTBlock().double()
    model = nn.ModuleList([block, block, FinalLayer().double()])
    x, c = torch.randn(2, N, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64)
    expected = block(block(x, c), c)
    handle = patch(model)
    assert handle.report["0"] == handle.report["1"] == "fused: gate_add_norm_modulate" and len(handle.report) == 5
    torch.testing.assert_close(model[1](model[0](x, c), c), expected, rtol=1e-10, atol=1e-12)
    handle.undo()
    assert torch.equal(block(block(x, c), c), expected)


def through_pickle(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_patched_model_stands_alone(copied, monkeypatch):
    model = lightning()
    handle = patch(model)
    twin = copied(model)
    batch = inputs()
    expected = model(*batch)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    handle.undo()
    torch.testing.assert_close(twin(*batch), expected)
    monkeypatch.setattr(patching_forms, "swiglu", None)
    with pytest.raises(TypeError):
        twin(*batch)  # it is patched


def test_a_state_dict_goes_both_ways():
    model, twin, batch = lightning(), lightning(), inputs()
    patch(model)
    model.load_state_dict(twin.state_dict())
    torch.testing.assert_close(model(*batch), twin(*batch), rtol=1e-10, atol=1e-12)
    twin.load_state_dict(model.state_dict())


@pytest.mark.parametrize("changes", [dict(use_qknorm=True), dict(wo_shift=True, use_rmsnorm=False)])
def test_a_patched_model_compiles_whole(changes):
    torch._dynamo.reset()
    model, batch = lightning(**changes), inputs()
    expected = outputs_and_gradients(model, batch)
    patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, true in zip(outputs_and_gradients(compiled, batch), expected):
        torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-10)


def test_all_patched_blocks_are_one_graph():
    """A graph for each would hit torch.compile's limit at the ninth block."""
    torch._dynamo.reset()
    blocks = nn.ModuleList(DiTBlock(lambda: Attention(nn.LayerNorm)) for _ in range(3)).double()
    x, c = torch.randn(2, N, D, dtype=torch.float64, requires_grad=True), torch.randn(2, D, dtype=torch.float64)
    expected = blocks[2](blocks[1](blocks[0](x, c), c), c)
    assert set(patch(blocks).report.values()) == {"fused: gate_add_norm_modulate", "fused: qk_norm_rope_attention"}
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(blocks[2](blocks[1](blocks[0](x, c), c), c), expected, rtol=1e-10, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_a_patched_block_is_recomputed_by_checkpointing():
    model, batch = lightning(use_checkpoint=True).train(), inputs()
    labels = dict(drop_labels=torch.zeros(2, dtype=torch.bool))
    expected = torch.autograd.grad(model(*batch, **labels).square().sum(), model.blocks[0].attn.qkv.weight)
    assert "its own forward recomputes activations; build the model with fused=True" in str(patch(model).report)
    got = torch.autograd.grad(model(*batch, **labels).square().sum(), model.blocks[0].attn.qkv.weight)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
    block, x, c = DiTBlock().double(), torch.randn(2, N, D, dtype=torch.float64, requires_grad=True), torch.randn(2, D, dtype=torch.float64)
    expected = torch.autograd.grad(block(x, c).square().sum(), x)
    patch(block)
    got = torch.autograd.grad(checkpoint(block, x, c, use_reentrant=False).square().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_hooks_of_a_patched_module_still_run():
    model, seen = lightning(), []
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model.blocks[0].attn.register_forward_hook(lambda module, args, out: seen.append("attn"))
    patch(model)
    model(*inputs())
    assert seen == ["attn", (2, N, D)]


def test_patching_warns_of_nothing_and_draws_no_random_number():
    model = lightning()
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_report_reads_as_a_summary():
    assert str(patch(lightning())).splitlines() == [
        "2 x fused: gate_add_norm_modulate",
        "2 x fused: qk_norm_rope_attention",
        "2 x fused: swiglu",
        "1 x fused: norm_modulate",
    ]


def test_every_form_names_an_operator():
    from vavae_kernels.patching_diffusers import DIFFUSERS_FORMS, NORM_TYPES

    assert {form.op for form in (*patching_forms.FORMS.values(), *DIFFUSERS_FORMS.values(), *NORM_TYPES.values())} == set(OPERATORS)
