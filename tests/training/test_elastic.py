"""The elastic exact mode: one, two and four processes give the same bits, sharded or not; so does a run that wanders among them.

As a script, this file makes all the runs that its tests compare: `python test_elastic.py FOLDER [all]`.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from scripted import made
from torch import nn

from vavae_fast.config import slots_of_process
from vavae_fast.data.order import micro_batches
from vavae_fast.distributed import World
from vavae_fast.errors import BadInput
from vavae_fast.schema import TrainConfig
from vavae_fast.training import elastic
from vavae_fast.training.checkpoint import load_checkpoint
from vavae_fast.training.elastic import ElasticReduction, deterministic_kernels, exact, require_workspace, sum_of_rows
from vavae_kernels import AdamWEMA

CPU = torch.device("cpu")
STEPS = 4
# Widths that no vector register divides, clipping in every step, up to eight slots of a process.
DIT = ("train.deterministic=elastic", f"train.max_steps={STEPS}", "model.hidden_size=36", "model.num_heads=3", "model.depth=1")
TOKENIZER = ("train.deterministic=elastic", "train.slots=4", "train.global_batch_size=8", f"train.max_steps={STEPS}",
             "model.params.lossconfig.params.disc_start=2", "model.params.ddconfig.dropout=0.1")  # fmt: skip


def make_runs(folder: Path, everything: bool) -> None:
    import tiny
    from processes import begin, start, statuses, trained, words  # noqa: F401

    from vavae_fast.cli import main
    from vavae_fast.commands import train_tokenizer  # noqa: F401  imported before the fork

    begin(folder)
    pipeline = tiny.prepare(folder / "tiny")
    trained(folder, "one", 1, *DIT)
    for processes, steps, mode in ((2, 1, "full"), (1, 2, "none"), (4, STEPS, "hybrid")):
        trained(folder, "wandering", processes, *DIT, f"train.max_steps={steps}", f"train.shard={mode}", nodes=processes // 2 or 1)
    if everything:
        for name, processes, nodes in (("two", 2, 1), ("four", 4, 1), ("full", 4, 1), ("hybrid", 4, 2)):
            mode = name if name in ("full", "hybrid") else "none"
            trained(folder, name, processes, *DIT, f"train.shard={mode}", nodes=nodes)
        trained(folder, "bf16", 1, *DIT, "train.precision=bf16")
        trained(folder, "bf16_full", 2, *DIT, "train.precision=bf16", "train.shard=full")

    def tokenizer(name: str, processes: int, *settings: str) -> None:
        given = ["train-tokenizer", *pipeline.tokenizer(folder, name, *TOKENIZER, *settings)]
        codes = statuses(start(processes, lambda: main(given), folder / f"{name}.txt"))
        if codes != [0] * processes:
            sys.exit(f"{name}: exit codes {codes}\n{(folder / f'{name}.txt').read_text()}")

    tokenizer("tokenizer", 1)
    tokenizer("tokenizer_wandering", 4, "train.max_steps=2")
    tokenizer("tokenizer_wandering", 2)
    if everything:
        tokenizer("fused_tokenizer", 1, "train.fused=true")
        tokenizer("fused_tokenizer_four", 4, "train.fused=true")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return made(__file__, tmp_path_factory.mktemp("runs") / "made")


def lines(run: Path) -> list[dict]:
    kept = ("step", "loss", "mse", "nll", "grad_norm", "lr", "skipped")
    return [{key: line.get(key) for key in kept} for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]


def assert_same_run(run: Path, expected: Path) -> None:
    """Everything that a checkpoint holds, and what the log says of it."""
    mine, theirs = (load_checkpoint(r / "checkpoints" / f"step_{STEPS:08d}")[0] for r in (run, expected))
    assert mine.keys() == theirs.keys() and len(lines(run)) == STEPS
    for group in theirs:
        assert mine[group].keys() == theirs[group].keys()
        different = [key for key, value in theirs[group].items() if not torch.equal(mine[group][key], value)]
        assert not different, (group, different)
    assert lines(run) == lines(expected)


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="several processes over gloo; on a GPU machine they would share one over NCCL")


@on_cpu
def test_a_run_of_two_one_and_four_processes_is_that_of_one(runs):
    """Shards of two processes, then one process, then two nodes of two with shards."""
    assert_same_run(runs / "wandering", runs / "one")
    assert min(line["grad_norm"] for line in lines(runs / "one")) > 0.5, "clipped, so that a wrong norm shows"


@on_cpu
def test_so_is_a_tokenizers(runs):
    """With dropout, the discriminator's batch statistics, and both adaptive weights."""
    assert_same_run(runs / "tokenizer_wandering", runs / "tokenizer")


@on_cpu
@pytest.mark.exhaustive  # a dozen runs more, of up to four processes
def test_every_world_and_way_to_shard(tmp_path):
    made(__file__, tmp_path, "all")
    for name in ("two", "four", "full", "hybrid"):
        assert_same_run(tmp_path / name, tmp_path / "one")
    assert_same_run(tmp_path / "bf16_full", tmp_path / "bf16")
    assert_same_run(tmp_path / "fused_tokenizer_four", tmp_path / "fused_tokenizer")


# -- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_slots_are_added_in_one_tree(monkeypatch, processes):
    """Gradients whose sum depends on its order; neighbours on one process, then the processes pairwise."""
    torch.manual_seed(0)
    slots = torch.randn(8, 50) * torch.logspace(-6, 6, 8).view(-1, 1)
    pairs = lambda x: x[0::2] + x[1::2]
    expected = pairs(pairs(pairs(slots)))[0]
    assert not torch.equal(expected, slots.cumsum(0)[-1]), "the order shows"
    own = []
    for rank in range(processes):
        p, count = nn.Parameter(torch.zeros(50)), 8 // processes
        reduction = ElasticReduction(World(rank, 1, CPU), 8)
        reduction.begin(nn.Module(), [p], count)
        for slot in range(rank * count, (rank + 1) * count):
            reduction.prepare()
            p.grad = slots[slot].clone()
            reduction.add({"loss": slots[slot, 0]})
            assert p.grad is None
        values = reduction.own()
        torch.testing.assert_close(values["loss"], slots[rank * count : (rank + 1) * count, 0].sum() / 8)
        own.append(p.grad)

    def exchange(received, flat, group):
        received.copy_(torch.cat([torch.nn.functional.pad(g, (0, -50 % processes)).chunk(processes)[0] for g in own]))

    monkeypatch.setattr(elastic.dist, "all_to_all_single", exchange)
    first = elastic._scattered_sum(torch.nn.functional.pad(own[0], (0, -50 % processes)), processes, None)
    assert torch.equal(first[:50], expected[: len(first)])


def test_running_statistics_are_the_mean_over_slots_whoever_has_them():
    norm = nn.BatchNorm1d(3)
    x = torch.randn(4, 5, 3)
    alone = []
    for slot in x:
        twin = nn.BatchNorm1d(3)
        twin(slot)
        alone.append(twin.running_mean)
    reduction = ElasticReduction(World(0, 1, CPU), 4)
    reduction.begin(norm, norm.parameters(), 4, norm.buffers())
    for slot in x:
        reduction.prepare()
        (norm(slot).square().sum() / 4).backward()
        reduction.add({"loss": slot.mean()})
    reduction.across(reduction.own())
    torch.testing.assert_close(norm.running_mean, torch.stack(alone).mean(0))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 1000])
def test_a_rows_sum_is_exact_to_fp64_and_its_own(width):
    x = torch.randn(9, width, dtype=torch.float64)
    sums = sum_of_rows(x)
    torch.testing.assert_close(sums, x.sum(1), rtol=1e-13, atol=1e-13)
    assert all(torch.equal(sum_of_rows(x[i : i + 1])[0], sums[i]) for i in range(9))
    assert sum_of_rows(x[:0]).shape == (0,) and torch.equal(sum_of_rows(x[:, 0]), x[:, 0])


def test_the_norm_is_the_norm_and_an_enormous_gradient_keeps_it_finite():
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(7, 2))
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    reduction = ElasticReduction(World(0, 1, CPU), 2)
    expected = torch.cat([p.grad.flatten() for p in net.parameters()]).double().norm()
    torch.testing.assert_close(reduction.norm(net.parameters()).double(), expected, rtol=1e-7, atol=0)
    next(net.parameters()).grad[0, 0, 0, 0] = 1e20
    assert reduction.norm(net.parameters()) == 1e20
    next(net.parameters()).grad[0, 0, 0, 0] = float("nan")
    assert reduction.norm(net.parameters()).isnan()


def test_the_optimizers_bits_do_not_depend_on_where_a_weight_stands():
    """As PyTorch's fused AdamW's do on a CPU, in the elements after the last full vector."""
    torch.manual_seed(0)
    whole, gradients = torch.randn(1003), [torch.randn(1003) for _ in range(3)]

    def after(cuts):
        parameters = [part.clone().requires_grad_() for part in whole.split(cuts)]
        optimizer = AdamWEMA(parameters, lr=1e-2, weight_decay=0.1, ema_decay=0.9)
        for gradient in gradients:
            for p, part in zip(parameters, gradient.split(cuts)):
                p.grad = part
            optimizer.grad_scale = torch.tensor(1.7)
            optimizer.step()
        return torch.cat([*(p.detach() for p in parameters), *optimizer.ema_state_dict().values()])

    with exact(CPU, compiled=False):
        assert torch.equal(after([5] * 200 + [3]), after([1003]))


def test_micro_batches_in_turn_are_those_of_all_in_order():
    """Four processes, two and two neighbours in turn: by rank (0, 1, 0, 1) and (2, 3, 2, 3)."""
    each = [next(zip(*[micro_batches(3, 16, rank, 4, 2, in_turn=2)] * 2)) for rank in range(4)]
    found = [each[rank][turn].tolist() for rank, turn in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1))]
    assert sum(found, []) == list(range(48, 64))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((20, 8, 1), "train.global_batch_size 20 does not divide into train.slots 8; nearest: 16, 24"),
        ((24, 8, 3), "train.slots 8 does not divide over 3 processes; start 1, 2, 4, 8 of them, or set train.deterministic=none"),
        ((32, 8, 16), "train.slots 8 does not divide over 16 processes; start 1, 2, 4, 8 of them, or set train.deterministic=none"),
    ],
)
def test_what_does_not_divide_is_one_line(arguments, said):
    with pytest.raises(BadInput) as caught:
        slots_of_process(*arguments)
    assert str(caught.value) == said
    assert slots_of_process(24, 8, 4) == (3, 2)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (dict(slots=6), "slots: must be a power of two, got 6"),
        (dict(deterministic="elastic", micro_batch_size=4), "micro_batch_size: must be null with deterministic: elastic; set slots, got 4"),
        (dict(deterministic="elastic", attention="flash-attn"), "attention: must be auto, sdpa or math with"),
        (dict(audit_every=5, attention="xformers"), "attention: must be auto, sdpa or math with"),
        (dict(audit_every=0), "audit_every: must be above 0, got 0"),
    ],
)
def test_keys_that_cannot_be_together(keys, said):
    with pytest.raises(BadInput, match=f"^{said}"):
        TrainConfig(**keys)
    assert TrainConfig(attention="flash-attn").deterministic == "none"


def test_a_workspace_of_cublas_that_adds_in_any_order_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":1:1")
    with pytest.raises(BadInput, match="CUBLAS_WORKSPACE_CONFIG: must be :4096:8 or :16:8 .*; unset it, got ':1:1'"):
        require_workspace()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    require_workspace()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_an_operation_without_deterministic_kernel_is_one_line_and_flags_come_back():
    filled, threads = torch.utils.deterministic.fill_uninitialized_memory, torch.get_num_threads()
    with pytest.raises(BadInput, match="^PyTorch's put_ gives other bits every time; set train.deterministic=none and train.audit_every=null$"):
        with exact(CPU, compiled=True):
            assert torch.are_deterministic_algorithms_enabled() and torch._inductor.config.deterministic
            raise RuntimeError("put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'.")
    with pytest.raises(RuntimeError, match="^another$"), deterministic_kernels(compiled=False):
        raise RuntimeError("another")
    assert not torch.are_deterministic_algorithms_enabled() and not torch._inductor.config.deterministic
    assert torch.utils.deterministic.fill_uninitialized_memory is filled and torch.get_num_threads() == threads


if __name__ == "__main__":
    make_runs(Path(sys.argv[1]), "all" in sys.argv)
