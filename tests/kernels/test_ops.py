"""Every operator: the laws that all share, over a table, then the mathematics of each against PyTorch's own."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import vavae_kernels
from vavae_kernels import (
    flow_interpolate,
    flow_loss,
    gate_add_norm_modulate,
    group_norm_silu,
    norm_modulate,
    qk_norm_rope,
    qk_norm_rope_attention,
    rms_norm,
    swiglu,
    vf_loss,
)

B, N, D, H, DH, C = 2, 3, 6, 2, 4, 4


def tables(tokens: int = N, head_dim: int = DH) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(tokens, head_dim // 2, dtype=torch.float64).repeat_interleave(2, dim=1) * 6
    return angle.cos(), angle.sin()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def modulation(count: int) -> list[torch.Tensor]:
    """`count` chunk views of one (B, count · D) tensor, as a modulation layer gives them."""
    return list(randn(B, count * D).chunk(count, dim=1))


def qkv_arguments(norm: str | None) -> dict:
    cos, sin = tables()
    weights = {} if norm is None else dict(q_weight=1 + 0.1 * randn(DH), k_weight=1 + 0.1 * randn(DH))
    biases = dict(q_bias=randn(DH), k_bias=randn(DH)) if norm == "layer" else {}
    return dict(qkv=randn(B, N, 3, H, DH), cos=cos, sin=sin, norm=norm, **weights, **biases)


def modulate_arguments(norm: str, shift: bool) -> dict:
    scale, *rest = modulation(2 if shift else 1)
    return dict(x=randn(B, N, D), scale=scale, shift=rest[0] if shift else None, weight=1 + 0.1 * randn(D), norm=norm)


def gate_arguments(norm: str, shift: bool) -> dict:
    gate, scale, *rest = modulation(3 if shift else 2)
    arguments = dict(residual=randn(B, N, D), y=randn(B, N, D), gate=gate, scale=scale, norm=norm)
    return {**arguments, "shift": rest[0] if shift else None, "weight": 1 + 0.1 * randn(D) if norm == "rms" else None}


CASES = {  # id -> (operator, fp64 arguments)
    "rms_norm": (rms_norm, lambda: dict(x=randn(B, N, D), weight=1 + 0.1 * randn(D))),
    "norm_modulate rms": (norm_modulate, lambda: modulate_arguments("rms", shift=True)),
    "norm_modulate layer": (norm_modulate, lambda: modulate_arguments("layer", shift=False)),
    "gate_add_norm_modulate rms": (gate_add_norm_modulate, lambda: gate_arguments("rms", shift=False)),
    "gate_add_norm_modulate layer": (gate_add_norm_modulate, lambda: gate_arguments("layer", shift=True)),
    "qk_norm_rope": (qk_norm_rope, lambda: qkv_arguments(None)),
    "qk_norm_rope rms": (qk_norm_rope, lambda: qkv_arguments("rms")),
    "qk_norm_rope layer": (qk_norm_rope, lambda: qkv_arguments("layer")),
    "qk_norm_rope_attention": (qk_norm_rope_attention, lambda: qkv_arguments(None)),
    "qk_norm_rope_attention rms": (qk_norm_rope_attention, lambda: qkv_arguments("rms")),
    "swiglu": (swiglu, lambda: dict(x12=randn(B, N, 2 * D))),
    "group_norm_silu": (group_norm_silu, lambda: dict(x=randn(B, C, 3, 2), num_groups=2, weight=randn(C), bias=randn(C))),
    "group_norm": (group_norm_silu, lambda: dict(x=randn(B, C, 3, 2), num_groups=4, weight=randn(C), bias=randn(C), silu=False)),
    "flow_interpolate": (
        flow_interpolate,
        lambda: dict(x0=randn(B, C, 3, 2), x1=randn(B, C, 3, 2), t=torch.rand(B, dtype=torch.float64)),
    ),
    "flow_loss": (flow_loss, lambda: dict(v=randn(B, C, 3, 2), x0=randn(B, C, 3, 2), x1=randn(B, C, 3, 2))),
    "vf_loss projected": (
        vf_loss,
        lambda: dict(z=randn(B, C, 3, 2), projection=randn(D, C), features=randn(B, D, 3, 2), distmat_margin=0.1, cos_margin=0.2),
    ),
    "vf_loss": (vf_loss, lambda: dict(z=randn(B, C, 3, 2), projection=None, features=randn(B, C, 3, 2), cos_margin=0.5)),
}
NEEDED_BY_OTHERS = {"cos": "come together", "sin": "come together", "projection": "give a projection"}
NO_GRADIENT = {"cos", "sin", "features", "x0", "x1"}
over_operators = pytest.mark.parametrize("op, make", CASES.values(), ids=CASES.keys())


def differentiable(op, arguments: dict) -> list[str]:
    frozen = NO_GRADIENT if op is not flow_interpolate else set()
    return [name for name, value in arguments.items() if isinstance(value, torch.Tensor) and name not in frozen]


def cast(arguments: dict, dtype: torch.dtype) -> dict:
    return {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def as_tuple(out) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def reference_of(op):
    return getattr(inspect.getmodule(op), f"{op.__name__}_reference")


def with_gradients(op, arguments: dict, cotangents: list[torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    names = differentiable(op, arguments)
    arguments = {name: value.detach().requires_grad_() if name in names else value for name, value in arguments.items()}
    outs = as_tuple(op(**arguments))
    grads = torch.autograd.grad(outs, [arguments[name] for name in names], [g.to(o.dtype) for g, o in zip(cotangents, outs)])
    return outs, dict(zip(names, grads))


# Laws of all operators


@over_operators
def test_gradients_in_fp64(op, make):
    arguments = make()
    names = differentiable(op, arguments)

    def function(*tensors):
        return op(**{**arguments, **dict(zip(names, tensors))})

    assert torch.autograd.gradcheck(function, [arguments[name].clone().requires_grad_() for name in names])


@over_operators
def test_auto_and_torch_are_the_reference(op, make):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        arguments = cast(make(), dtype)
        expected = as_tuple(reference_of(op)(**arguments))
        for impl in ("auto", "torch"):
            for got, wanted in zip(as_tuple(op(**arguments, impl=impl)), expected):
                assert got.dtype == wanted.dtype and torch.equal(got, wanted)


@over_operators
def test_impl_is_checked(op, make):
    with pytest.raises(ValueError, match=f"{op.__name__}: .*Triton"):
        op(**make(), impl="triton")
    with pytest.raises(ValueError, match=f"{op.__name__}: impl must be one of auto, triton, torch, got 'cuda'"):
        op(**make(), impl="cuda")


@over_operators
def test_no_input_is_written_and_calls_repeat_bit_for_bit(op, make):
    arguments = cast(make(), torch.float32)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    cotangents = [torch.randn_like(o) for o in as_tuple(op(**arguments))]
    first, first_grads = with_gradients(op, arguments, cotangents)
    second, second_grads = with_gradients(op, arguments, cotangents)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)


@over_operators
def test_strides_do_not_matter(op, make):
    arguments = make()
    strided = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            value = torch.stack((value, torch.full_like(value, torch.nan)), dim=-1).movedim(-1, 0)[0]  # every second element
            assert value.numel() == 1 or not value.is_contiguous()
        strided[name] = value
    for got, expected in zip(as_tuple(op(**strided)), as_tuple(op(**arguments))):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@over_operators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(op, make, dtype):
    """Against fp64 on the same rounded inputs, an output is off by one rounding of its dtype and fp32's arithmetic."""
    arguments = cast(make(), dtype)
    exact = cast(arguments, torch.float64)
    cotangents = [torch.randn_like(o).to(dtype).double() for o in as_tuple(op(**exact))]
    outs, grads = with_gradients(op, arguments, cotangents)
    true_outs, true_grads = with_gradients(op, exact, cotangents)
    for name, grad in grads.items():
        assert grad.dtype == arguments[name].dtype, name
    pairs = [*zip(outs, true_outs), *((grads[name], true_grads[name]) for name in grads)]
    for got, truth in pairs:
        scale = truth.abs().max().clamp_min(torch.finfo(dtype).tiny)
        step = torch.finfo(got.dtype).eps
        assert ((got.double() - truth).abs() <= step / 2 * truth.abs() * 1.001 + 3e-5 * scale).all()


@over_operators
def test_losses_and_outputs_keep_fp64(op, make):
    assert all(out.dtype == torch.float64 for out in as_tuple(op(**make())))


def misshapen(value: torch.Tensor) -> torch.Tensor:
    """A tensor of another shape that no operator takes in `value`'s place."""
    if value.ndim == 4:
        return value[0]
    return value[:-1] if value.ndim == 1 else torch.cat([value, value], dim=-1)[..., :-1]


@over_operators
def test_bad_tensors_are_refused_at_the_door(op, make):
    arguments = make()
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        with pytest.raises(ValueError, match=f"{op.__name__}: {name} must be floating point, got torch.int64"):
            op(**{**arguments, name: value.long()})
        if sum(isinstance(other, torch.Tensor) for other in arguments.values()) > 1:
            with pytest.raises(ValueError, match=f"{op.__name__}: .* is on "):
                op(**{**arguments, name: value.to("meta")})
        with pytest.raises(ValueError, match=f"{op.__name__}: "):
            op(**{**arguments, name: misshapen(value)})
        with pytest.raises(ValueError, match=f"{op.__name__}: {name} must be a tensor, got list"):
            op(**{**arguments, name: value.tolist()})
        with pytest.raises(ValueError, match=f"^{op.__name__}: {name} must be floating point, got torch.float8_e4m3fn; float64, float32, "):
            op(**{**arguments, name: value.to(torch.float8_e4m3fn)})
        for gappy, layout in ((value.to_sparse(), "torch.sparse_coo"), (value.float().to_mkldnn(), "torch._mkldnn")):
            with pytest.raises(ValueError, match=f"^{op.__name__}: {name} must be dense, got layout {layout}"):
                op(**{**arguments, name: gappy})


@over_operators
def test_only_what_has_a_default_or_a_meaning_may_be_left_out(op, make):
    """None in place of a tensor that the formula needs is named; elsewhere it is an argument left out."""
    arguments = make()
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        changed = {**arguments, name: None}
        if inspect.signature(op).parameters[name].annotation == torch.Tensor:
            with pytest.raises(ValueError, match=f"^{op.__name__}: {name} must be a tensor, got NoneType$"):
                op(**changed)
        elif name in NEEDED_BY_OTHERS:
            with pytest.raises(ValueError, match=f"^{op.__name__}: .*{NEEDED_BY_OTHERS[name]}"):
                op(**changed)
        else:
            op(**changed)


@over_operators
def test_numbers_and_dtypes_of_the_wrong_kind_are_named(op, make):
    wrong = {"eps": ["1e-6", None, True, torch.nan, -1e-6], "num_groups": [2.0, None, 0, "2"], "scale": ["1"], "out_dtype": ["fp32", torch.int64, 1]}
    wrong |= {"distmat_margin": [None, "0", torch.nan], "cos_margin": [None, [0.0], torch.inf]}
    arguments = make()
    taken = inspect.signature(op).parameters.keys() - {name for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    for name in wrong.keys() & taken:
        for value in wrong[name]:
            with pytest.raises(ValueError, match=f"^{op.__name__}: {name} must be [^\\n]*$"):
                op(**{**arguments, name: value})


@over_operators
def test_compiles_as_one_graph(op, make):
    arguments = cast(make(), torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(lambda **kwargs: op(**kwargs), fullgraph=True, backend="eager")
    for got, expected in zip(as_tuple(compiled(**arguments)), as_tuple(op(**arguments))):
        torch.testing.assert_close(got, expected)


@over_operators
def test_autocast_around_it_changes_nothing(op, make):
    arguments = cast(make(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = as_tuple(op(**arguments))
    assert all(torch.equal(a, b) for a, b in zip(inside, as_tuple(op(**arguments))))


@pytest.mark.parametrize("op, make", [case for case in CASES.values() if case[0] is not vf_loss])  # its mean over none is NaN
def test_empty_batch(op, make):
    arguments = make()
    batched = {"x", "residual", "y", "gate", "scale", "shift", "qkv", "x12", "x0", "x1", "t", "v"}
    arguments = {name: value[:0] if name in batched and value is not None else value for name, value in arguments.items()}
    assert all(out.numel() == 0 for out in as_tuple(op(**arguments)))


def test_a_dtensor_is_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = DTensor.from_local(torch.randn(2, 4), init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match="swiglu: x12 is a DTensor"):
            swiglu(x)
    finally:
        torch.distributed.destroy_process_group()


def test_every_operator_is_in_the_table():
    listed = {op.__name__ for op, _ in CASES.values()}
    assert listed == set(vavae_kernels.__all__) - {"AdamWEMA", "patch", "attention", "register_backend", "backend_table"}


# The mathematics of each


def test_norm_modulate_is_layer_norm_modulated():
    x, scale, shift = randn(B, N, D), randn(B, D), randn(B, D)
    expected = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(norm_modulate(x, scale, shift, norm="layer"), expected)
    expected = F.rms_norm(x, (D,), eps=1e-6) * (1 + scale[:, None])
    torch.testing.assert_close(norm_modulate(x, scale), expected)


def test_gate_operator_is_the_composition():
    arguments = gate_arguments("rms", shift=True)
    residual, y, gate = (arguments.pop(name) for name in ("residual", "y", "gate"))
    new_residual, out = gate_add_norm_modulate(residual, y, gate, **arguments)
    torch.testing.assert_close(new_residual, residual + gate[:, None] * y)
    torch.testing.assert_close(out, norm_modulate(new_residual, **arguments))


def test_fp32_stream_with_bf16_modulation():
    """The normal case of training: what each output and gradient comes back as."""
    x, y = torch.randn(B, N, D, requires_grad=True), torch.randn(B, N, D).bfloat16().requires_grad_()
    gate, scale, shift = (torch.randn(B, D).bfloat16().requires_grad_() for _ in range(3))
    weight = torch.ones(D, requires_grad=True)
    assert norm_modulate(x, scale, shift, weight).dtype == torch.bfloat16
    assert norm_modulate(x, scale, shift, weight, out_dtype=torch.float32).dtype == torch.float32
    residual, out = gate_add_norm_modulate(x, y, gate, scale, shift, weight)
    assert (residual.dtype, out.dtype) == (torch.float32, torch.bfloat16)
    inputs = (x, y, gate, scale, shift, weight)
    for tensor, grad in zip(inputs, torch.autograd.grad((residual.sum() + out.float().square().sum()), inputs)):
        assert grad.dtype == tensor.dtype and grad.isfinite().all()
    assert gate_add_norm_modulate(x, y, gate, scale, out_dtype=torch.float32)[1].dtype == torch.float32


def test_rope_turns_pairs_and_reads_even_columns():
    qkv = randn(B, N, 3, H, DH)
    cos, sin = tables()
    q, k, v = qk_norm_rope(qkv, cos, sin)
    turn = torch.complex(cos[:, ::2], sin[:, ::2])
    for out, index in ((q, 0), (k, 1)):
        pairs = torch.view_as_complex(qkv[:, :, index].transpose(1, 2).unflatten(-1, (-1, 2)).contiguous())
        torch.testing.assert_close(out, torch.view_as_real(pairs * turn).flatten(-2))
    assert v.data_ptr() == qkv[:, :, 2].data_ptr() and torch.equal(v, qkv[:, :, 2].transpose(1, 2))
    odd = torch.tensor([1.0, torch.nan], dtype=torch.float64).repeat(DH // 2)
    torch.testing.assert_close(qk_norm_rope(qkv, cos * odd, sin * odd)[0], q)


def test_qk_norm_is_torchs():
    arguments = qkv_arguments("layer")
    q, k, _ = qk_norm_rope(**{**arguments, "cos": None, "sin": None}, eps=1e-5)
    expected = F.layer_norm(arguments["qkv"][:, :, 0], (DH,), arguments["q_weight"], arguments["q_bias"], 1e-5)
    torch.testing.assert_close(q, expected.transpose(1, 2))
    expected = F.layer_norm(arguments["qkv"][:, :, 1], (DH,), arguments["k_weight"], arguments["k_bias"], 1e-5)
    torch.testing.assert_close(k, expected.transpose(1, 2))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_is_softmax_of_the_scores(scale):
    arguments = qkv_arguments("rms")
    q, k, v = qk_norm_rope(**arguments)
    scores = torch.softmax(q @ k.transpose(-1, -2) * (DH**-0.5 if scale is None else scale), dim=-1)
    expected = (scores @ v).transpose(1, 2).reshape(B, N, H * DH)
    torch.testing.assert_close(qk_norm_rope_attention(**arguments, scale=scale), expected)


@pytest.mark.parametrize("tokens, head_dim", [(1, 2), (7, 72), (256, 64)])
def test_attention_takes_any_length_and_even_head(tokens, head_dim):
    cos, sin = tables(tokens, head_dim)
    assert qk_norm_rope_attention(randn(1, tokens, 3, 1, head_dim), cos, sin).shape == (1, tokens, head_dim)


def test_qk_arguments_that_contradict_each_other():
    arguments = qkv_arguments(None)
    weight = torch.ones(DH, dtype=torch.float64)
    for changes, message in (
        (dict(q_weight=weight), "need norm"),
        (dict(norm="rms", q_bias=weight), "need norm='layer'"),
        (dict(norm="batch"), "norm must be"),
        (dict(cos=None), "together"),
        (dict(cos=arguments["cos"].clone().requires_grad_()), "cos requires grad"),
        (dict(qkv=randn(B, N, 2, H, DH)), "qkv must be"),
        (dict(qkv=randn(B, N, 3, H, 7)), "must be even"),
        (dict(qkv=randn(B, N, 3, H, 0)), "with Dh > 0"),
    ):
        for op in (qk_norm_rope, qk_norm_rope_attention):
            with pytest.raises(ValueError, match=message):
                op(**{**arguments, **changes})


def test_group_norm_needs_channels():
    with pytest.raises(ValueError, match=r"^group_norm_silu: x must be \(B, C, H, W\) with C > 0, got shape \(2, 0, 3, 2\)$"):
        group_norm_silu(randn(B, 0, 3, 2), 1, randn(0), randn(0))


@pytest.mark.parametrize("op, name", [(flow_loss, "x0"), (flow_loss, "x1"), (vf_loss, "features")])
def test_a_gradient_that_does_not_exist_is_refused(op, name):
    arguments = CASES[op.__name__][1]()
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{op.__name__}: {name} requires grad"):
        op(**arguments)
    with torch.no_grad():
        op(**arguments)
