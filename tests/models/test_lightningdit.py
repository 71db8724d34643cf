"""LightningDiT: laws of its parts, agreement of the fused and the plain form, parity with the reference's tensors."""

import importlib.util
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from vavae_fast.errors import BadInput
from vavae_fast.models import LightningDiT, create_lightningdit
from vavae_kernels._compat import INTERPRETED
from vavae_kernels._registry import auto_means

CASES = ("lightning", "qknorm", "no_shift", "plain_dit_p2", "learn_sigma")
TINY = dict(input_size=4, patch_size=1, in_channels=5, hidden_size=32, depth=3, num_heads=4, num_classes=7)
FORMS = {
    "lightning": dict(use_swiglu=True, use_rope=True, use_rmsnorm=True),
    "qknorm": dict(use_swiglu=True, use_rope=True, use_rmsnorm=True, use_qknorm=True),
    "layer_qknorm": dict(use_swiglu=True, use_rope=True, use_qknorm=True),
    "no_shift": dict(use_swiglu=True, use_rope=True, use_rmsnorm=True, wo_shift=True),
    "dit": dict(patch_size=2),
    "learn_sigma": dict(use_swiglu=True, use_rope=True, use_rmsnorm=True, learn_sigma=True),
}
needs_kernels = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs Triton's interpreter or a GPU")


def tiny(dtype=torch.float32, **changes) -> LightningDiT:
    """A small model whose every parameter is a seeded draw: as initialised, the zero gates would hide all blocks."""
    model = LightningDiT(**{**TINY, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                fan_in = p[0].numel() if p.ndim > 1 else 16
                p.copy_(torch.randn(p.shape, generator=generator) * 0.7 / fan_in**0.5 + (1.0 if "norm" in name else 0.0))
    return model.to(dtype).eval()


def batch(model: LightningDiT, count: int = 3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, model.in_channels, model.input_size, model.input_size, generator=generator, dtype=dtype)
    t = torch.rand(count, generator=generator, dtype=dtype)
    return x, t, torch.randint(0, model.num_classes, (count,), generator=generator)


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def gradients(model, x, t, y) -> dict[str, torch.Tensor]:
    return output_and_gradients(model, x, t, y)[1]


def output_and_gradients(model, x, t, y) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(x, t, y)
    out.float().square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# Laws


def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity():
    model = LightningDiT(**TINY, use_rmsnorm=True, use_rope=True, use_swiglu=True)
    x, t, y = batch(model)
    assert model(x, t, y).abs().max() == 0
    tokens, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    torch.testing.assert_close(model.blocks[0](tokens, c, model.feat_rope), tokens, rtol=0, atol=0)


def test_unpatchify_inverts_patches():
    model = LightningDiT(**{**TINY, "patch_size": 2})
    x = torch.randn(2, 5, 4, 4)
    patches = x.unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 2, 4, 3, 5, 1).reshape(2, 4, 20)
    torch.testing.assert_close(model.unpatchify(patches), x, rtol=0, atol=0)


def test_swiglu_hidden_sizes_are_the_references():
    for width, hidden in ((768, 2048), (1024, 2730), (1152, 3072), (1536, 4096), (1792, 4778)):
        with torch.device("meta"):
            model = LightningDiT(hidden_size=width, depth=1, num_heads=16, use_swiglu=True)
        assert model.blocks[0].mlp.w3.in_features == hidden


# One model, two forms


def _forms_by_kernels():
    """In Triton's interpreter, which takes half a minute a form: two of them have every kernel."""
    for name, form in FORMS.items():
        marks = (needs_kernels,) if name in ("lightning", "layer_qknorm") else (needs_kernels, pytest.mark.exhaustive)
        yield pytest.param(form, torch.float32, 2e-5, "triton", marks=marks, id=f"kernels-{name}")


@pytest.mark.parametrize(
    "form, dtype, bound, impl",
    [pytest.param(form, torch.float64, 1e-12, "auto", id=f"fp64-{name}") for name, form in FORMS.items()]
    + [pytest.param(form, torch.float32, 2e-5, "auto", id=f"fp32-{name}") for name, form in FORMS.items()]
    + list(_forms_by_kernels()),
)
def test_fused_equals_plain(form, dtype, bound, impl):
    plain, fused = tiny(dtype, **form), tiny(dtype, **form, fused=True)
    assert plain.state_dict().keys() == fused.state_dict().keys()
    inputs = batch(plain, dtype=dtype)
    out, expected = output_and_gradients(plain, *inputs)
    with auto_means(impl):
        fused_out, got = output_and_gradients(fused, *inputs)
    assert relative(fused_out, out) < bound
    assert expected.keys() == got.keys()
    for name, grad in expected.items():
        assert relative(got[name], grad) < 10 * bound or grad.abs().max() < bound, name


@pytest.mark.parametrize(
    "form, impl, dtype",
    [(form, "auto", torch.bfloat16) for form in FORMS]
    + [pytest.param(form, "triton", torch.float16, marks=needs_kernels) for form in ("lightning", "layer_qknorm")],
)
def test_fused_is_no_less_accurate_under_autocast(form, impl, dtype):
    """Error against fp64 at most twice that of the plain form in the same autocast, plus a rounding of its dtype.

    The kernels in fp16: Triton's interpreter truncates bf16, and errors of one sign add up over a model.
    """
    form, rounding = FORMS[form], torch.finfo(dtype).eps / 4
    plain, fused, exact = tiny(**form), tiny(**form, fused=True), tiny(torch.float64, **form)
    x, t, y = batch(plain)
    truth = exact(x.double(), t.double(), y)
    true_grads = gradients(exact, x.double(), t.double(), y)
    with torch.autocast("cpu", dtype), auto_means(impl):
        errors = [relative(model(x, t, y).double(), truth) for model in (fused, plain)]
        fused_grads, plain_grads = gradients(fused, x, t, y), gradients(plain, x, t, y)
    assert errors[0] <= 2 * (errors[1] + rounding), f"fused {errors[0]:.2e}, plain {errors[1]:.2e}"
    for name, grad in true_grads.items():
        ours, eager = relative(fused_grads[name].double(), grad), relative(plain_grads[name].double(), grad)
        assert ours <= 2 * (eager + rounding), f"{name}: fused {ours:.2e}, plain {eager:.2e}"


@pytest.mark.parametrize("fused", [False, True])
def test_residual_stream_is_fp32_under_autocast(fused):
    model = tiny(**FORMS["lightning"], fused=fused)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append([i.dtype for i in inputs if isinstance(i, torch.Tensor)]))
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch(model))
    assert seen[0][0] == torch.float32
    assert not fused or seen[0][1:3] == [torch.bfloat16, torch.bfloat16]  # what the last block's gate has yet to add


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", ["lightning", "qknorm", "layer_qknorm"])
def test_attention_takes_a_backend_by_name(form, fused):
    """Of equal mathematics, in fp32 and under autocast; a name that nobody knows is refused when the model is built."""
    default, named = (tiny(**FORMS[form], fused=fused, attention=name) for name in ("auto", "math"))
    inputs = batch(default)
    assert relative(named(*inputs), default(*inputs)) < 2e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(named(*inputs), default(*inputs)) < 2e-2
    with pytest.raises(ValueError, match="LightningDiT: unknown backend 'flush'; known: auto, sdpa"):
        tiny(fused=fused, attention="flush")


def test_the_fused_backend_needs_the_fused_form():
    with pytest.raises(BadInput, match="attention: .* needs fused=True, got 'fused'"):
        tiny(attention="fused")


@pytest.mark.parametrize("mode", [True, "selective"])
@pytest.mark.parametrize("fused", [False, True])
def test_checkpointing_changes_no_gradient(fused, mode):
    model, checkpointing = (tiny(**FORMS["qknorm"], fused=fused, use_checkpoint=m) for m in (False, mode))
    inputs = batch(model)
    expected = gradients(model, *inputs)
    for name, grad in gradients(checkpointing, *inputs).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_bf16_residual_stream_stays_bf16_and_near_the_fp32_one(fused):
    model, narrow = tiny(**FORMS["lightning"], fused=fused), tiny(**FORMS["lightning"], fused=fused, residual_dtype=torch.bfloat16)
    seen = []
    narrow.blocks[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(narrow(*batch(model)), model(*batch(model))) < 3e-2
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_whole_model_in_another_dtype_runs(dtype):
    for fused in (False, True):
        model = tiny(**FORMS["qknorm"], fused=fused).to(dtype)
        assert model(*batch(model, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("fused", [False, True])
def test_compiles_as_one_graph(fused):
    model = tiny(**FORMS["qknorm"], fused=fused)
    inputs = batch(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    compiled.train()(*inputs)


def test_built_on_meta_and_filled_later():
    """`to_empty` and `initialize_weights` give exactly what construction gives, buffers and fixed positions included."""
    args = dict(TINY, **FORMS["layer_qknorm"])
    with torch.device("meta"):
        model = LightningDiT(**args)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(9.0)
    model.initialize_weights()
    expected, state = LightningDiT(**args).state_dict(), model.state_dict()
    drawn = ("attn.qkv.weight", "attn.proj.weight", "mlp.w12.weight", "mlp.w3.weight", "embedder")
    for name, tensor in expected.items():
        if any(part in name for part in drawn) and not name.endswith("bias"):
            assert state[name].std() == pytest.approx(tensor.std().item(), rel=0.5), name
        else:
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)


def test_ema_weights_are_used_through_functional_call():
    """The model is a function of its state: no copy of it is needed."""
    model = tiny(**FORMS["lightning"], fused=True)
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    inputs = batch(model)
    other = tiny(**FORMS["lightning"])
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    assert relative(functional_call(model, doubled, inputs), other(*inputs)) < 2e-5


# Labels


def test_drop_labels_replaces_exactly_those_labels():
    model = tiny(**FORMS["lightning"])
    x, t, y = batch(model)
    drop = torch.tensor([True, False, True])
    expected = model(x, t, torch.where(drop, model.num_classes, y))
    torch.testing.assert_close(model(x, t, y, drop_labels=drop), expected, rtol=0, atol=0)
    torch.testing.assert_close(model.train()(x, t, y, drop_labels=drop), expected, rtol=0, atol=0)


def test_training_mode_drops_labels_at_the_given_rate():
    model = LightningDiT(**{**TINY, "class_dropout_prob": 0.25}).train()
    labels = torch.zeros(4000, dtype=torch.long)
    null = model.y_embedder.embedding_table.weight[model.num_classes]
    rate = (model.y_embedder(labels) == null).all(1).float().mean().item()
    assert rate == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    assert not (model.eval().y_embedder(labels) == null).all(1).any()


def test_without_dropout_there_is_no_null_class():
    model = LightningDiT(**{**TINY, "class_dropout_prob": 0.0})
    assert model.y_embedder.embedding_table.weight.shape[0] == 7
    x, t, y = batch(model)
    with pytest.raises(ValueError, match="class_dropout_prob"):
        model(x, t, y, drop_labels=torch.tensor([True, False, True]))


# Guidance


def guidance_inputs(model):
    x, t, y = batch(model, count=4)
    return torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, model.num_classes)])


@pytest.mark.parametrize("channels", [0, 3, "all"])
def test_guidance_is_the_formula_on_the_first_channels(channels):
    model = tiny(**FORMS["lightning"])
    x, t, y = guidance_inputs(model)
    count = 5 if channels == "all" else channels
    label, null = model(x, t, y).chunk(2)
    out_label, out_null = model.forward_with_cfg(x, t, y, 4.0, cfg_channels=channels).chunk(2)
    guided = null + 4.0 * (label - null)
    for out, own in ((out_label, label), (out_null, null)):
        torch.testing.assert_close(out[:, :count], guided[:, :count])
        torch.testing.assert_close(out[:, count:], own[:, count:])


def test_guidance_ignores_the_second_half_of_the_state():
    model = tiny(**FORMS["lightning"])
    x, t, y = guidance_inputs(model)
    other = x.clone()
    other[4:] = 100.0
    torch.testing.assert_close(model.forward_with_cfg(other, t, y, 2.0), model.forward_with_cfg(x, t, y, 2.0), rtol=0, atol=0)


def test_guidance_interval_holds_for_each_sample_and_both_ends():
    model = tiny(**FORMS["lightning"])
    x, _, y = guidance_inputs(model)
    t = torch.tensor([0.1, 0.25, 0.75, 0.9]).repeat(2)
    always = model.forward_with_cfg(x, t, y, 4.0, cfg_channels="all")
    label = model(x, t, y)[:4]
    out = model.forward_with_cfg(x, t, y, 4.0, True, 0.25, 0.75, cfg_channels="all")
    for half in out.chunk(2):
        torch.testing.assert_close(half[[1, 2]], always[:4][[1, 2]], rtol=0, atol=0)  # both ends belong to the interval
        torch.testing.assert_close(half[[0, 3]], label[[0, 3]], rtol=0, atol=0)
    off = model.forward_with_cfg(x, t, y, 4.0, False, 0.25, 0.75, cfg_channels="all")
    torch.testing.assert_close(off, always, rtol=0, atol=0)
    default_end = model.forward_with_cfg(x, t, y, 4.0, True, 0.25, cfg_channels="all")
    torch.testing.assert_close(default_end[[1, 2, 3]], always[[1, 2, 3]], rtol=0, atol=0)


# Bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(input_size=5, patch_size=2), "input_size"),
        (dict(hidden_size=33), "hidden_size"),
        (dict(hidden_size=24, num_heads=4, use_rope=True), "hidden_size / num_heads"),
        (dict(num_heads=0), "num_heads"),
        (dict(class_dropout_prob=1.0), "class_dropout_prob"),
        (dict(depth=0), "depth"),
        (dict(depth=2.0), "^depth: must be an integer above 0, got 2.0"),
        (dict(depth="2"), "^depth"),
        (dict(num_classes=None), "^num_classes"),
        (dict(mlp_ratio=0.0), "^mlp_ratio"),
        (dict(mlp_ratio=-4.0), "^mlp_ratio"),
        (dict(mlp_ratio="4"), "^mlp_ratio"),
        (dict(mlp_ratio=0.04, use_swiglu=True), "^mlp_ratio"),
        (dict(class_dropout_prob=None), "^class_dropout_prob"),
    ],
)
def test_bad_construction_names_the_argument(changes, message):
    with pytest.raises(BadInput, match=message):
        LightningDiT(**{**TINY, **changes})


def test_bad_names_and_sizes():
    with pytest.raises(BadInput, match="unknown model_type 'LightningDiT-XXL/1'.*LightningDiT-XL/1"):
        create_lightningdit("LightningDiT-XXL/1")
    with pytest.raises(BadInput, match="custom needs depth, num_heads"):
        create_lightningdit("custom", hidden_size=32)
    with pytest.raises(BadInput, match="depth 12, got 3"):
        create_lightningdit("LightningDiT-S/1", depth=3)
    model = create_lightningdit("custom", hidden_size=32, depth=1, num_heads=2, patch_size=4)
    assert model.patch_size == 4 and model.pos_embed.shape == (1, 16, 32)


@pytest.mark.parametrize("fused", [False, True])
def test_bad_inputs_name_the_tensor(fused):
    model = tiny(**FORMS["lightning"], fused=fused)
    x, t, y = batch(model)
    for inputs, message in (
        ((x[:, :4], t, y), "x has shape"),
        ((x[:, :, :2], t, y), "x has shape"),
        ((x, t[:2], y), "t has shape"),
        ((x, t, y[:1]), "y has shape"),
        ((x, t, y.float()), "integer"),
        ((x, t, None), "^LightningDiT: y must be a tensor, got NoneType"),
        ((x, 0.5, y), "^LightningDiT: t must be a tensor, got float"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*inputs)
    with pytest.raises(ValueError, match="2N"):
        model.forward_with_cfg(x, t, y, 2.0)
    with pytest.raises(ValueError, match="cfg_channels"):
        model.forward_with_cfg(x[:2], t[:2], y[:2], 2.0, cfg_channels="some")
    with pytest.raises(ValueError, match="cfg_interval_start"):
        model.forward_with_cfg(x[:2], t[:2], y[:2], 2.0, cfg_interval=True)


# Parity with the reference


@pytest.fixture(scope="module")
def golden_model(golden_dir):
    """(case, fused) -> the model with the golden weights, and the case's tensors."""
    meta = json.loads((golden_dir / "meta.json").read_text())
    spec = importlib.util.spec_from_file_location("golden_state", golden_dir / "golden_state.py")
    golden_state = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden_state)

    def build(case: str, fused: bool):
        tensors = load_file(golden_dir / f"lightningdit_{case}.safetensors")
        shapes = meta["state_dict_shapes"][case]
        state = {
            name: tensors[f"buffer.{name}"] if f"buffer.{name}" in tensors else golden_state.golden_parameter(name, tuple(shape), meta["seed"])
            for name, shape in shapes.items()
        }
        model = LightningDiT(**meta["lightningdit"][case], fused=fused)
        own = model.state_dict()
        assert {name: list(tensor.shape) for name, tensor in own.items()} == shapes
        for name in own:
            if f"buffer.{name}" in tensors:
                torch.testing.assert_close(own[name], tensors[f"buffer.{name}"], rtol=0, atol=2e-6)
        model.load_state_dict(state, strict=True)
        return model.eval(), tensors

    return build


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_guidance_are_the_references(golden_model, case, fused):
    check_against_the_reference(*golden_model(case, fused))


@needs_kernels
@pytest.mark.exhaustive  # half a minute in the interpreter, and implied by two tests above
def test_the_published_form_on_its_kernels_is_the_reference(golden_model):
    with auto_means("triton"):
        check_against_the_reference(*golden_model("lightning", fused=True))


def check_against_the_reference(model, golden):
    x, t, y = golden["x"], golden["t"], golden["y"]
    out = model(x, t, y)
    assert relative(out, golden["out"]) <= 2e-5
    out.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = {key.removeprefix("grad."): value for key, value in golden.items() if key.startswith("grad.")}
    assert expected.keys() <= grads.keys()
    for name, grad in expected.items():
        assert relative(grads[name], grad) <= 2e-4, name
    with torch.no_grad():
        for key in ("0.4", "0.05"):
            times = torch.full((len(golden["cfg.x"]),), float(key))
            guided = model.forward_with_cfg(golden["cfg.x"], times, golden["cfg.y"], 4.0, True, 0.11)
            assert relative(guided, golden[f"cfg.out_t{key}"]) <= 2e-5
