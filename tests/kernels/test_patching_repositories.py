"""patch() on classes that we did not write: timm's, and the public DiT, SiT, REPA and LightningDiT code where a path is given.

VAVAE_DIT, VAVAE_SIT, VAVAE_REPA and VAVAE_REFERENCE (LightningDiT) name checkouts of the public repositories.
"""

import copy
import importlib.util
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from vavae_fast.models._torchvision import import_timm
from vavae_kernels import patch, patching_forms
from vavae_kernels.patching import OPERATORS

timm = import_timm()
D, DEPTH = 32, 2
IN_FP32 = 32 * torch.finfo(torch.float32).eps  # LightningDiT's RMSNorm takes the mean square in fp32, whatever the dtype


def filled(model: nn.Module) -> nn.Module:
    """Random everywhere, also where an initialisation is zero; fp64."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def outputs_and_gradients(model: nn.Module, batch: tuple) -> list[torch.Tensor]:
    out = model(*batch)
    outs = [out[0], *out[1]] if isinstance(out, tuple) else [out]  # REPA: the velocity, then its projections
    model.zero_grad()
    sum(o.square().sum() for o in outs).backward()  # LightningDiT checkpoints with use_reentrant=True, which takes no autograd.grad
    return [*(o.detach() for o in outs), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(got: list[torch.Tensor], expected: list[torch.Tensor], rounding: float) -> None:
    """Equal to `rounding` of the largest entry of all: some gradients are zero but for rounding, that of a key's bias for one."""
    assert len(got) == len(expected)
    largest = max(theirs.abs().max() for theirs in expected)
    for ours, theirs in zip(got, expected):
        assert (ours - theirs).abs().max() <= rounding * largest


def fused(report: dict[str, str]) -> dict[str, int]:
    return Counter(line.removeprefix("fused: ") for line in report.values() if line.startswith("fused: "))


# the public repositories


class Checkouts:
    """Modules of the repositories, each imported from its file; nothing stays in `sys.modules` or `sys.path`."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def file(self, variable: str, path: str) -> Path:
        root = os.environ.get(variable)
        if not root:
            pytest.skip(f"set {variable} to a checkout of the public repository")
        found = Path(root) / path
        assert found.is_file(), f"{variable}={root} has no {path}"
        return found

    def module(self, variable: str, path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(variable.lower(), self.file(variable, path))
        module = importlib.util.module_from_spec(spec)
        self.monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    def lightningdit(self) -> ModuleType:
        """It imports its siblings as `models.…`, and a fairscale that only its unused Llama classes need."""
        pytest.importorskip("einops", reason="pip install einops: the public LightningDiT imports it")
        path = self.file("VAVAE_REFERENCE", "models/lightningdit.py")
        self.monkeypatch.syspath_prepend(str(path.parents[1]))
        for name in ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel", "fairscale.nn.model_parallel.initialize"):
            self.monkeypatch.setitem(sys.modules, name, ModuleType(name))
        layers = ModuleType("fairscale.nn.model_parallel.layers")
        layers.ColumnParallelLinear = layers.RowParallelLinear = layers.ParallelEmbedding = None
        self.monkeypatch.setitem(sys.modules, layers.__name__, layers)
        sys.modules["fairscale.nn.model_parallel"].initialize = sys.modules["fairscale.nn.model_parallel.initialize"]
        for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
            self.monkeypatch.delitem(sys.modules, name)
        return importlib.import_module("models.lightningdit")

    def forget(self) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
            del sys.modules[name]


@pytest.fixture
def checkouts(monkeypatch):
    checkouts = Checkouts(monkeypatch)
    with torch.compiler.set_stance("force_eager"):  # LightningDiT compiles single forwards
        yield checkouts
    checkouts.forget()


SIZE = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=D, depth=DEPTH, num_heads=4, num_classes=5)


def dit(checkouts: Checkouts, **changes) -> nn.Module:
    return checkouts.module("VAVAE_DIT", "models.py").DiT(**SIZE, **changes)


def sit(checkouts: Checkouts, **changes) -> nn.Module:
    return checkouts.module("VAVAE_SIT", "models.py").SiT(**SIZE, **changes)


def repa(checkouts: Checkouts, **changes) -> nn.Module:
    form = dict(decoder_hidden_size=D, encoder_depth=1, z_dims=[8], projector_dim=16, qk_norm=False)
    return checkouts.module("VAVAE_REPA", "models/sit.py").SiT(**SIZE, **{**form, **changes})


def lightningdit(checkouts: Checkouts, **changes) -> nn.Module:
    return checkouts.lightningdit().LightningDiT(**SIZE, **changes)


def published(checkouts: Checkouts, **changes) -> nn.Module:
    """The form of the published configs: RMSNorm, SwiGLU, rotary positions."""
    return lightningdit(checkouts, **{**dict(use_rmsnorm=True, use_swiglu=True, use_rope=True), **changes})


BLOCKS = {"gate_add_norm_modulate": DEPTH, "qk_norm_rope_attention": DEPTH, "norm_modulate": 1}
EVERYTHING = {**BLOCKS, "swiglu": DEPTH}
CASES: dict[str, tuple[Callable, dict, dict]] = {  # id -> how to build it, arguments, what patch() fuses
    "DiT": (dit, {}, BLOCKS),
    "DiT without sigma": (dit, dict(learn_sigma=False), BLOCKS),
    "SiT": (sit, {}, BLOCKS),
    "REPA": (repa, {}, BLOCKS),
    "REPA with its own attention": (repa, dict(fused_attn=False), BLOCKS),
    "LightningDiT": (lightningdit, {}, BLOCKS),
    "LightningDiT as published": (published, {}, EVERYTHING),
    "LightningDiT with QK-norm": (published, dict(use_qknorm=True), EVERYTHING),
    "LightningDiT with LayerNorm of q and k": (published, dict(use_qknorm=True, use_rmsnorm=False), EVERYTHING),
    "LightningDiT without shift": (published, dict(wo_shift=True), EVERYTHING),
    "LightningDiT with checkpoints": (published, dict(use_checkpoint=True), EVERYTHING),
}
over_repositories = pytest.mark.parametrize("build, arguments, expected_counts", CASES.values(), ids=CASES.keys())


def built(build: Callable, checkouts: Checkouts, arguments: dict) -> tuple[nn.Module, tuple]:
    model = filled(build(checkouts, **arguments))
    model.t_embedder.mlp.register_forward_pre_hook(lambda mlp, args: (args[0].double(),))  # its sines are fp32
    return model, (torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.rand(2, dtype=torch.float64), torch.tensor([1, 5]))


@over_repositories
def test_every_form_of_the_public_code_is_fused(build, arguments, expected_counts, checkouts):
    model, batch = built(build, checkouts, arguments)
    keys, expected = list(model.state_dict()), outputs_and_gradients(model, batch)
    handle = patch(model)
    assert fused(handle.report) == expected_counts and len(handle.report) == sum(expected_counts.values())
    same(outputs_and_gradients(model, batch), expected, IN_FP32 if build is published else 1e-10)
    same(outputs_and_gradients(copy.deepcopy(model), batch), expected, IN_FP32 if build is published else 1e-10)
    assert list(model.state_dict()) == keys
    handle.undo()
    assert torch.equal(outputs_and_gradients(model, batch)[0], expected[0])


@over_repositories
@pytest.mark.parametrize("op", OPERATORS)
def test_each_operator_by_itself_is_the_one_that_runs(build, arguments, expected_counts, op, checkouts, monkeypatch):
    model, batch = built(build, checkouts, arguments)
    if op == "rms_norm" and isinstance(model.blocks[0].norm1, nn.LayerNorm) or op not in (*expected_counts, "rms_norm"):
        with pytest.raises(ValueError, match=f"no module takes {op}"):
            patch(model, [op])
        return
    expected = outputs_and_gradients(model, batch)
    assert set(patch(model, [op]).report.values()) == {f"fused: {op}"}
    same(outputs_and_gradients(model, batch), expected, IN_FP32 if build is published else 1e-10)
    monkeypatch.setattr(patching_forms, op, None)
    with pytest.raises(TypeError):
        model(*batch)


COMPILED = ("DiT", "SiT", "REPA", "LightningDiT as published", "LightningDiT with QK-norm", "LightningDiT without shift")


@pytest.mark.slow  # the compiler traces a whole model and its backward
@pytest.mark.parametrize("case", COMPILED)
def test_patched_public_code_compiles(case, checkouts):
    """Each block in one graph; and the whole model, where torch.compile takes it unpatched."""
    build, arguments, _ = CASES[case]
    model, batch = built(build, checkouts, arguments)
    expected, rounding = outputs_and_gradients(model, batch), IN_FP32 if build is published else 1e-10
    patch(model)
    torch._dynamo.reset()
    with torch.compiler.set_stance("default"):
        if build in (dit, sit, repa):
            same(outputs_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), batch), expected, rounding)
        for layer in (*model.blocks, model.final_layer):
            layer.compile(fullgraph=True, backend="aot_eager")
        for embedder in (model.t_embedder, model.y_embedder):  # LightningDiT's compile themselves
            embedder.forward = torch.compiler.disable(inspect.unwrap(type(embedder).forward)).__get__(embedder)
        same(outputs_and_gradients(model, batch), expected, rounding)


# timm


def timm_norm(norm: type[nn.Module]) -> Callable[..., nn.Module]:
    return lambda dim, **where: norm(dim, **where)


@pytest.mark.parametrize("norm", ["LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32"])
def test_timms_norms_of_q_and_k(norm):
    attention = timm.layers.attention.Attention(D, 4, qkv_bias=True, qk_norm=True, norm_layer=timm_norm(getattr(timm.layers, norm))).double()
    filled(attention)
    x = torch.randn(2, 9, D, dtype=torch.float64)
    expected = outputs_and_gradients(attention, (x,))
    assert patch(attention).report == {"": "fused: qk_norm_rope_attention"}
    same(outputs_and_gradients(attention, (x,)), expected, IN_FP32 if norm.endswith("Fp32") else 1e-10)


@pytest.mark.parametrize("norm", ["SimpleNorm", "LayerNorm2d"])
def test_timms_other_norms_are_left(norm):
    """SimpleNorm divides by the standard deviation without taking the mean off; LayerNorm2d normalises channels of images."""
    attention = timm.layers.attention.Attention(D, 4, qk_norm=True, norm_layer=timm_norm(getattr(timm.layers, norm)))
    assert patch(attention).report[""] == f"left: Attention, its q_norm is a {norm}, its k_norm a {norm}"


@pytest.mark.parametrize("keywords", [dict(attn_mask=torch.randn(9, 9, dtype=torch.float64)), dict(is_causal=True), dict(is_causal=False), {}])
def test_timms_masks_still_work(keywords):
    """timm's own Attention: patched, `attn_mask` and `is_causal` give what they gave, and without them the operator runs."""
    attention = timm.layers.attention.Attention(D, 4, qk_norm=True, norm_layer=nn.LayerNorm).double()
    x = torch.randn(2, 9, D, dtype=torch.float64)
    expected = attention(x, **keywords)
    assert patch(attention).report[""] == "fused: qk_norm_rope_attention"
    torch.testing.assert_close(attention(x, **keywords), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused_attn", [True, False])
def test_timms_attention_with_fewer_channels_than_the_stream(fused_attn):
    attention = timm.layers.attention.Attention(D, 4, attn_head_dim=6, dim_out=16, qkv_bias=True).double()
    attention.fused_attn = fused_attn
    x = torch.randn(2, 9, D, dtype=torch.float64)
    expected = outputs_and_gradients(attention, (x,))
    assert patch(attention).report[""] == "fused: qk_norm_rope_attention"
    same(outputs_and_gradients(attention, (x,)), expected, 1e-10)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda layers: layers.attention.Attention(D, 4, gated=True), "Attention, its gate (Linear) is not part of the fused form"),
        (
            lambda layers: layers.attention.Attention(D, 4, scale_norm=True, norm_layer=nn.LayerNorm),
            "Attention, its norm (LayerNorm) is not part of the fused form",
        ),
        (
            lambda layers: layers.attention.Attention(D, 4, proj_drop=0.2),
            "Attention, its proj_drop drops out with p = 0.2, which the operator does not",
        ),
        (lambda layers: layers.AttentionRope(D, 4), "AttentionRope, its rotary table comes with each call, and not for every token"),
        (lambda layers: layers.SwiGLU(D, 2 * D), "SwiGLU, gate and value come from two projections, not from one"),
        (lambda layers: layers.GluMlp(D, 2 * D), "GluMlp, its act is a Sigmoid, swiglu's is SiLU"),
        (lambda layers: layers.GluMlp(D, 2 * D, act_layer=nn.SiLU), "GluMlp, its gate is the second half of fc1, swiglu's is the first"),
        (
            lambda layers: layers.SwiGLUPacked(D, 2 * D, norm_layer=nn.LayerNorm),
            "GluMlp, its norm (LayerNorm) is not part of the fused form",
        ),
        (lambda layers: layers.SwiGLUPacked(D, 2 * D, use_conv=True), "GluMlp, fc1 does not give twice what fc2 takes"),
        (lambda layers: layers.SwiGLUPacked(D, 2 * D, drop=0.1), "GluMlp, its drop"),
    ],
)
def test_what_differs_in_timm_is_left_and_said(make, reason):
    assert patch(make(timm.layers)).report[""].startswith(f"left: {reason}")


def test_a_vision_transformer_of_timm():
    """DINOv2's giant form, tiny: packed SwiGLU, LayerScale, a class token; evaluated and trained."""
    form = dict(img_size=8, patch_size=4, embed_dim=D, depth=DEPTH, num_heads=4, num_classes=3, mlp_ratio=2, init_values=1.0)
    model = filled(timm.models.vision_transformer.VisionTransformer(**form, mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU)).train()
    keys, batch = list(model.state_dict()), (torch.randn(2, 3, 8, 8, dtype=torch.float64),)
    expected = outputs_and_gradients(model, batch)
    handle = patch(model)
    assert fused(handle.report) == {"qk_norm_rope_attention": DEPTH, "swiglu": DEPTH}
    same(outputs_and_gradients(model, batch), expected, 1e-10)
    assert list(model.state_dict()) == keys
    torch._dynamo.reset()
    same(outputs_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), batch), expected, 1e-10)
    handle.undo()
    assert torch.equal(outputs_and_gradients(model, batch)[0], expected[0])
