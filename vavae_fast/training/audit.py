"""The audit (`train.audit_every`): does the device compute the same thing twice, and do all replicas hold the same weights?

Silent data corruption: a processor that computes wrong now and then and says nothing. Six of the 419 interruptions in 54 days of Llama 3's
training (Dubey et al. 2024, table 5). Every so many steps the gradients of the step to come are computed twice, with deterministic kernels,
and thrown away; then the step is made as ever. The run has the bits of one without audits.
"""

import socket
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from vavae_fast.distributed import World
from vavae_fast.errors import HardwareFault
from vavae_fast.training.elastic import deterministic_kernels
from vavae_fast.training.parallel import gathered, local_rows

PIECE = 1 << 24  # elements of a tensor digested at a time: bounds the temporaries to about 0.4 GB
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Step = Callable[[Any, int, list[Any]], dict[str, Tensor]]


class Audited(Protocol):
    """A state that can be audited."""

    world: World

    def replicated(self) -> dict[str, Tensor]:
        """Everything that each replica trains for itself, by name."""


def audited(step: Step, gradients: Step, every: int, compiled: bool, shards: int = 1) -> Step:
    """`step` with an audit before each `every`-th one. `gradients` computes what the step does, up to p.grad, and leaves the rest as it was.

    compiled: the model runs compiled. Of every `shards` neighbouring processes each holds other rows of the weights; the processes at the
    same place among them are replicas. `HardwareFault`, on all processes, names step, process and tensor.
    """
    agreed = 0  # the step up to which replicas are known to have held the same

    def audited_step(state: Audited, number: int, micro_batches: list[Any]) -> dict[str, Tensor]:
        nonlocal agreed
        if (number + 1) % every == 0:
            _audit(state, lambda: gradients(state, number, micro_batches), number + 1, agreed, compiled, shards)
            agreed = number
        return step(state, number, micro_batches)

    return audited_step


def _audit(state: Audited, compute: Callable[[], dict[str, Tensor]], step: int, agreed: int, compiled: bool, shards: int) -> None:
    held = state.replicated()
    with deterministic_kernels(compiled):
        (names, first), (_, second) = _computed(held, compute), _computed(held, compute)
    same = first == second
    verdict = torch.where(same.all(), len(names), same.int().argmin()).view(1)  # the first that differs
    found = _from_all(torch.cat((verdict, digests(held.values()))), state.world)  # the only wait for the device
    wrong = [(rank, names[row[0]]) for rank, row in enumerate(found) if row[0] < len(names)]
    others = _unlike_replicas([row[1:] for row in found], list(held), shards)
    if wrong or others:
        hosts = _hosts(state.world)
        who = "" if shards == 1 else f" (or another of its {shards} processes with train.shard)"
        computed = [f"process {rank} on {hosts[rank]}{who} computed {name} twice, and it differed" for rank, name in wrong]
        holds = [f"process {rank} on {hosts[rank]} holds another {name} than its replicas" for rank, name in others]
        cure = "then the same command continues from the newest checkpoint"
        if others:
            cure = f"its checkpoints after step {agreed}, up to which all agreed, may hold the same fault"
        raise HardwareFault(f"step {step}: {', '.join(computed + holds)}; take that device out of service; {cure}")


def _computed(held: dict[str, Tensor], compute: Callable[[], dict[str, Tensor]]) -> tuple[list[str], Tensor]:
    """(names, their digests) of the values and gradients of one pass; the gradients are dropped."""
    values = compute()
    trained = {name: p for name, p in held.items() if p.grad is not None}
    found = digests([*values.values(), *(p.grad for p in trained.values())])
    for p in trained.values():
        p.grad = None
    return [*values, *(f"the gradient of {name}" for name in trained)], found


@torch.no_grad()
def digests(tensors: Iterable[Tensor]) -> Tensor:
    """(n,) int64 on the device, of the bits of n tensors, of sharded ones those that lie here: sum of word i times 2 i + 1, modulo 2^64.

    A flipped bit changes the sum, always, for the factors are odd; the order of adding does not.
    """
    return torch.stack([_digest(local_rows(tensor)) for tensor in tensors])


def _digest(tensor: Tensor) -> Tensor:
    words = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), PIECE):
        piece = words[start : start + PIECE].long()
        total += (piece * torch.arange(2 * start + 1, 2 * (start + len(piece)) + 1, 2, device=tensor.device)).sum()
    return total


def _from_all(row: Tensor, world: World) -> list[list[int]]:
    """Every process's row, on every process."""
    return (gathered(row) if world.size > 1 else row.unsqueeze(0)).tolist()


def _unlike_replicas(rows: list[list[int]], names: list[str], shards: int) -> list[tuple[int, str]]:
    """(rank, first tensor) of those that differ from most of their replicas. Of two that differ nobody can tell which is right: both."""
    found = []
    for place in range(shards):
        replicas = range(place, len(rows), shards)
        (most, count), *_ = Counter(tuple(rows[rank]) for rank in replicas).most_common()
        minority = [rank for rank in replicas if tuple(rows[rank]) != most]
        named = minority if 2 * count > len(replicas) else list(replicas)
        for rank in named:
            against = most if tuple(rows[rank]) != most else rows[minority[0]]
            found.append((rank, next(name for name, a, b in zip(names, rows[rank], against) if a != b)))
    return sorted(found)


def _hosts(world: World) -> list[str]:
    hosts = [socket.gethostname()] * world.size
    if world.size > 1:
        dist.all_gather_object(hosts, socket.gethostname(), group=world.hosts)
    return hosts
