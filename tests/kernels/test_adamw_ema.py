"""AdamWEMA: AdamW's mathematics beside torch.optim.AdamW, the EMA by hand, and steps that must change nothing."""

import copy

import pytest
import torch
from torch import nn

from vavae_kernels import AdamWEMA
from vavae_kernels.ops import adamw_ema

SHAPES = ((7, 3), (5,), (), (2, 3, 4))
HYPER = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def parameters(dtype=torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def set_gradients(params, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


def everything(optimizer: AdamWEMA) -> list[torch.Tensor]:
    """Clones of all that a step can change: parameters, moments, steps, EMA."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [t.detach().clone() for p in params for t in (p, *(optimizer.state[p][key] for key in sorted(optimizer.state[p])))]


@pytest.mark.parametrize("changes", [{}, dict(weight_decay=0.0), dict(betas=(0.0, 0.999)), dict(lr=0.0)])
def test_is_torchs_adamw_with_an_ema_by_hand(changes):
    hyper = {**HYPER, **changes}
    ours, theirs = parameters(), parameters()
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


def test_fp32_is_no_less_accurate_than_torchs():
    """Error against AdamW in fp64 after 50 steps, beside that of torch.optim.AdamW in fp32, foreach on tensors of steps."""
    runs = {}
    for name, dtype in (("exact", torch.float64), ("ours", torch.float32), ("torch", torch.float32)):
        params = parameters(torch.float32)
        params = [nn.Parameter(p.detach().to(dtype)) for p in params]
        optimizer = AdamWEMA(params, **HYPER) if name == "ours" else torch.optim.AdamW(params, **HYPER)
        for step in range(50):
            set_gradients(params, step)
            for p in params:
                p.grad = p.grad.float().to(dtype)
            optimizer.step()
        runs[name] = torch.cat([p.detach().double().flatten() for p in params])
    ours, theirs = ((runs[name] - runs["exact"]).abs().max().item() for name in ("ours", "torch"))
    assert ours <= 2 * (theirs + torch.finfo(torch.float32).eps), f"ours {ours:.2e}, torch {theirs:.2e}"


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("as_attribute", [False, True])
def test_found_inf_changes_nothing_at_all(poison, as_attribute):
    params = parameters(torch.float32)
    params[1].data[0] = -0.0  # a bit that 0 * x + y would lose
    optimizer = AdamWEMA(params, **HYPER, ema_decay=0.5)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    before = everything(optimizer)
    for p in params:
        p.grad = torch.full_like(p, poison)
    if as_attribute:
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        del optimizer.found_inf
    else:
        optimizer.step(found_inf=torch.ones(()))
    for old, new in zip(before, everything(optimizer)):
        assert torch.equal(old, new) and torch.equal(old.signbit(), new.signbit())
    set_gradients(params, 3)
    optimizer.step(found_inf=torch.zeros(()))
    expected = AdamWEMA(parameters(torch.float32), **HYPER, ema_decay=0.5)
    expected.param_groups[0]["params"][1].data[0] = -0.0
    for step in range(4):
        set_gradients(expected.param_groups[0]["params"], step)
        expected.step()
    for old, new in zip(everything(expected), everything(optimizer)):
        assert torch.equal(old, new)


def test_found_inf_on_the_very_first_step():
    params = parameters(torch.float32)
    start = [p.detach().clone() for p in params]
    optimizer = AdamWEMA(params, **HYPER)
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step(found_inf=torch.ones(1))
    for i, (p, old) in enumerate(zip(params, start)):
        assert torch.equal(p, old) and torch.equal(optimizer.ema_state_dict()[str(i)], old)
        assert optimizer.state[p]["step"] == 0 and optimizer.state[p]["exp_avg"].abs().sum() == 0


def test_grad_scale_divides():
    scaled, plain = parameters(), parameters()
    a, b = AdamWEMA(scaled, **HYPER), AdamWEMA(plain, **HYPER)
    for step in range(3):
        set_gradients(scaled, step, scale=1024.0)
        kept = [p.grad.clone() for p in scaled]
        a.step(grad_scale=torch.tensor(1024.0))
        assert all(torch.equal(p.grad, grad) for p, grad in zip(scaled, kept))  # gradients are read, not written
        set_gradients(plain, step)
        b.step()
    for x, y in zip(everything(a), everything(b)):
        assert torch.equal(x, y)


def test_grad_scaler_drives_it():
    """torch.amp.GradScaler hands over found_inf and the scale on the device, and takes both back."""
    params, plain = parameters(torch.float32), parameters(torch.float32)
    optimizer, expected = AdamWEMA(params, **HYPER), AdamWEMA(plain, **HYPER)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(3):
        set_gradients(params, step)
        for p in params:
            p.grad = p.grad * 256.0
            if step == 1:
                p.grad.fill_(torch.inf)
        scaler.scale(torch.ones(()))
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


def test_the_ema_starts_at_the_weights_of_the_first_step():
    """Weights loaded after construction are what the EMA starts from."""
    params = parameters()
    optimizer = AdamWEMA(params, **HYPER, ema_decay=1.0)
    with torch.no_grad():
        for p in params:
            p.fill_(3.0)
    set_gradients(params, 0)
    optimizer.step()
    assert all((ema == 3.0).all() for ema in optimizer.ema_state_dict().values())


def test_parameters_without_gradient():
    """They stay, their step does not count; a frozen one keeps an EMA that is bit-equal to it."""
    params = parameters(torch.float32)
    params[0].requires_grad_(False)
    optimizer = AdamWEMA(params, **HYPER, ema_decay=0.9)
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


def test_no_ema():
    params = parameters()
    optimizer = AdamWEMA(params, **HYPER, ema_decay=None)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.ema_state_dict() == {} and "ema" not in optimizer.state[params[0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_dict_round_trip_continues_bit_for_bit(dtype):
    params = parameters(dtype)
    optimizer = AdamWEMA([(f"w{i}", p) for i, p in enumerate(params)], **HYPER, ema_decay=0.9)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = AdamWEMA([(f"w{i}", p) for i, p in enumerate(twins)], lr=1.0)
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


def test_bf16_parameters_keep_fp32_state():
    params = parameters(torch.bfloat16)
    optimizer = AdamWEMA(params, lr=1e-2, ema_decay=0.9)
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


def test_an_ema_is_loaded_by_name():
    params = parameters()
    optimizer = AdamWEMA(params, ema_decay=1.0)
    loaded = {str(i): torch.full(shape, float(i)) for i, shape in enumerate(SHAPES)}
    optimizer.load_ema_state_dict(loaded)
    set_gradients(params, 0)
    optimizer.step()
    assert all((optimizer.ema_state_dict()[key] == value).all() for key, value in loaded.items())
    with pytest.raises(ValueError, match="missing \\['3'\\], unexpected \\['x'\\]"):
        optimizer.load_ema_state_dict({**{key: loaded[key] for key in "012"}, "x": loaded["3"]})
    with pytest.raises(ValueError, match="EMA 1: "):
        optimizer.load_ema_state_dict({**loaded, "1": torch.zeros(6)})


def test_chunks_change_nothing(monkeypatch):
    results = []
    for size in (1 << 26, 8, 1):
        monkeypatch.setattr(adamw_ema, "_CHUNK", size)
        params = parameters(torch.float32)
        optimizer = AdamWEMA(params, **HYPER)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step(found_inf=torch.zeros(()))
        results.append(everything(optimizer))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


def test_closure_and_hooks():
    p = nn.Parameter(torch.tensor(2.0))
    optimizer = AdamWEMA([p], lr=0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))

    def closure():
        optimizer.zero_grad()
        loss = p.square()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0 and calls == ["hook"] and p.item() < 2.0


def test_local_shards_of_dtensors(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = parameters(torch.float32)
        sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh)) for p in plain]
        ours, expected = AdamWEMA(sharded, **HYPER), AdamWEMA(plain, **HYPER)
        for step in range(2):
            set_gradients(plain, step)
            for p, q in zip(sharded, plain):
                p.grad = distribute_tensor(q.grad.clone(), mesh)
            ours.step(found_inf=torch.zeros(()))
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
        (dict(impl="triton"), "Triton"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=f"AdamWEMA: .*{message}"):
        AdamWEMA(parameters(), **changes)


def test_parameters_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="share one device"):
        AdamWEMA([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))])
