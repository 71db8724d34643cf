"""qk_norm_rope_attention with backend "fused": when its one kernel runs, what it takes, and its arithmetic at the edges."""

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from vavae_kernels import _launch, qk_norm_rope_attention  # noqa: E402
from vavae_kernels.attention_backends import BACKENDS  # noqa: E402
from vavae_kernels.ops import _qk_attention  # noqa: E402
from vavae_kernels.ops.qk_norm_rope_attention import qk_norm_rope_attention_reference  # noqa: E402
from vavae_kernels.testing.spec import DTYPES, specs  # noqa: E402
from vavae_kernels.testing.specs.qk_norm_rope import packed_inputs  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNEL = "qk_norm_rope_attention_fwd"


def draw(variant="layer rope", dtypes="fp32", **sizes) -> dict:
    return packed_inputs(dict(B=2, N=3, H=2, D=24) | sizes, DTYPES[dtypes], variant, DEVICE)


def fused(inputs: dict, **more) -> torch.Tensor:
    return qk_norm_rope_attention(**inputs, impl="triton", backend="fused", **more)


def kernels_of(call) -> list[str]:
    seen = []
    with _launch.watched(lambda launch: seen.append(launch.name)):
        call()
    return seen


def assert_right(inputs: dict, **more) -> None:
    """Within the rule: twice the error of the same formula in the same dtype, and one rounding band."""
    with torch.no_grad():
        wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        exact = qk_norm_rope_attention_reference(**wide, **more)
        eager = qk_norm_rope_attention_reference(**inputs, **more)
        ours = fused(inputs, **more)
    band = torch.finfo(ours.dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * ((eager - exact).abs().max() + band)


def test_one_kernel_where_no_gradient_is_needed_and_two_steps_elsewhere():
    inputs = draw()
    with torch.no_grad():
        assert kernels_of(lambda: fused(inputs)) == [KERNEL]
    frozen = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    assert kernels_of(lambda: fused(frozen)) == [KERNEL]
    assert kernels_of(lambda: fused(frozen | dict(k_bias=inputs["k_bias"]))) == ["qk_norm_rope_fwd"]
    assert kernels_of(lambda: fused(inputs)) == ["qk_norm_rope_fwd"]


def test_with_gradients_it_is_auto_bit_for_bit():
    inputs = draw()
    leaves = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    results = []
    for backend in ("fused", "auto"):
        out = qk_norm_rope_attention(**inputs, impl="triton", backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert len(leaves) == 5
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_auto_takes_two_steps_until_the_kernel_is_measured():
    with torch.no_grad():
        assert kernels_of(lambda: qk_norm_rope_attention(**draw(), impl="triton")) == ["qk_norm_rope_fwd"]


@pytest.mark.parametrize("head_dim", BACKENDS["fused"].head_dims)
def test_every_head_dimension_of_the_table(head_dim):
    assert_right(draw("rms rope", N=5, D=head_dim))


@pytest.mark.parametrize("variant", ["layer rope", "layer no affine", "rms", "plain"])
def test_every_kind_of_prologue(variant):
    """Those that the specs leave out."""
    for dtypes in ("mixed", "fp16"):
        assert_right(draw(variant, dtypes, N=20, D=72))


@pytest.mark.parametrize("tokens", [256, 129])
@pytest.mark.parametrize("config", specs()["qk_norm_rope_attention_fused"].configs[KERNEL], ids=str)
def test_every_configuration_worth_trying(tokens, config):
    """Tiles that fill the tokens, and tiles that do not."""
    with _launch.forced({KERNEL: config}):
        assert_right(draw("rope", "fp16", B=1, N=tokens, H=1, D=72))


@pytest.mark.parametrize("scale", [0.3, 0.0, -2.0])
def test_any_scale(scale):
    assert_right(draw(), scale=scale)


def test_large_scores_do_not_overflow():
    """The largest score leaves first: exponentials of thousands would not fit."""
    inputs = draw("rope", N=40)
    inputs["qkv"] = inputs["qkv"].detach() * 100
    assert_right(inputs)


def test_nan_stays_in_its_head():
    inputs = draw("rope")
    qkv = inputs["qkv"].detach().clone()
    qkv[1, 2, 1, 0, 5] = float("nan")  # a key of head 0 of the second sample
    out = fused(inputs | dict(qkv=qkv)).unflatten(2, (2, 24))
    assert out[1, :, 0].isnan().all() and out[0].isfinite().all() and out[1, :, 1].isfinite().all()


def test_tokens_past_two_to_the_31():
    """Tokens 2^29 elements apart. Memory between them is never touched, so it costs none."""
    inputs = draw("rope", "fp16", B=1, N=6, H=1, D=8)
    qkv = inputs["qkv"].detach()
    apart = torch.empty_strided(qkv.shape, (8, 2**29 + 8, 8, 8, 1), dtype=qkv.dtype, device=DEVICE).copy_(qkv)
    assert torch.equal(fused(inputs | dict(qkv=apart)), fused(inputs | dict(qkv=qkv)))


@pytest.mark.parametrize("target", [80, 90, 100, 120])
def test_the_choice_follows_the_architecture(target):
    """What is compiled offline for a GPU is what the launcher would start there."""
    inputs = draw("rope", "mixed", D=72)
    seen = []
    with _launch.watched(seen.append, run=False), _launch.compiling_for(target), torch.no_grad():
        _qk_attention.fused_attention(inputs["qkv"].cpu(), None, None, None, None, None, None, None, 1e-6, 1.0)
    assert seen[0].warps == (4 if target in (90, 100) else 8)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        (dict(D=12), dict(impl="triton"), "backend 'fused' takes head dimensions multiples of 8 to 128, q has 12; change that or"),
        (dict(D=136), dict(impl="triton"), "backend 'fused' takes head dimensions multiples of 8 to 128, q has 136"),
        (dict(), dict(impl="auto"), "backend 'fused' runs on cuda, q is on cpu; change that or take backend 'auto'"),
        (dict(), dict(impl="torch"), "backend 'fused' runs on cuda, q is on cpu"),
    ],
)
@pytest.mark.parametrize("no_grad", [True, False])
def test_what_it_does_not_take_is_one_line_with_and_without_gradient(changes, options, message, no_grad):
    inputs = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in draw(**changes).items()}
    with torch.set_grad_enabled(not no_grad), pytest.raises(ValueError, match=f"^qk_norm_rope_attention: {re.escape(message)}") as caught:
        qk_norm_rope_attention(**inputs, **options, backend="fused")
    assert "\n" not in str(caught.value)


def test_impl_torch_on_a_gpu_is_refused():
    with torch._subclasses.fake_tensor.FakeTensorMode(), pytest.raises(ValueError, match="backend 'fused' is a Triton kernel, which impl='torch'"):
        qk_norm_rope_attention(torch.empty(2, 3, 3, 2, 24, device="cuda"), None, None, impl="torch", backend="fused")
