"""attention(): one name, one formula, whatever computes it; what a backend does not take, or lacks, is one line."""

import inspect
import re
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from vavae_kernels import attention, attention_backends, backend_table, register_backend
from vavae_kernels.attention_backends import BACKENDS, Backend, check_backend

ON_CPU = ("sdpa", "math", "auto")
B, H, N, DH = 2, 3, 7, 8


def packed(dtype=torch.float64, tokens=N, head_dim=DH, **where) -> list[torch.Tensor]:
    """q, k, v (B, H, N, Dh), views of one (B, N, 3, H, Dh)."""
    return list(torch.randn(B, tokens, 3, H, head_dim, dtype=dtype, **where).permute(2, 0, 3, 1, 4).unbind(0))


def by_hand(q, k, v, scale=None):
    """The formula, in the dtype of its inputs."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(scale * torch.einsum("bhnd,bhmd->bhnm", q, k), -1) @ v


def with_gradients(function, qkv, cotangent):
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_outputs_and_gradients_keep_the_numerics_rule(backend, dtype, scale):
    """|ours - fp64| <= 2 (|eager of the same dtype - fp64| + one rounding band), for the output and each gradient."""
    qkv = packed(dtype)
    cotangent = torch.randn_like(qkv[0])
    exact = with_gradients(lambda *x: by_hand(*x, scale), [x.double() for x in qkv], cotangent)
    eager = with_gradients(lambda *x: by_hand(*x, scale), qkv, cotangent)
    ours = with_gradients(lambda *x: attention(*x, scale=scale, backend=backend), qkv, cotangent)
    for name, true, plain, got in zip(("out", "dq", "dk", "dv"), exact, eager, ours):
        assert got.dtype == dtype and got.shape == true.shape
        band = torch.finfo(dtype).eps * true.abs().max()
        assert (got - true).abs().max() <= 2 * ((plain - true).abs().max() + band), name


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(0, 3), heads=st.integers(1, 3), n=st.integers(0, 9), m=st.integers(1, 9), dh=st.integers(1, 9), name=st.sampled_from(ON_CPU))
def test_any_shape(batch, heads, n, m, dh, name):
    q = torch.randn(batch, heads, n, dh, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, batch, heads, m, dh, dtype=torch.float64).unbind(0)
    out = attention(q, k, v, backend=name)
    torch.testing.assert_close(out, by_hand(q, k, v))
    out.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_whole_and_does_not_recompile_on_a_third_length(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, 0.4, backend), fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for tokens in (7, 11, 13):
        qkv = packed(torch.float32, tokens)
        cotangent = torch.randn_like(qkv[0])
        for got, expected in zip(with_gradients(compiled, qkv, cotangent), with_gradients(lambda *x: by_hand(*x, 0.4), qkv, cotangent)):
            torch.testing.assert_close(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one static, one for any length


@pytest.mark.parametrize("backend", ON_CPU)
def test_inputs_are_left_as_they_are_and_autocast_changes_nothing(backend):
    qkv = packed(torch.float32)
    before = [x.clone() for x in qkv]
    out = attention(*qkv, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*qkv, backend=backend), out)
    assert all(torch.equal(a, b) for a, b in zip(qkv, before))


# sdpa on a GPU: which kernel comes first


@pytest.fixture
def orders(monkeypatch):
    """The order of PyTorch's kernels at each call of its attention, on a GPU of no kind: fake tensors."""
    seen = []

    def spy(q, k, v, scale=None):
        seen.append(torch._C._get_sdp_priority_order()[0])
        return torch.empty_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize(
    "capability, version, by_us",
    [((8, 0), 91900, True), ((12, 0), 91900, True), ((9, 0), 91900, False), ((10, 0), 91900, False), ((8, 0), 91500, False), ((8, 0), None, False)],
)
def test_cudnn_comes_first_where_pytorch_does_not_see_to_it(orders, monkeypatch, capability, version, by_us):
    """Never with a cuDNN that writes out of bounds (9.15.0 and before), and the order is what it was afterwards."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    before = torch._C._get_sdp_priority_order()
    with FakeTensorMode():
        attention(*packed(torch.bfloat16, device="cuda"))
    cudnn = int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)
    assert orders == [cudnn if by_us else before[0]] and before[0] != cudnn
    assert torch._C._get_sdp_priority_order() == before


def test_the_choice_is_a_constant_of_a_compiled_graph(monkeypatch):
    """Asking for the device and the version of cuDNN breaks no graph."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    in_order = []

    def sdpa(q, k, v):
        in_order.append(attention_backends._must_put_cudnn_first(q.device) and not attention_backends._is_hopper(q.device))
        with torch.nn.attention.sdpa_kernel(attention_backends.CUDNN_FIRST, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v)

    qkv = packed()
    torch.testing.assert_close(torch.compile(sdpa, fullgraph=True, backend="aot_eager")(*qkv), by_hand(*qkv))
    assert in_order == [True]


def test_kernels_that_the_caller_switched_off_stay_off(orders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    with FakeTensorMode(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        attention(*packed(torch.bfloat16, device="cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert orders[0] != int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)


# packages, through stand-ins with their documented signatures


def flash_attn_func_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False,
):  # fmt: skip
    assert (dropout_p, causal, window_size, softcap, alibi_slopes, return_attn_probs) == (0.0, False, (-1, -1), 0.0, None, False)
    return record_rows(q, k, v, softmax_scale)


def flash_attn_func_3(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    assert not causal and qv is None and window_size == (-1, -1) and softcap == 0.0 and not return_attn_probs
    return record_rows(q, k, v, softmax_scale)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    assert attn_bias is None and p == 0.0 and op is None and output_dtype is None
    return record_rows(query, key, value, scale)


SEEN: list[tuple] = []


def record_rows(q, k, v, scale):
    """As the packages compute: q, k, v (B, N, H, Dh) -> (B, N, H, Dh), the last dimension contiguous."""
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    SEEN.append((q, k, v, scale))
    return by_hand(*(x.transpose(1, 2) for x in (q, k, v)), scale).transpose(1, 2).contiguous()


STAND_INS = {  # backend -> module, name of its function, stand-in
    "flash-attn": ("flash_attn", "flash_attn_func", flash_attn_func_2),
    "xformers": ("xformers.ops", "memory_efficient_attention", memory_efficient_attention),
}
over_packages = pytest.mark.parametrize("backend", STAND_INS)


def install(monkeypatch, path: str, name: str, function) -> None:
    """Put a stand-in where `from <path> import <name>` finds it; packages around it too."""
    parts = path.split(".")
    for i in range(len(parts)):
        module = ModuleType(".".join(parts[: i + 1]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    setattr(sys.modules[path], name, function)


@pytest.fixture
def anywhere(monkeypatch):
    """The packages' rows for CPU tensors: their stand-ins run here."""
    SEEN.clear()
    for name in STAND_INS:
        row = {field: getattr(BACKENDS[name], field) for field in Backend.__dataclass_fields__}
        monkeypatch.setitem(BACKENDS, name, Backend(**{**row, "devices": None, "dtypes": None}))


@over_packages
@pytest.mark.parametrize("scale", [None, 0.3])
def test_packages_get_token_rows_without_copies_and_the_scale(backend, scale, anywhere, monkeypatch):
    install(monkeypatch, *STAND_INS[backend])
    check_backend("here", backend)
    q, k, v = packed()
    cotangent = torch.randn_like(q)
    out, *grads = with_gradients(lambda *x: attention(*x, scale=scale, backend=backend), (q, k, v), cotangent)
    expected, *expected_grads = with_gradients(lambda *x: by_hand(*x, scale), (q, k, v), cotangent)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)
    attention(q, k, v, scale=scale, backend=backend)
    *rows, seen_scale = SEEN[-1]
    assert seen_scale == scale
    for x, row in zip((q, k, v), rows):
        assert row.data_ptr() == x.data_ptr() and row.shape == (B, N, H, DH) and row.stride() == x.transpose(1, 2).stride()


@over_packages
def test_a_strided_head_dimension_is_made_contiguous_for_packages(backend, anywhere, monkeypatch):
    install(monkeypatch, *STAND_INS[backend])
    q, k, v = (torch.stack((x, x + 1), -1)[..., 0] for x in packed())
    torch.testing.assert_close(attention(q, k, v, backend=backend), by_hand(q, k, v))


@over_packages
def test_packages_compile_whole(backend, anywhere, monkeypatch):
    install(monkeypatch, *STAND_INS[backend])
    torch._dynamo.reset()
    qkv = packed()
    torch.testing.assert_close(torch.compile(lambda *x: attention(*x, backend=backend), fullgraph=True, backend="eager")(*qkv), by_hand(*qkv))


@pytest.mark.parametrize("capability, installed, version", [((9, 0), True, 3), ((9, 0), False, 2), ((8, 0), True, 2), ((10, 0), True, 2)])
@pytest.mark.parametrize("pair", [False, True])
def test_version_3_of_flash_attention_serves_hopper(capability, installed, version, pair, monkeypatch):
    """Early versions of 3 return (out, log-sum-exp)."""
    called = []

    def three(*args, **kwargs):
        called.append(3)
        out = torch.empty_like(args[0])
        inspect.signature(flash_attn_func_3).bind(*args, **kwargs)
        return (out, None) if pair else out

    def two(*args, **kwargs):
        called.append(2)
        inspect.signature(flash_attn_func_2).bind(*args, **kwargs)
        return torch.empty_like(args[0])

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    install(monkeypatch, "flash_attn", "flash_attn_func", two)
    if installed:
        install(monkeypatch, "flash_attn_interface", "flash_attn_func", three)
    with FakeTensorMode():
        q = packed(torch.bfloat16, device="cuda")
        assert attention(*q, backend="flash-attn").shape == q[0].shape
    assert called == [version]


# one clear line


@over_packages
def test_a_missing_package_is_one_line_with_the_command(backend, monkeypatch, anywhere):
    module = STAND_INS[backend][0].partition(".")[0]
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, module, raising=False)
    line = f"backend '{backend}': {module} is not installed; pip install {backend}"
    with pytest.raises(ValueError, match=f"^attention: {re.escape(line)}") as caught:
        attention(*packed(), backend=backend)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"^patch: {re.escape(line)}"):
        check_backend("patch", backend)


@over_packages
def test_a_package_that_does_not_import_is_not_called_missing(backend, monkeypatch, anywhere):
    path, name, _ = STAND_INS[backend]
    install(monkeypatch, path, "another_name", None)
    with pytest.raises(ValueError, match=f"does not import beside torch .*{name}.*; pip install") as caught:
        attention(*packed(), backend=backend)
    assert "\n" not in str(caught.value)


FAKE_CUDA = dict(device="cuda")


@pytest.mark.parametrize(
    "backend, changes, message",
    [
        ("flash-attn", dict(), "backend 'flash-attn' runs on cuda, q is on cpu; change that or take backend 'sdpa'"),
        ("flash-attn", dict(dtype=torch.float32, **FAKE_CUDA), "takes float16, bfloat16, q is float32;"),
        ("flash-attn", dict(dtype=torch.float16, head_dim=9, **FAKE_CUDA), "takes head dimensions multiples of 8 to 256, q has 9;"),
        ("xformers", dict(dtype=torch.float64, **FAKE_CUDA), "takes float16, bfloat16, float32, q is float64;"),
        ("xformers", dict(dtype=torch.float16, head_dim=264, **FAKE_CUDA), "takes head dimensions multiples of 8 to 256, q has 264;"),
        ("fused", dict(), "backend 'fused' is one kernel from packed qkv; call qk_norm_rope_attention"),
        ("flash", dict(), "unknown backend 'flash'; known: auto, sdpa, fused, flash-attn, xformers, math"),
        (None, dict(), "unknown backend None"),
        (["math"], dict(), "unknown backend ['math']"),
        ("math", dict(dtype=torch.float8_e4m3fn), "q must be floating point, got torch.float8_e4m3fn; float64, float32, bfloat16 and float16"),
    ],
)
def test_what_a_backend_does_not_take_is_one_line(backend, changes, message):
    mode = FakeTensorMode() if "device" in changes else torch.no_grad()
    dtype = changes.pop("dtype", torch.float32)
    with mode:
        qkv = [x.to(dtype) for x in packed(torch.float32, **changes)]
        with pytest.raises(ValueError, match=f"^attention: .*{re.escape(message)}") as caught:
            attention(*qkv, backend=backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(q=torch.ones(2, 3, 4)), "q must be (B, H, N, Dh) with Dh > 0, got shape (2, 3, 4)"),
        (dict(k=torch.ones(B, H, 0, DH)), "k must be (B, H, M, Dh) with M > 0, got shape (2, 3, 0, 8)"),
        (dict(k=torch.ones(B, 1, N, DH)), "k has shape (2, 1, 7, 8), expected (2, 3, 7, 8)"),
        (dict(v=torch.ones(B, H, N + 1, DH)), "v has shape (2, 3, 8, 8), expected (2, 3, 7, 8)"),
        (dict(v=torch.ones(B, H, N, DH).half()), "v is float16, q is float32; cast them to one dtype"),
        (dict(q=torch.ones(B, H, N, DH).long()), "q must be floating point, got torch.int64"),
        (dict(q=[1.0]), "q must be a tensor, got list"),
        (dict(scale="1"), "scale must be a finite number, got '1'"),
        (dict(scale=float("nan")), "scale must be a finite number, got nan"),
        (dict(k=torch.ones(B, H, N, DH, device="meta")), "k is on meta, the tensors before it on cpu"),
    ],
)
def test_bad_arguments_are_one_line(changes, message):
    q, k, v = packed(torch.float32)
    with pytest.raises(ValueError, match=f"^attention: {re.escape(message)}"):
        attention(**{**dict(q=q, k=k, v=v), **changes})


# backends of one's own, and the table


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(attention_backends, "BACKENDS", dict(BACKENDS))
    return attention_backends.BACKENDS


def test_a_backend_of_ones_own(registry):
    register_backend("mine", by_hand, devices=("cpu",), head_dims=(DH,), note="by hand")
    qkv = packed()
    torch.testing.assert_close(attention(*qkv, scale=0.2, backend="mine"), by_hand(*qkv, 0.2))
    with pytest.raises(ValueError, match="backend 'mine' takes head dimensions 8, q has 16; change that"):
        attention(*packed(head_dim=16), backend="mine")
    assert backend_table()[-1] == "| `mine` | cpu | any | 8 | nothing more | by hand |"
    with pytest.raises(ValueError, match="there is a backend 'mine' already"):
        register_backend("mine", by_hand)
    check_backend("here", "mine")


@pytest.mark.parametrize("wrong", [lambda q, k, v, scale: q[:1], lambda q, k, v, scale: q.float(), lambda q, k, v, scale: q.transpose(1, 2)])
def test_a_backend_that_returns_something_else_is_found_out(wrong, registry):
    register_backend("wrong", wrong)
    with pytest.raises(ValueError, match="backend 'wrong' returned torch.float"):
        attention(*packed(), backend="wrong")


@pytest.mark.parametrize("name", ["auto", "sdpa", "fused"])
def test_names_that_are_taken(name, registry):
    with pytest.raises(ValueError, match=f"register_backend: there is a backend '{name}' already"):
        register_backend(name, by_hand)


def test_a_backend_needs_a_name_and_a_function(registry):
    with pytest.raises(ValueError, match="name must be a text"):
        register_backend("", by_hand)
    with pytest.raises(TypeError, match="run must be a function of q, k, v and scale, got str"):
        register_backend("mine", "by hand")
    with pytest.raises(TypeError, match="devices must be None or several, as in a tuple, got 'cpu'"):
        register_backend("mine", by_hand, devices="cpu")
    with pytest.raises(TypeError, match="head_dims must be None or several, as in a tuple, got 64"):
        register_backend("mine", by_hand, head_dims=64)
    assert "mine" not in registry


def test_the_table_has_a_row_a_backend():
    head, rule, *rows = backend_table()
    columns = head.count("|")
    assert rule.count("|") == columns and all(row.count("|") == columns and row.startswith("| `") for row in rows)
    assert [row.split("`")[1] for row in rows] == list(BACKENDS)
    for row in BACKENDS.values():
        assert (row.package is None) == (row.install is None)


def test_the_function_is_exported_and_not_its_module():
    """A module of the same name would take the function's place once it is imported."""
    import vavae_kernels

    assert callable(vavae_kernels.attention) and inspect.ismodule(vavae_kernels.attention_backends)
