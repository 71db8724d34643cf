"""patch() on the real classes of diffusers, tiny: results and gradients, what is left and why, processors, undo."""

import copy
import io
import re

import pytest
import torch
from torch import nn

from vavae_fast.models._torchvision import import_timm
from vavae_kernels import attention_backends, patch, patching_diffusers, register_backend

import_timm()  # past a torchvision that does not fit the installed torch; diffusers imports it too
diffusers = pytest.importorskip("diffusers", reason="pip install diffusers: patch() is tested on its models")
from diffusers.models import attention_processor  # noqa: E402
from diffusers.models.attention import BasicTransformerBlock  # noqa: E402

IN_FP32 = 32 * torch.finfo(torch.float32).eps  # diffusers' RMSNorm takes the mean square in fp32, whatever the dtype
OF_DIT = ("attention", "gate_add_norm_modulate", "norm_modulate")


def filled(model: nn.Module) -> nn.Module:
    """Random everywhere, also where an initialisation is zero; fp64, no dropout of labels."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def dit(**changes) -> nn.Module:
    form = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=4, patch_size=1)
    return filled(diffusers.DiTTransformer2DModel(**{**form, "num_embeds_ada_norm": 5, "norm_num_groups": 1, **changes}))


def sd3(**changes) -> nn.Module:
    form = dict(sample_size=4, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4)
    wide = dict(joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8)
    return filled(diffusers.SD3Transformer2DModel(**{**form, **wide, **changes}))


def flux() -> nn.Module:
    form = dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)
    return filled(diffusers.FluxTransformer2DModel(**form, joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8)))


def pixart() -> nn.Module:
    form = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=4, patch_size=1)
    model = diffusers.PixArtTransformer2DModel(**form, cross_attention_dim=16, caption_channels=8, use_additional_conditions=False)
    return filled(model)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


INPUTS = {  # arguments of each model's forward
    dit: lambda: dict(hidden_states=randn(2, 4, 4, 4), timestep=torch.tensor([1, 5]), class_labels=torch.tensor([0, 3])),
    sd3: lambda: dict(
        hidden_states=randn(2, 4, 4, 4),
        encoder_hidden_states=randn(2, 3, 16),
        pooled_projections=randn(2, 8),
        timestep=torch.tensor([1.0, 5.0]),
    ),
    flux: lambda: dict(
        hidden_states=randn(2, 4, 4),
        encoder_hidden_states=randn(2, 3, 16),
        pooled_projections=randn(2, 8),
        timestep=torch.tensor([0.1, 0.5], dtype=torch.float64),
        img_ids=torch.rand(4, 3),
        txt_ids=torch.zeros(3, 3),
        guidance=None,
    ),
    pixart: lambda: dict(hidden_states=randn(2, 4, 4, 4), encoder_hidden_states=randn(2, 3, 8), timestep=torch.tensor([1, 5]), added_cond_kwargs={}),
}


def outputs_and_gradients(model: nn.Module, arguments: dict) -> list[torch.Tensor]:
    out = model(**arguments, return_dict=False)[0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


def processors(model: nn.Module) -> set[str]:
    return {type(module.processor).__name__ for module in model.modules() if hasattr(module, "processor")}


def same(got: list[torch.Tensor], expected: list[torch.Tensor], rounding: float = 1e-10) -> None:
    """Equal to `rounding` of the largest entry of all: some gradients are zero but for rounding, that of a key's bias for one."""
    assert len(got) == len(expected)
    largest = max(theirs.abs().max() for theirs in expected)
    for ours, theirs in zip(got, expected):
        assert (ours - theirs).abs().max() <= rounding * largest


@pytest.mark.parametrize("ops", [None, *([op] for op in OF_DIT)], ids=lambda ops: "all" if ops is None else ops[0])
@pytest.mark.parametrize("changes", [{}, dict(activation_fn="geglu", attention_bias=False), dict(norm_eps=1e-3)])
def test_dit_keeps_outputs_gradients_and_keys(ops, changes):
    model, arguments = dit(**changes), INPUTS[dit]()
    keys, expected = list(model.state_dict()), outputs_and_gradients(model, arguments)
    handle = patch(model, ops)
    fused = [line.removeprefix("fused: ") for line in handle.report.values() if line.startswith("fused")]
    assert sorted(fused) == sorted(2 * (ops or list(OF_DIT)))
    same(outputs_and_gradients(model, arguments), expected)
    assert list(model.state_dict()) == keys
    handle.undo()
    assert torch.equal(outputs_and_gradients(model, arguments)[0], expected[0])
    assert not any("forward" in vars(module) for module in model.modules())
    assert processors(model) == {"AttnProcessor2_0"}


@pytest.mark.parametrize(
    "make, fused, left",
    [
        (
            lambda: dit(norm_elementwise_affine=True),
            {"norm_modulate": 2, "attention": 2},
            {"BasicTransformerBlock, its norm3 has a bias": 2, "DiTTransformer2DModel": 1},
        ),
        (
            sd3,
            {"norm_modulate": 5, "gate_add_norm_modulate": 2},
            {"Attention, its processor is JointAttnProcessor2_0, not AttnProcessor2_0": 2},
        ),
        (
            lambda: sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
            {"norm_modulate": 4, "gate_add_norm_modulate": 2, "rms_norm": 10},
            {"SD35AdaLayerNormZeroX": 1, "Attention": 3},
        ),
        (flux, {"norm_modulate": 4, "rms_norm": 6}, {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 1, "FluxAttention": 2}),
        (
            pixart,
            {"attention": 1, "norm_modulate": 1},
            {"Attention, it is a cross-attention": 1},
        ),
    ],
    ids=["dit with affine norms", "sd3", "sd3.5", "flux", "pixart"],
)
def test_what_fits_is_fused_and_the_rest_is_left_with_a_reason(make, fused, left):
    model = make()
    arguments = INPUTS[{"DiT": dit, "SD3": sd3, "Flu": flux, "Pix": pixart}[type(model).__name__[:3]]]()
    expected = outputs_and_gradients(model, arguments)
    handle = patch(model)
    lines = list(handle.report.values())
    assert {op: lines.count(f"fused: {op}") for op in {line[7:] for line in lines if line.startswith("fused: ")}} == fused
    for start, count in left.items():
        found = [line for line in lines if re.match(rf"left: {re.escape(start)}(,|$)", line)]
        assert len(found) == count, start
    assert len(lines) == sum(fused.values()) + sum(left.values())
    same(outputs_and_gradients(model, arguments), expected, IN_FP32 if "rms_norm" in fused else 1e-10)
    handle.undo()
    assert torch.equal(outputs_and_gradients(model, arguments)[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_in_low_precision_keep_the_numerics_rule(dtype):
    model, arguments = dit().to(dtype), INPUTS[dit]()
    arguments["hidden_states"] = arguments["hidden_states"].to(dtype)
    exact = outputs_and_gradients(copy.deepcopy(model).double(), {**arguments, "hidden_states": arguments["hidden_states"].double()})
    eager = outputs_and_gradients(model, arguments)
    patch(model)
    for true, plain, ours in zip(exact, eager, outputs_and_gradients(model, arguments)):
        band = torch.finfo(dtype).eps * true.abs().max()
        assert ours.dtype == dtype and (ours - true).abs().max() <= 2 * ((plain - true).abs().max() + band)


@pytest.mark.parametrize("op", OF_DIT)
def test_the_operator_is_really_called(op, monkeypatch):
    def bomb(*_, **__):
        raise ArithmeticError(op)

    model = dit()
    patch(model, [op])
    monkeypatch.setattr(patching_diffusers, op, bomb)
    with pytest.raises(ArithmeticError, match=op):
        model(**INPUTS[dit]())


# blocks


def block(**changes) -> nn.Module:
    form = dict(norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6)
    return filled(BasicTransformerBlock(16, 2, 8, **{**form, **changes}))


@pytest.mark.parametrize("changes", [{}, dict(cross_attention_dim=12), dict(double_self_attention=True)], ids=["latte", "pixart", "two attentions"])
def test_adaln_single_with_and_without_a_second_attention(changes, monkeypatch):
    module, others = block(**changes), randn(2, 3, 12) if "cross_attention_dim" in changes else None
    arguments = dict(hidden_states=randn(2, 5, 16), encoder_hidden_states=others, timestep=randn(2, 96))
    arguments |= {} if others is None else dict(encoder_attention_mask=randn(2, 1, 3))
    expected = module(**arguments)
    assert patch(module, ["norm_modulate"]).report == {"": "fused: norm_modulate"}
    same([module(**arguments)], [expected])
    module.set_chunk_feed_forward(5, dim=1)
    assert torch.equal(module(**arguments), expected)  # in chunks: by its own forward
    module.set_chunk_feed_forward(None)
    monkeypatch.setattr(patching_diffusers, "norm_modulate", None)
    with pytest.raises(TypeError):
        module(**arguments)


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(norm_type="layer_norm"), "its norm_type is layer_norm; ada_norm_zero and ada_norm_single are known"),
        (dict(cross_attention_dim=12, only_cross_attention=True), "its first attention is a cross-attention"),
        (dict(norm_elementwise_affine=True), "its norm1 has a bias"),
        (dict(positional_embeddings="sinusoidal", num_positional_embeddings=9), "its pos_embed (SinusoidalPositionalEmbedding) is not part"),
    ],
)
def test_a_block_that_differs_is_left(changes, reason):
    assert patch(block(**changes)).report[""].startswith(f"left: BasicTransformerBlock, {reason}")


def test_what_the_joint_block_cannot_do_its_own_forward_does():
    model, arguments = sd3(), INPUTS[sd3]()
    for module in model.transformer_blocks:
        module.set_chunk_feed_forward(2, dim=1)
    arguments["encoder_hidden_states"] = randn(2, 4, 16)
    expected = outputs_and_gradients(model, arguments)
    patch(model)
    same(outputs_and_gradients(model, arguments), expected)


def test_a_hook_inside_of_a_joint_block_keeps_it_as_it_is():
    model = sd3()
    model.transformer_blocks[0].norm2_context.register_forward_hook(lambda module, args, out: None)
    report = patch(model).report
    assert report["transformer_blocks.0"].endswith("its norm2_context has a hook or a forward of its own, which would not be called")
    assert report["transformer_blocks.1"] == "fused: gate_add_norm_modulate"


# attention


def attention(**changes) -> nn.Module:
    return filled(attention_processor.Attention(query_dim=16, heads=2, dim_head=8, **changes))


@pytest.mark.parametrize("changes", [{}, dict(bias=True), dict(qk_norm="rms_norm"), dict(qk_norm="layer_norm"), dict(out_dim=8, dropout=0.5)])
def test_self_attention_with_and_without_packed_projections(changes):
    module, x = attention(**changes), randn(2, 5, 16)
    expected, rounding = module(x), IN_FP32 if changes.get("qk_norm") == "rms_norm" else 1e-12
    patch(module)
    same([module(x)], [expected], rounding)
    with torch.no_grad():
        module.fuse_projections()
    same([module(x)], [expected], rounding)


def test_masks_images_and_other_tokens_go_to_the_processor_that_was_there():
    module, calls = attention(), []
    mask, image, others = randn(2, 1, 5), randn(2, 16, 2, 3), randn(2, 4, 16)
    cases = [(randn(2, 5, 16), dict(attention_mask=mask)), (image, {}), (randn(2, 5, 16), dict(encoder_hidden_states=others))]
    expected = [module(x, **keywords) for x, keywords in cases]
    patch(module)
    own = module.processor.own
    module.processor.own = lambda *arguments: calls.append(1) or own(*arguments)
    for (x, keywords), true in zip(cases, expected):
        assert torch.equal(module(x, **keywords), true)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(cross_attention_dim=16), "it is a cross-attention"),
        (dict(residual_connection=True), "it adds its input to its output, or divides the output"),
        (dict(rescale_output_factor=2.0), "it adds its input to its output, or divides the output"),
        (dict(norm_num_groups=2), "its group_norm (GroupNorm) is not part of the fused form"),
        (dict(spatial_norm_dim=32), "its spatial_norm (SpatialNorm) is not part of the fused form"),
        (dict(kv_heads=1), "its keys and values have fewer heads than its queries"),
        (dict(pre_only=True), "it has no to_out"),
        (dict(processor=attention_processor.AttnProcessor()), "its processor is AttnProcessor, not AttnProcessor2_0"),
    ],
)
def test_attention_that_differs_is_left(changes, reason):
    if "spatial_norm_dim" in changes:
        module = attention_processor.Attention(query_dim=32, heads=2, dim_head=8, **changes)
    else:
        module = attention_processor.Attention(query_dim=16, heads=2, dim_head=8, **changes)
    processor = module.processor
    assert patch(module).report == {"": f"left: Attention, {reason}"} and module.processor is processor


def test_backends_by_name(monkeypatch):
    model, arguments = dit(), INPUTS[dit]()
    expected = outputs_and_gradients(model, arguments)
    for backend in ("sdpa", "math"):
        handle = patch(model, ["attention"], backend=backend)
        same(outputs_and_gradients(model, arguments), expected)
        handle.undo()
    monkeypatch.setattr(attention_backends, "BACKENDS", dict(attention_backends.BACKENDS))
    seen = []
    register_backend("mine", lambda q, k, v, scale: seen.append((q.shape, scale)) or attention_backends.attention(q, k, v, scale, "math"))
    patch(model, ["attention"], backend="mine")
    same(outputs_and_gradients(model, arguments), expected)
    assert seen == 2 * [((2, 2, 16, 8), None)]


def test_a_backend_for_packed_qkv_alone_is_refused():
    model = dit()
    with pytest.raises(ValueError, match="^patch: backend 'fused' needs packed qkv, diffusers projects q, k and v apart"):
        patch(model, backend="fused")
    assert processors(model) == {"AttnProcessor2_0"} and not any("forward" in vars(module) for module in model.modules())


def test_a_processor_that_the_user_sets_later_stays():
    model = dit()
    handle = patch(model)
    assert processors(model) == {"BackendProcessor"}
    assert "it is patched already" in patch(model).report["transformer_blocks.0.attn1"]
    theirs = attention_processor.AttnProcessor()
    model.transformer_blocks[0].attn1.set_processor(theirs)
    handle.undo()
    assert model.transformer_blocks[0].attn1.processor is theirs
    assert type(model.transformer_blocks[1].attn1.processor).__name__ == "AttnProcessor2_0"


def test_what_the_block_cannot_do_its_own_forward_does():
    model, arguments = dit(), INPUTS[dit]()
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(4, dim=1)
    expected = outputs_and_gradients(model, arguments)
    patch(model)
    same(outputs_and_gradients(model, arguments), expected)
    with pytest.raises(ValueError, match="no module takes swiglu"):
        patch(model, ["swiglu"])


def test_a_swiglu_of_diffusers_gates_by_its_second_half():
    from diffusers.models.activations import SwiGLU

    assert patch(SwiGLU(4, 8)).report == {"": "left: SwiGLU, its gate is the second half of proj, swiglu's is the first"}


# life after patch()


def through_pickle(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_patched_model_stands_alone(copied):
    model, arguments = dit(), INPUTS[dit]()
    expected = outputs_and_gradients(model, arguments)
    handle = patch(model)
    twin = copied(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    handle.undo()
    assert processors(twin) == {"BackendProcessor"}
    same(outputs_and_gradients(twin, arguments), expected)


def test_dropout_of_diffusers_stands_outside_of_the_operators():
    """Its attention drops nothing out; the dropouts after the projections are modules that are still called."""
    model, arguments = dit(dropout=0.3).train(), INPUTS[dit]()
    model.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob = model.transformer_blocks[1].norm1.emb.class_embedder.dropout_prob = 0
    torch.manual_seed(1)
    expected = outputs_and_gradients(model, arguments)
    assert OF_DIT == tuple(sorted({line[7:] for line in patch(model).report.values() if line.startswith("fused")}))
    torch.manual_seed(1)
    same(outputs_and_gradients(model, arguments), expected)


def test_gradient_checkpointing_recomputes_patched_blocks():
    model, arguments = dit(), INPUTS[dit]()
    expected = outputs_and_gradients(model, arguments)
    patch(model)
    model.enable_gradient_checkpointing()
    same(outputs_and_gradients(model, arguments), expected)


def test_a_patched_model_compiles_whole():
    torch._dynamo.reset()
    model, arguments = dit(), INPUTS[dit]()
    expected = outputs_and_gradients(model, arguments)
    patch(model)
    same(outputs_and_gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), arguments), expected)


def test_all_blocks_of_a_patched_model_are_one_graph():
    """A graph for each would hit torch.compile's limit at the ninth block."""
    torch._dynamo.reset()
    model, arguments = dit(num_layers=3), INPUTS[dit]()
    expected = outputs_and_gradients(model, arguments)
    patch(model)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for module in model.transformer_blocks:
        module.compile(fullgraph=True, backend="aot_eager")
    same(outputs_and_gradients(model, arguments), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= before + 2  # the first block's input asks for no gradient


def test_a_patched_model_saves_and_loads_as_diffusers_does(tmp_path):
    model, arguments = dit(), INPUTS[dit]()
    expected = outputs_and_gradients(model, arguments)[0]
    patch(model)
    model.save_pretrained(tmp_path)
    loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float64).eval()
    torch.testing.assert_close(outputs_and_gradients(loaded, arguments)[0], expected, rtol=1e-10, atol=1e-12)
