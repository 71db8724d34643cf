"""The contract of every operator, over all specs: what holds for one holds for all. Kernels run in Triton's interpreter on a CPU."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from vavae_kernels.testing import numerics  # noqa: E402
from vavae_kernels.testing.spec import DTYPES, Spec, specs  # noqa: E402
from vavae_kernels.testing.traffic import forward_and_backward  # noqa: E402

SPECS = specs()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
each_variant = pytest.mark.parametrize(
    ("spec", "variant"), [(s, v) for s in SPECS.values() for v in s.variants], ids=[f"{s.name}-{v}" for s in SPECS.values() for v in s.variants]
)


@pytest.fixture(autouse=True)
def _one_thread():
    """The interpreter works in NumPy; PyTorch's threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def plain(spec: Spec) -> dict[str, int]:
    """The first small shape: an ordinary one."""
    return dict(next(iter(spec.small.values())))


def draw(spec: Spec, dtypes: str | None = None, variant: str | None = None, **changes: int) -> dict:
    variant = spec.variants[0] if variant is None else variant
    return spec.inputs({**plain(spec), **changes}, DTYPES[dtypes or spec.dtypes[0]], variant, DEVICE)


def result(spec: Spec, inputs: dict, cotangents: tuple[Tensor, ...] | None = None) -> dict[str, Tensor]:
    cotangents = numerics.draw_cotangents(spec, inputs) if cotangents is None else cotangents
    return numerics.run(lambda **k: spec.function(**k, impl="triton"), inputs, cotangents, spec.gradients)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def tensors(inputs: dict) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize(
    ("spec", "shape", "variant", "dtypes"),
    [
        pytest.param(s, shape, variant, dtypes, id=f"{s.name}-{shape}-{variant}-{dtypes}")
        for s in SPECS.values()
        for shape in s.small
        for variant in s.variants
        for dtypes in s.dtypes
    ],
)
def test_error_against_fp64_is_eagers_or_less(spec, shape, variant, dtypes):
    """|ours - fp64| <= 2 (|eager - fp64| + one band), for every output and gradient."""
    wrong = numerics.faults(spec, lambda: spec.inputs(spec.small[shape], DTYPES[dtypes], variant, DEVICE))
    assert not wrong, "\n".join(wrong)


def test_the_rule_can_fail():
    """An error of three bands is out, and so is NaN, in one draw of several too."""
    assert numerics.Error("y", 1.0, 0.2, 0.3).within
    assert not numerics.Error("y", 1.1, 0.2, 0.3).within
    assert not numerics.Error("y", float("nan"), 0.2, 0.3).within
    spec = dataclasses.replace(SPECS["swiglu"], function=lambda impl, **inputs: SPECS["swiglu"].reference(**inputs) * (1 + 1e-5))
    assert numerics.faults(spec, lambda: draw(spec, "fp32"))
    calls = iter(range(100))

    def rarely_broken(impl, **inputs):
        return SPECS["swiglu"].reference(**inputs) * (float("nan") if next(calls) in (0, 5) else 1.0)

    assert numerics.faults(dataclasses.replace(spec, function=rarely_broken), lambda: draw(spec, "fp32"))


@each_spec
def test_small_shapes_cover_the_corners(spec):
    """Each spec has an empty shape, one sample and several."""
    batches = {shape.get("B") for shape in spec.small.values()}
    assert any(0 in shape.values() for shape in spec.small.values()), "no shape without rows"
    assert 1 in batches and max(batches) > 1


class Calls(TorchDispatchMode):
    """Remembers every call of an operator of ours."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vavae_kernels":
            self.seen.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@each_variant
def test_opcheck(spec, variant):
    """Schema, fake implementation and aliasing of every operator that a forward and backward call."""
    inputs = draw(spec, variant=variant)
    with Calls() as calls:
        result(spec, inputs)
    assert calls.seen, "no operator was called"
    for func, args, kwargs in calls.seen:
        detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
        torch.library.opcheck(func, detached, kwargs)


@each_variant
def test_compiled_without_graph_breaks_and_recompiles(spec, variant):
    """fullgraph=True equals eager, bit for bit; the second batch size makes the graph dynamic, the third recompiles nothing."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def function(**inputs):
        return spec.function(**inputs, impl="triton")

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    frames = []
    for batch in (2, 3, 4):
        inputs = draw(spec, variant=variant, B=batch)
        cotangents = numerics.draw_cotangents(spec, inputs)
        found = numerics.run(compiled, numerics.copied(inputs), cotangents, spec.gradients)
        same(found, result(spec, numerics.copied(inputs), cotangents))
        frames.append(counter.frame_count)
    assert frames[2] == frames[1], f"recompiled at the third shape: {frames}"


@each_variant
def test_inputs_unchanged_and_backward_twice(spec, variant):
    """No input is written to; a second backward through the same graph gives the same gradients."""
    inputs = draw(spec, variant=variant)
    before = numerics.copied(inputs)
    results = numerics.outputs(spec.function(**inputs, impl="triton"))
    wanted = [inputs[name] for name in spec.gradients if isinstance(inputs.get(name), Tensor)]
    cotangents = [torch.randn_like(r) for r in results]
    kept = [c.clone() for c in cotangents]
    grads = lambda: torch.autograd.grad(results, wanted, cotangents, retain_graph=True) if wanted else ()
    once, again = ([g.clone() for g in grads()] for _ in range(2))
    for a, b in (*zip(once, again), *zip(cotangents, kept)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for name, tensor in tensors(inputs).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, msg=f"{name} was written to")


@each_variant
def test_bitwise_repeatable(spec, variant):
    inputs = draw(spec, variant=variant)
    cotangents = numerics.draw_cotangents(spec, inputs)
    same(result(spec, inputs, cotangents), result(spec, inputs, cotangents))


def embedded(tensor: Tensor) -> Tensor:
    """The same values inside a larger tensor of NaN: rows apart, something on every side."""
    around = torch.full([n + 2 for n in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
    inside = around[tuple(slice(1, -1) for _ in tensor.shape)]
    inside.copy_(tensor.detach())
    return inside.requires_grad_(tensor.requires_grad)


def transposed(tensor: Tensor) -> Tensor:
    """The same values with the last two axes swapped in memory: the inner one is not dense."""
    twin = tensor.detach()
    if tensor.ndim == 1:
        twin = twin.repeat_interleave(2)[::2]
    elif tensor.ndim > 1:
        twin = twin.transpose(-1, -2).contiguous().transpose(-1, -2)
    return twin.requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("layout", [embedded, transposed])
@each_variant
def test_any_strides(spec, variant, layout):
    """Views of larger tensors and transposed ones give the dense result; memory around them is never read."""
    inputs = draw(spec, variant=variant)
    cotangents = numerics.draw_cotangents(spec, inputs)
    expected = result(spec, numerics.copied(inputs), cotangents)
    strided = {name: layout(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    found = result(spec, strided, tuple(layout(c) for c in cotangents))
    assert found.keys() == expected.keys()
    for name in expected:  # the order of a sum may follow the layout, so bits may differ within the band
        band = torch.finfo(expected[name].dtype).eps * expected[name].abs().max() if expected[name].numel() else 0
        assert (found[name] - expected[name]).abs().le(2 * band).all(), f"{name} differs"


@each_spec
def test_offsets_past_two_to_the_31(spec):
    """Samples 2^30 elements apart: an offset held in 32 bits would wrap. Memory between them is never touched, so it costs none."""
    inputs = draw(spec, dtypes="bf16" if "bf16" in spec.dtypes else None, B=3)
    cotangents = numerics.draw_cotangents(spec, inputs)
    expected = result(spec, numerics.copied(inputs), cotangents)

    def far_apart(tensor):
        if tensor.ndim < 3 or tensor.stride(0) < max(tensor.stride()) or tensor.shape[0] != 3:
            return tensor
        twin = torch.empty_strided(tensor.shape, (2**30 + 8, *tensor.stride()[1:]), dtype=tensor.dtype, device=tensor.device)
        return twin.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

    apart = {name: far_apart(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    assert any(t.stride(0) > 2**30 for t in tensors(apart).values()), "no tensor of this operator was spread out"
    same(result(spec, apart, cotangents), expected)


@each_variant
def test_every_element_is_written(spec, variant):
    """With fresh memory full of NaN, the result is what it was; padding and partial sums included."""
    inputs = draw(spec, variant=variant)
    cotangents = numerics.draw_cotangents(spec, inputs)
    expected = result(spec, inputs, cotangents)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        assert torch.empty(3).isnan().all()
        found = result(spec, inputs, cotangents)
    finally:
        torch.use_deterministic_algorithms(False)
    same(found, expected)


@each_spec
def test_auto_on_a_cpu_is_the_reference(spec):
    inputs = {n: v.detach().cpu() if isinstance(v, Tensor) else v for n, v in draw(spec).items()}
    for a, b in zip(numerics.outputs(spec.function(**inputs)), numerics.outputs(spec.reference(**inputs))):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@each_spec
def test_no_grad_gives_the_same_outputs(spec):
    """A path taken only without gradients stays within the rule; its error is measured like the other's."""
    wrong = numerics.faults(spec, lambda: {n: v.detach() if isinstance(v, Tensor) else v for n, v in draw(spec).items()})
    assert not wrong, "\n".join(wrong)


@each_spec
def test_fp64_is_refused_by_the_kernel_and_exact_by_default(spec):
    wide = numerics.copied(draw(spec), torch.float64)
    with pytest.raises(ValueError, match=r"^\w+: the Triton kernel takes float32, bfloat16 and float16, got torch.float64") as caught:
        spec.function(**wide, impl="triton")
    assert spec.name.startswith(str(caught.value).partition(":")[0])
    for out in numerics.outputs(spec.function(**wide)):
        assert out.dtype == torch.float64


@each_spec
def test_bytes_touched_are_those_of_the_model(spec):
    """Launches and PyTorch operations of a real-size call touch what the spec says: at least that, at most a tenth more.

    Beyond that 32 MB: partial sums that a second kernel reads at once from the 50 MB of L2, which weigh at small batches only.
    """
    for shape in spec.real:
        dtypes, variant = spec.dtypes[0], spec.variants[0]
        model = spec.bytes(spec.real[shape], DTYPES[dtypes], variant)
        for name, traffic, least in zip(("forward", "backward"), forward_and_backward(spec, shape, dtypes, variant), model):
            message = f"{name} at {shape}: {traffic.bytes:,} bytes touched, the model says {least:,}"
            assert 0.999 * least <= traffic.bytes <= 1.1 * least + 32e6, message


def compiled_offline(name: str, cases: str, targets: tuple[int, ...]) -> list[dict]:
    """Rows of the offline compiler, in a process of its own: kernels are interpreted in this one."""
    import os
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-W", "ignore", "-m", "vavae_kernels.testing.offline", "--ops", name, "--cases", cases, "--json", file.name]
        command += ["--targets", *map(str, targets)]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.load(open(file.name))


@pytest.mark.parametrize("targets", [(90,), pytest.param((80, 100, 120), marks=pytest.mark.exhaustive)], ids=["H100", "A100, B200, RTX 50"])
@each_spec
def test_compiles_for_every_gpu_without_spills(spec, targets):
    """The published model's kernels: registers within the spec, no stack, no spills. Always for the GPU they are made for and for the one
    with the least shared memory."""
    rows = compiled_offline(spec.name, "first", targets)
    assert {row["target"] for row in rows} == set(targets)
    for row in rows:
        assert row["registers"] <= spec.registers and row["stack"] == row["spills"] == 0, row


@pytest.mark.exhaustive
@each_spec
def test_compiles_every_dtype_and_variant(spec):
    compiled_offline(spec.name, "all", (80, 90, 100, 120))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_variant
def test_captured_in_a_cuda_graph(spec, variant):
    """Capture and replay equal the eager call: nothing in a launcher waits for the host."""
    inputs = draw(spec, variant=variant)
    cotangents = numerics.draw_cotangents(spec, inputs)
    expected = result(spec, inputs, cotangents)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = result(spec, inputs, cotangents)
    for tensor in captured.values():
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    same(captured, expected)
