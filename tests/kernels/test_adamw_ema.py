"""AdamWEMA: AdamW's mathematics beside torch.optim.AdamW, the EMA by hand, and steps that must change nothing.

Every law holds for every implementation: the reference, torch's fused AdamW that stands in where the kernel cannot be compiled,
and the kernel (its host build where there is no GPU).
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vavae_kernels import AdamWEMA, _compat
from vavae_kernels._extension import BuildError
from vavae_kernels.ops import adamw_ema
from vavae_kernels.testing.numerics import Error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = ((7, 3), (5,), (), (2, 3, 4))
HYPER = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


@pytest.fixture(params=["reference", "fallback", "kernel"])
def impl(request, monkeypatch) -> str:
    """What to give as `impl`; the three implementations, each on this machine's device."""
    monkeypatch.setattr(adamw_ema, "_FUSED_DEVICES", ("cpu", "cuda") if request.param == "fallback" else ())
    if request.param != "kernel":
        return "torch"
    monkeypatch.setattr(_compat, "INTERPRETED", True)
    try:
        AdamWEMA([torch.zeros(1, device=DEVICE)], impl="triton")
    except BuildError as error:
        pytest.skip(str(error))
    return "triton"


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)) for shape in SHAPES]


def set_gradients(params, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(DEVICE, p.dtype)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, device=DEVICE)


def everything(optimizer: AdamWEMA) -> list[torch.Tensor]:
    """Clones of all that a step can change: parameters, moments, steps, EMA."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [t.detach().clone() for p in params for t in (p, *(optimizer.state[p][key] for key in sorted(optimizer.state[p])))]


@pytest.mark.parametrize("changes", [{}, dict(weight_decay=0.0), dict(betas=(0.0, 0.999)), dict(lr=0.0)])
def test_is_torchs_adamw_with_an_ema_by_hand(changes):
    hyper = {**HYPER, **changes}
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    emas = [p.detach().clone() for p in theirs]
    optimizer, adamw = AdamWEMA(ours, **hyper, ema_decay=0.9), torch.optim.AdamW(theirs, **hyper)
    for step in range(12):
        for params, opt in ((ours, optimizer), (theirs, adamw)):
            set_gradients(params, step)
            opt.step()
        for ema, p in zip(emas, theirs):
            ema.mul_(0.9).add_(p.detach(), alpha=0.1)
    state = optimizer.ema_state_dict()
    for i, (mine, other) in enumerate(zip(ours, theirs)):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)  # the step count is fp32: bias corrections have 7 digits
        torch.testing.assert_close(optimizer.state[mine]["exp_avg_sq"], adamw.state[other]["exp_avg_sq"], rtol=1e-13, atol=0)
        torch.testing.assert_close(state[str(i)], emas[i], rtol=1e-6, atol=1e-9)
        assert optimizer.state[mine]["step"] == 12


def test_is_as_accurate_as_torchs(impl):
    """Error of weights and average against AdamW in fp64 after 50 steps, beside that of torch.optim.AdamW and a foreach EMA."""
    runs = {}
    for name, dtype in (("exact", torch.float64), ("ours", torch.float32), ("torch", torch.float32)):
        params = [nn.Parameter(p.detach().to(dtype)) for p in parameters()]
        emas = [p.detach().clone() for p in params]
        optimizer = AdamWEMA(params, **HYPER, ema_decay=0.9, impl=impl) if name == "ours" else torch.optim.AdamW(params, **HYPER)
        for step in range(50):
            set_gradients(params, step)
            for p in params:
                p.grad = p.grad.float().to(dtype)
            optimizer.step()
            torch._foreach_lerp_(emas, [p.detach() for p in params], 0.1)
        emas = list(optimizer.ema_state_dict().values()) if name == "ours" else emas
        runs[name] = [torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (params, emas)]
    for what, exact, ours, theirs in zip(("weights", "average"), *(runs[name] for name in ("exact", "ours", "torch"))):
        band = torch.finfo(torch.float32).eps * exact.abs().max().item()
        error = Error(what, (ours - exact).abs().max().item(), (theirs - exact).abs().max().item(), band)
        assert error.within, str(error)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("as_attribute", [False, True])
def test_found_inf_changes_nothing_at_all(poison, as_attribute, impl):
    params = parameters()
    params[1].data[0] = -0.0  # a bit that 0 * x + y would lose
    optimizer = AdamWEMA(params, **HYPER, ema_decay=0.5, impl=impl)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    before = everything(optimizer)
    for p in params:
        p.grad = torch.full_like(p, poison)
    if as_attribute:
        optimizer.found_inf = scalar(1.0)
        optimizer.step()
        del optimizer.found_inf
    else:
        optimizer.step(found_inf=scalar(1.0))
    for old, new in zip(before, everything(optimizer)):
        assert torch.equal(old, new) and torch.equal(old.signbit(), new.signbit())
    set_gradients(params, 3)
    optimizer.step(found_inf=scalar(0.0))
    expected = AdamWEMA(parameters(), **HYPER, ema_decay=0.5, impl=impl)
    expected.param_groups[0]["params"][1].data[0] = -0.0
    for step in range(4):
        set_gradients(expected.param_groups[0]["params"], step)
        expected.step()
    for old, new in zip(everything(expected), everything(optimizer)):
        assert torch.equal(old, new)


def test_the_ends_of_the_averages_are_exact(impl):
    """Decay 0 is the newest value itself, decay 1 the oldest, bit for bit, however far apart they lie."""
    for decay, betas in ((0.0, (0.0, 0.999)), (1.0, (0.0, 0.999))):
        params = parameters()
        optimizer = AdamWEMA(params, lr=1e-3, betas=betas, ema_decay=decay, impl=impl)
        far = {name: 1e6 + t for name, t in optimizer.ema_state_dict().items()}
        optimizer.load_ema_state_dict(far)
        set_gradients(params, 0)
        optimizer.step()
        for i, p in enumerate(params):
            assert torch.equal(optimizer.ema_state_dict()[str(i)], p if decay == 0 else far[str(i)])
            assert torch.equal(optimizer.state[p]["exp_avg"], p.grad)


def test_found_inf_on_the_very_first_step(impl):
    params = parameters()
    start = [p.detach().clone() for p in params]
    optimizer = AdamWEMA(params, **HYPER, impl=impl)
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step(found_inf=torch.ones(1, device=DEVICE))
    for i, (p, old) in enumerate(zip(params, start)):
        assert torch.equal(p, old) and torch.equal(optimizer.ema_state_dict()[str(i)], old)
        assert optimizer.state[p]["step"] == 0 and optimizer.state[p]["exp_avg"].abs().sum() == 0


def test_grad_scale_divides(impl):
    scaled, plain = parameters(), parameters()
    a, b = AdamWEMA(scaled, **HYPER, impl=impl), AdamWEMA(plain, **HYPER, impl=impl)
    for step in range(3):
        set_gradients(scaled, step, scale=1024.0)
        kept = [p.grad.clone() for p in scaled]
        a.step(grad_scale=scalar(1024.0))
        assert all(torch.equal(p.grad, grad) for p, grad in zip(scaled, kept))  # gradients are read, not written
        set_gradients(plain, step)
        b.step()
    for x, y in zip(everything(a), everything(b)):
        assert torch.equal(x, y)


def test_grad_scaler_drives_it(impl):
    """torch.amp.GradScaler hands over found_inf and the scale on the device, and takes both back."""
    params, plain = parameters(), parameters()
    optimizer, expected = AdamWEMA(params, **HYPER, impl=impl), AdamWEMA(plain, **HYPER, impl=impl)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0)
    for step in range(3):
        set_gradients(params, step)
        for p in params:
            p.grad = p.grad * 256.0
            if step == 1:
                p.grad.fill_(torch.inf)
        scaler.scale(scalar(1.0))
        scaler.step(optimizer)
        scaler.update(256.0)
        if step != 1:
            set_gradients(plain, step)
            expected.step()
    for x, y in zip(everything(optimizer), everything(expected)):
        assert torch.equal(x, y)
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")


def test_names_are_the_keys_of_the_ema():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = AdamWEMA(model.named_parameters(), **HYPER)
    assert optimizer.ema_state_dict().keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert torch.equal(optimizer.ema_state_dict()[name], p)  # before the first step: the weights themselves
        assert optimizer.ema_state_dict()[name].data_ptr() != p.data_ptr()
    groups = [{"params": list(model[0].named_parameters(prefix="a"))}, {"params": list(model[1].named_parameters(prefix="b"))}]
    assert list(AdamWEMA(groups).ema_state_dict()) == ["a.weight", "a.bias", "b.weight", "b.bias"]


def test_the_ema_starts_at_the_weights_of_the_first_step(impl):
    """Weights loaded after construction are what the EMA starts from."""
    params = parameters()
    optimizer = AdamWEMA(params, **HYPER, ema_decay=1.0, impl=impl)
    with torch.no_grad():
        for p in params:
            p.fill_(3.0)
    set_gradients(params, 0)
    optimizer.step()
    assert all((ema == 3.0).all() for ema in optimizer.ema_state_dict().values())


def test_parameters_without_gradient(impl):
    """They stay, their step does not count; a frozen one keeps an EMA that is bit-equal to it."""
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = AdamWEMA(params, **HYPER, ema_decay=0.9, impl=impl)
    start = params[0].detach().clone()
    for step in range(3):
        set_gradients(params, step)
        params[0].grad = None
        if step == 2:
            params[1].grad = None
        before = params[1].detach().clone()
        optimizer.step()
    assert torch.equal(params[0], start) and torch.equal(optimizer.ema_state_dict()["0"], start)
    assert torch.equal(params[1], before) and optimizer.state[params[1]]["step"] == 2


def test_no_ema(impl):
    params = parameters()
    optimizer = AdamWEMA(params, **HYPER, ema_decay=None, impl=impl)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.ema_state_dict() == {} and "ema" not in optimizer.state[params[0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_dict_round_trip_continues_bit_for_bit(dtype, impl):
    impl = "torch" if dtype == torch.float64 else impl
    params = parameters(dtype)
    optimizer = AdamWEMA([(f"w{i}", p) for i, p in enumerate(params)], **HYPER, ema_decay=0.9, impl=impl)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = AdamWEMA([(f"w{i}", p) for i, p in enumerate(twins)], lr=1.0, impl=impl)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] == HYPER["lr"] and resumed.param_groups[0]["ema_decay"] == 0.9
    for x, y in zip(everything(optimizer), everything(resumed)):
        assert x.dtype == y.dtype and torch.equal(x, y)
    for step in range(3, 5):
        for group, opt in ((params, optimizer), (twins, resumed)):
            set_gradients(group, step)
            opt.step()
    for x, y in zip(everything(optimizer), everything(resumed)):
        assert torch.equal(x, y)


def test_bf16_parameters_keep_fp32_state(impl):
    params = parameters(torch.bfloat16)
    optimizer = AdamWEMA(params, lr=1e-2, ema_decay=0.9, impl=impl)
    set_gradients(params, 0)
    optimizer.step()
    assert all(optimizer.state[p][key].dtype == torch.float32 for p in params for key in ("exp_avg", "exp_avg_sq", "ema"))
    assert all(p.dtype == torch.bfloat16 for p in params)


def test_states_of_other_optimizers_are_refused():
    params = parameters()
    adamw = torch.optim.AdamW(params)
    set_gradients(params, 0)
    adamw.step()
    with pytest.raises(ValueError, match="lacks.*ema_decay.*another optimizer"):
        AdamWEMA(params).load_state_dict(adamw.state_dict())
    optimizer = AdamWEMA(params)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["ema"]
    with pytest.raises(ValueError, match="state of parameter 0 lacks"):
        AdamWEMA(params).load_state_dict(saved)


def test_an_ema_is_loaded_by_name(impl):
    params = parameters()
    optimizer = AdamWEMA(params, ema_decay=1.0, impl=impl)
    loaded = {str(i): torch.full(shape, float(i), device=DEVICE) for i, shape in enumerate(SHAPES)}
    optimizer.load_ema_state_dict(loaded)
    set_gradients(params, 0)
    optimizer.step()
    assert all((optimizer.ema_state_dict()[key] == value).all() for key, value in loaded.items())
    with pytest.raises(ValueError, match="missing \\['3'\\], unexpected \\['x'\\]"):
        optimizer.load_ema_state_dict({**{key: loaded[key] for key in "012"}, "x": loaded["3"]})
    with pytest.raises(ValueError, match="EMA 1: "):
        optimizer.load_ema_state_dict({**loaded, "1": torch.zeros(6)})


def test_chunks_change_nothing(monkeypatch, impl):
    results = []
    for size in (1 << 26, 8, 1):
        monkeypatch.setattr(adamw_ema, "_CHUNK", size)
        params = parameters()
        optimizer = AdamWEMA(params, **HYPER, impl=impl)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step(found_inf=scalar(0.0))
        results.append(everything(optimizer))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


def test_closure_and_hooks(impl):
    p = nn.Parameter(scalar(2.0))
    optimizer = AdamWEMA([p], lr=0.1, impl=impl)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))

    def closure():
        optimizer.zero_grad()
        loss = p.square()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0 and calls == ["hook"] and p.item() < 2.0


def test_local_shards_of_dtensors(tmp_path, impl):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_tensor

    torch.distributed.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh(DEVICE.type, (1,))
        plain = parameters()
        sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh)) for p in plain]
        ours, expected = AdamWEMA(sharded, **HYPER, impl=impl), AdamWEMA(plain, **HYPER, impl=impl)
        for step in range(2):
            set_gradients(plain, step)
            for p, q in zip(sharded, plain):
                p.grad = distribute_tensor(q.grad.clone(), mesh)
            ours.step(found_inf=scalar(0.0))
            expected.step()
        for key, ema in ours.ema_state_dict().items():
            assert isinstance(ema, DTensor) and torch.equal(ema.to_local(), expected.ema_state_dict()[key])
        assert all(torch.equal(p.to_local(), q) for p, q in zip(sharded, plain))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lr=-1.0), "lr must be"),
        (dict(lr="1e-3"), "lr must be"),
        (dict(betas=(0.9, 1.0)), "betas must be a pair"),
        (dict(betas=0.9), "betas must be a pair"),
        (dict(betas=(0.9,)), "betas must be a pair"),
        (dict(betas=(0.9, 0.95, 0.99)), "betas must be a pair"),
        (dict(betas=("0.9", None)), "betas must be a pair"),
        (dict(betas=None), "betas must be a pair"),
        (dict(eps=None), "eps must be"),
        (dict(eps=-1e-8), "eps must be"),
        (dict(weight_decay=-0.1), "weight_decay must be"),
        (dict(ema_decay=1.5), "ema_decay must be"),
        (dict(impl="cuda"), "impl must be one of auto, triton, torch"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=f"AdamWEMA: .*{message}"):
        AdamWEMA(parameters(), **changes)


def test_parameters_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="share one device"):
        AdamWEMA([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))])


@pytest.mark.parametrize(
    "group, message",
    [
        (dict(lr=-1.0), "lr must be a number, 0 or more, got -1.0"),
        (dict(betas=(2, 2)), r"betas must be a pair of numbers in \[0, 1\), got \(2, 2\)"),
        (dict(ema_decay=2), r"ema_decay must be a number in \[0, 1\], a tensor or None, got 2"),
        (dict(params=[("a", nn.Parameter(torch.zeros(2)))]), r"names of parameters must differ, .* more than once: \['a'\]"),
        (dict(params=[("b", nn.Parameter(torch.zeros(2, device="meta")))]), "parameters must share one device"),
    ],
)
def test_groups_are_checked_and_one_that_is_refused_is_not_added(group, message):
    given = dict(params=[("b", nn.Parameter(torch.zeros(2)))]) | group
    optimizer = AdamWEMA([("a", nn.Parameter(torch.zeros(2)))])
    with pytest.raises(ValueError, match=f"^AdamWEMA: {message}"):
        optimizer.add_param_group(given)
    assert optimizer.ema_state_dict().keys() == {"a"}
    with pytest.raises(ValueError, match=f"^AdamWEMA: {message}"):
        AdamWEMA([dict(params=[("a", nn.Parameter(torch.zeros(2)))]), given])


def test_only_floating_point_and_dense():
    with pytest.raises(ValueError, match="AdamWEMA: parameters must be floating point, 0 is torch.complex64"):
        AdamWEMA([torch.zeros(2, dtype=torch.complex64)])
    with pytest.raises(ValueError, match="AdamWEMA: parameters must be floating point, 0 is torch.float8_e4m3fn; 16 bits at least"):
        AdamWEMA([torch.zeros(2).to(torch.float8_e4m3fn)])
    with pytest.raises(ValueError, match="AdamWEMA: parameters must be dense, 0 has layout torch.sparse_coo"):
        AdamWEMA([torch.zeros(2).to_sparse()])
    p = nn.Parameter(torch.zeros(3, device=DEVICE))
    p.grad = torch.sparse_coo_tensor([[1]], [1.0], (3,), device=DEVICE, check_invariants=True)
    with pytest.raises(ValueError, match="AdamWEMA: gradients must be dense"):
        AdamWEMA([p]).step()


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(found_inf=torch.zeros(2)), "found_inf must be a tensor of one element, got shape \\(2,\\)"),
        (dict(found_inf=True), "found_inf must be a tensor of one element, got True"),
        (dict(grad_scale=torch.ones((), device="meta")), "grad_scale is on meta, the parameters on"),
    ],
)
def test_scalars_that_a_kernel_cannot_read(given, message, impl):
    params = parameters()
    set_gradients(params, 0)
    with pytest.raises(ValueError, match=f"AdamWEMA: {message}"):
        AdamWEMA(params, impl=impl).step(**given)


@pytest.mark.parametrize("rate", [torch.ones(1), torch.ones((), dtype=torch.float64), torch.ones((), device="meta")])
@pytest.mark.parametrize("name", ["lr", "ema_decay"])
def test_rates_that_a_kernel_cannot_read(name, rate):
    params = parameters()
    with pytest.raises(ValueError, match=f"AdamWEMA: {name} as a tensor must be \\(\\) torch.float32 on {DEVICE.type}"):
        AdamWEMA(params, **{name: rate}).step()


def test_no_step_waits_for_the_device(impl, monkeypatch):
    """Nothing asks for a number: not in the open (item), not in passing (a message that shows a tensor)."""

    class NoNumbers(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default, "a step asked for the value of a tensor"
            return function(*args, **(kwargs or {}))

    def shown(tensor, **_):
        raise AssertionError("a step showed a tensor")

    params = parameters()
    set_gradients(params, 0)
    params[2].grad = None
    monkeypatch.setattr(torch.Tensor, "__repr__", shown)
    with NoNumbers():
        optimizer = AdamWEMA(params, lr=scalar(0.1), ema_decay=scalar(0.9), impl=impl, bf16_copy=True)
        for _ in range(2):
            optimizer.step(found_inf=scalar(0.0), grad_scale=scalar(2.0))
    with pytest.raises(AssertionError, match="asked for the value"), NoNumbers():
        scalar(1.0).item()


def test_rates_may_lie_on_the_device(impl):
    """A number and a tensor of the same value give the same step; a tensor can be written to between the steps of a graph."""
    results = []
    for make in (float, scalar):
        params = parameters()
        optimizer = AdamWEMA(params, lr=make(0.25), weight_decay=0.5, ema_decay=make(0.75), impl=impl)
        for step, rate in enumerate((0.25, 0.125, 0.0625)):
            set_gradients(params, step)
            group = optimizer.param_groups[0]
            group["lr"] = make(rate) if make is float else group["lr"].fill_(rate)
            optimizer.step()
        results.append(everything(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bf16_copy_follows_every_step_that_counts(dtype, impl):
    params = parameters(dtype)
    optimizer = AdamWEMA([(f"w{i}", p) for i, p in enumerate(params)], lr=0.1, impl=impl, bf16_copy=True)
    copies = optimizer.bf16_state_dict()
    for step in range(3):
        set_gradients(params, step)
        params[0].grad = None
        optimizer.step(found_inf=scalar(float(step == 1)))
        assert all(torch.equal(copies[f"w{i}"], p.bfloat16()) and copies[f"w{i}"].dtype == torch.bfloat16 for i, p in enumerate(params))
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq", "ema"}  # not in state_dict
    with torch.no_grad():
        for p in params:
            p.zero_()
    set_gradients(params, 3)
    before = [copy.clone() for copy in copies.values()]
    optimizer.step(found_inf=scalar(1.0))
    if dtype != torch.bfloat16:  # a bf16 parameter is its own copy
        assert all(torch.equal(old, new) for old, new in zip(before, copies.values()))
    assert all((t == 0).all() for t in optimizer.bf16_state_dict().values()) and all((t == 0).all() for t in copies.values())


def test_without_bf16_copies():
    with pytest.raises(ValueError, match="AdamWEMA: there are no bf16 copies; make the optimizer with bf16_copy=True"):
        AdamWEMA(parameters()).bf16_state_dict()


@pytest.mark.parametrize("bf16_copy", [False, True])
def test_a_deep_copy_goes_on_alone(impl, bf16_copy):
    params = parameters()
    optimizer = AdamWEMA(params, **HYPER, impl=impl, bf16_copy=bf16_copy)
    set_gradients(params, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    before = everything(optimizer)
    for opt in (twin, optimizer):
        set_gradients(opt.param_groups[0]["params"], 1)
        opt.step()
        if opt is twin:
            assert all(torch.equal(a, b) for a, b in zip(before, everything(optimizer)))
    assert all(torch.equal(a, b) for a, b in zip(everything(twin), everything(optimizer)))
    if bf16_copy:
        assert torch.equal(twin.bf16_state_dict()["0"], optimizer.bf16_state_dict()["0"])


def laid_out(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A parameter and a gradient of unusual strides: dense in two orders, with gaps, or without elements."""
    generator = torch.Generator().manual_seed(3)
    p, g = (torch.randn(4, 3, 5, 6, generator=generator).to(DEVICE) for _ in range(2))
    match kind:
        case "channels_last":
            return p.to(memory_format=torch.channels_last), g.to(memory_format=torch.channels_last)
        case "gradient in another order":
            return p.to(memory_format=torch.channels_last), g
        case "gradient with gaps":
            return p[..., :3].contiguous(), g[..., :3]
        case "transposed":
            return p.permute(3, 0, 2, 1), g.permute(3, 0, 2, 1)
        case "one wide":
            return p[:, :1].to(memory_format=torch.channels_last), g[:, :1].contiguous()
        case "empty":
            return p[:0], g[:0]
        case "gaps":
            return p[..., ::2], g[..., ::2]


@pytest.mark.parametrize("kind", ["channels_last", "gradient in another order", "gradient with gaps", "transposed", "one wide", "empty"])
def test_strides_change_nothing(kind, impl):
    strided, plain = laid_out(kind), [t.contiguous() for t in laid_out(kind)]
    results = []
    for p, g in (strided, plain):
        p = nn.Parameter(p)
        p.grad = g
        optimizer = AdamWEMA([p], **HYPER, impl=impl)
        optimizer.step()
        optimizer.step()
        assert p.stride() == optimizer.state[p]["exp_avg"].stride() and optimizer.state[p]["step"] == 2
        results.append(everything(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_what_the_kernel_cannot_take_is_an_error_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(_compat, "INTERPRETED", True)
    for p, found in ((torch.zeros(2, dtype=torch.float64), "torch.float64"), (laid_out("gaps")[0], "strides \\(90, 30, 6, 2\\)")):
        p = nn.Parameter(p.to(DEVICE))
        p.grad = torch.ones_like(p)
        AdamWEMA([p]).step()
        with pytest.raises(ValueError, match=f"AdamWEMA: impl='triton' cannot take a parameter of .*{found}"):
            AdamWEMA([p], impl="triton").step()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about CPU tensors")
def test_the_host_build_is_for_the_interpreter_alone(monkeypatch):
    monkeypatch.setattr(_compat, "INTERPRETED", False)
    with pytest.raises(ValueError, match="AdamWEMA: impl='triton' needs CUDA parameters, or TRITON_INTERPRET=1 for CPU ones, got cpu"):
        AdamWEMA(parameters(), impl="triton")
    AdamWEMA(parameters(), impl="auto")


def test_the_fallback_is_said_once(monkeypatch):
    """Where no compiler is found: "auto" warns with the reason, one time; "triton" is an error."""

    def no_compiler(device):
        raise BuildError("no nvcc: put CUDA's compiler on PATH, or set CUDA_HOME")

    monkeypatch.setattr(adamw_ema, "_kernel", no_compiler)
    gpu = torch.device("cuda", 7)
    with pytest.warns(UserWarning, match="AdamWEMA runs torch's fused AdamW and a foreach EMA instead of its kernel: no nvcc"):
        assert adamw_ema._compiled("auto", gpu) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert adamw_ema._compiled("auto", gpu) is None
    adamw_ema._kernel_if_any.cache_clear()
    with pytest.raises(BuildError, match="AdamWEMA: impl='triton' needs its compiled kernel; no nvcc"):
        adamw_ema._compiled("triton", gpu)


def test_autograd_notices_the_step(impl):
    """Weights that a backward pass still needs were written to: an error, as with torch's optimizers, not a wrong gradient."""
    w = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = AdamWEMA([w], impl=impl, bf16_copy=True)
    loss, copied = w.square().sum(), optimizer.bf16_state_dict()["0"].requires_grad_().square().sum()
    w.grad = torch.ones_like(w)
    optimizer.step()
    for saved in (loss, copied):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()
