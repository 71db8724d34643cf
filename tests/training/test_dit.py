"""The LightningDiT step: its loss is the paper's, micro-batches add up to the batch, nothing waits for the device."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vavae_fast import rng
from vavae_fast.data.streams import LatentBatch
from vavae_fast.distributed import World
from vavae_fast.flow import create_transport
from vavae_fast.models import LightningDiT
from vavae_fast.schema import OptimizerConfig
from vavae_fast.training.dit import DiTState, dit_step, flow_terms, time_draw
from vavae_fast.training.guard import Guard
from vavae_fast.training.optimizer import trainable
from vavae_kernels import AdamWEMA

CPU = torch.device("cpu")
SEED = 11


class NoHostSync(TorchDispatchMode):
    """Fails where a value would travel from the device to the host."""

    FORBIDDEN = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().split(".")[0] not in self.FORBIDDEN, f"{func.name()} waits for the device"
        return func(*args, **(kwargs or {}))


def state(dtype=torch.float32, dropout=0.1, fused=False, device=CPU, **changes) -> DiTState:
    torch.manual_seed(0)
    model = LightningDiT(input_size=2, patch_size=1, in_channels=4, hidden_size=32, depth=1, num_heads=4, num_classes=5,
                         class_dropout_prob=dropout, fused=fused, use_swiglu=True, use_rope=True, use_rmsnorm=True).to(device, dtype)  # fmt: skip
    with torch.no_grad():  # as initialised, the gates and the output are 0
        for p in trainable(model).values():
            p.add_(0.1 * torch.randn_like(p))
    settings = OptimizerConfig(lr=1e-3)
    optimizer = AdamWEMA(trainable(model).items(), lr=settings.lr, betas=(0.9, settings.beta2), weight_decay=0.0)
    transport = create_transport("Linear", "velocity", use_cosine_loss=True, use_lognorm=True)
    plain = dict(model=model, optimizer=optimizer, ema_decay=0.99, transport=transport, guard=Guard(device, 10), world=World(0, 1, device),
                 seed=SEED, settings=settings, max_steps=10, bf16=False)  # fmt: skip
    return DiTState(**(plain | changes))


def batch(count=8, first=0, dtype=torch.float32) -> LatentBatch:
    """Samples first to first + count of one fixed data set."""
    index = torch.arange(first, first + count)
    latents = rng.normal(99, index, like=torch.empty(count, 4, 2, 2, dtype=dtype))
    return LatentBatch(latents, index % 5, index)


def weights(s):
    return {name: p.detach().clone() for name, p in trainable(s.model).items()}


def test_the_loss_is_the_papers_formula():
    """x_t = t x1 + (1 - t) x0, v = x1 - x0, loss = mean (v - model)^2 + mean (1 - cos(v, model)); t logit-normal."""
    s, b = state(), batch()
    x0 = rng.normal(SEED, b.index, like=b.latents)
    t = torch.sigmoid(rng.normal(SEED, b.index, torch.empty(8, 1), rng.Stream.TIME)[:, 0])
    dropped = rng.uniform(SEED, b.index, rng.Stream.LABEL_DROP) < 0.1
    tt = t.view(-1, 1, 1, 1)
    s.model.eval()
    v = s.model(tt * b.latents + (1 - tt) * x0, t, torch.where(dropped, 5, b.labels))
    s.model.train()
    target = b.latents - x0
    mse = (v - target).square().mean()
    cos = (1 - torch.nn.functional.cosine_similarity(v, target, dim=1)).mean()
    terms = flow_terms(s, 0, b)
    torch.testing.assert_close(terms["mse"], mse)
    torch.testing.assert_close(terms["cos"], cos)
    torch.testing.assert_close(terms["loss"], mse + cos)


def test_labels_are_dropped_at_their_rate_and_never_without_a_null_class():
    b = batch(4000)
    dropped = rng.uniform(SEED, b.index, rng.Stream.LABEL_DROP) < 0.1
    assert abs(dropped.float().mean().item() - 0.1) < 4 * (0.09 / 4000) ** 0.5
    s = state(dropout=0.0)
    assert s.model.y_embedder.embedding_table.num_embeddings == 5
    assert torch.isfinite(dit_step(s, 0, [batch()])["loss"])


def test_times_are_normal_or_uniform_by_their_own_stream():
    index = torch.arange(20000)
    normal, uniform = time_draw(SEED, index, True), time_draw(SEED, index, False)
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert 0 < uniform.min() and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert torch.equal(time_draw(SEED, index[7:9], True), normal[7:9]), "a function of the sample's place alone"


@pytest.mark.parametrize("sizes", [(4, 4), (2, 2, 2, 2), (1,) * 8])
def test_micro_batches_add_up_to_the_batch(sizes):
    whole, parts = state(), state()
    for step in range(3):
        a = dit_step(whole, step, [batch(8, 8 * step)])
        first, micro = 8 * step, []
        for size in sizes:
            micro.append(batch(size, first))
            first += size
        b = dit_step(parts, step, micro)
        for key in ("loss", "mse", "cos", "grad_norm"):
            torch.testing.assert_close(b[key], a[key], rtol=1e-5, atol=0)


def test_in_fp64_micro_batches_are_the_batch_to_the_last_digits():
    """The law without Adam's amplification of rounding: the accumulated gradients themselves."""
    whole, parts = state(torch.float64), state(torch.float64)
    a = dit_step(whole, 0, [batch(8, dtype=torch.float64)])
    b = dit_step(parts, 0, [batch(2, first, torch.float64) for first in (0, 2, 4, 6)])
    torch.testing.assert_close(b["grad_norm"], a["grad_norm"], rtol=1e-12, atol=0)


def test_one_step_is_backward_adamw_and_ema():
    s, b = state(settings=OptimizerConfig(lr=1e-3, max_grad_norm=0.5)), batch()
    twin = copy.deepcopy(s.model)
    plain = torch.optim.AdamW(trainable(twin).values(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    t = copy.copy(s)
    t.model = twin
    flow_terms(t, 0, b)["loss"].backward()
    norm = torch.nn.utils.clip_grad_norm_(trainable(twin).values(), 0.5)
    plain.step()
    before = {name: value.clone() for name, value in s.optimizer.ema_state_dict().items()}
    values = dit_step(s, 0, [b])
    torch.testing.assert_close(values["grad_norm"], norm)
    assert norm > 0.5 and s.optimizer.param_groups[0]["lr"] == 1e-3
    for name, p in trainable(s.model).items():
        torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(s.ema()[name], 0.99 * before[name] + 0.01 * p.detach(), rtol=1e-5, atol=1e-7)
        assert p.grad is None


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_never_waits_for_the_device(fused):
    s = state(fused=fused, settings=OptimizerConfig(lr=1e-3, max_grad_norm=1.0))
    dit_step(s, 0, [batch()])  # what is made once is made
    with NoHostSync():
        values = dit_step(s, 1, [batch(4), batch(4, 4)])
    assert all(isinstance(v, torch.Tensor) and v.shape == () and not v.requires_grad for v in values.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fused", [False, True])
def test_on_a_gpu_a_step_never_waits_for_the_device_either(fused):
    """PyTorch itself raises at whatever synchronises."""
    s = state(fused=fused, settings=OptimizerConfig(lr=1e-3, max_grad_norm=1.0), device=torch.device("cuda"), bf16=True)
    on_gpu = [LatentBatch(*(t.cuda() for t in (b.latents, b.labels, b.index))) for b in (batch(4), batch(4, 4))]
    dit_step(s, 0, on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        dit_step(s, 1, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_batch_with_a_nan_changes_nothing_and_the_next_one_trains():
    s = state()
    dit_step(s, 0, [batch()])
    before, average = weights(s), {k: v.clone() for k, v in s.optimizer.ema_state_dict().items()}
    spoilt = batch()
    spoilt.latents[3, 0, 0, 0] = float("nan")
    dit_step(s, 1, [batch(), spoilt])
    after = weights(s)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(average[name], s.ema()[name]) for name in average)
    assert int(s.guard.skipped) == 1
    dit_step(s, 2, [batch()])
    assert any(not torch.equal(before[name], value) for name, value in weights(s).items()) and int(s.guard.in_a_row) == 0


def test_the_late_transport_takes_over_at_its_step():
    """The 800-epoch recipe: logit-normal t up to step 600,000, uniform from there."""
    late = create_transport("Linear", "velocity", use_cosine_loss=True, use_lognorm=False)
    s, b = state(transport_late=late, late_from=5), batch()
    early = flow_terms(s, 4, b)["loss"]
    assert torch.equal(early, flow_terms(state(), 4, b)["loss"])
    assert torch.equal(flow_terms(s, 5, b)["loss"], flow_terms(state(transport=late), 5, b)["loss"])
    assert not torch.equal(early, flow_terms(s, 5, b)["loss"])


def test_without_the_cosine_term_there_is_none():
    s = state(transport=create_transport("Linear", "velocity", use_cosine_loss=False, use_lognorm=True))
    terms = flow_terms(s, 0, batch())
    assert terms.keys() == {"loss", "mse"} and torch.equal(terms["loss"], terms["mse"])


def test_groups_bring_a_fresh_state_to_the_same_next_step():
    straight = state()
    for step in range(2):
        dit_step(straight, step, [batch(8, 8 * step)])
    groups = {group: {k: v.clone() for k, v in tensors.items()} for group, tensors in straight.groups().items()}
    assert groups.keys() == {"model", "ema", "optimizer", "guard"}
    resumed = state()
    resumed.load_groups(groups, "x")
    for s in (straight, resumed):
        dit_step(s, 2, [batch(8, 16)])
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(resumed).values()))
    assert all(torch.equal(a, resumed.ema()[k]) for k, a in straight.ema().items())


def test_bf16_runs_the_matrices_alone_in_bf16():
    s = state(bf16=True)
    values = dit_step(s, 0, [batch()])
    exact = dit_step(state(), 0, [batch()])
    assert all(p.dtype == torch.float32 for p in s.model.parameters())
    torch.testing.assert_close(values["loss"], exact["loss"], rtol=2e-2, atol=0)
    assert not torch.equal(values["loss"], exact["loss"])
