"""Ranks and collectives. One process needs no process group; `torchrun` gives several, over NCCL or gloo."""

import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vavae_fast.errors import Interrupted, PeerFault
from vavae_fast.launched import die_with_parent

# How long a process waits for the others before it gives up, and with it the run.
START_TIMEOUT = timedelta(minutes=30)  # reading and verifying a checkpoint, compiling
STEP_TIMEOUT = timedelta(minutes=10)  # from the first step on
SAVE_TIMEOUT = timedelta(minutes=60)  # for the slowest disk, in the background


@dataclass(frozen=True)
class World:
    """This process among all: `rank` in [0, size), its `device`; `local_size` processes share its node."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1
    hosts: Any = field(default=None, repr=False)  # a process group between CPUs, beside the default one; None: the default one is all there is

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over all processes, on every process."""
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process has the flag set; all must call. Goes from CPU to CPU and does not wait for a GPU."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.hosts)
        return bool(value.item())

    def agree(self, step: int, stop: bool, fault: str | None = None) -> bool:
        """Whether any process wants to stop after `step`; all call, at the end of each. Goes from CPU to CPU and does not wait for a GPU.

        `PeerFault` on all, naming the culprit, when one is at another step, has begun another number of collectives, whose sums are then
        wrong, or has found a `fault`.
        """
        if self.size == 1:
            if fault is not None:
                raise PeerFault(fault)
            return stop
        place = float(step), float(self.collectives())
        asked = torch.tensor([stop, fault is not None, *place, *(-value for value in place)], dtype=torch.float64)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.hosts)
        any_stop, any_fault, *extremes = asked.tolist()
        if any_fault or extremes[:2] != [-value for value in extremes[2:]]:
            raise PeerFault(self._who_differs(step, fault))
        return bool(any_stop)

    def _who_differs(self, step: int, fault: str | None) -> str:
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, (step, self.collectives(), fault), group=self.hosts)
        faults = [f"rank {rank}: {found}" for rank, (_, _, found) in enumerate(every) if found is not None]
        places = [(at, made) for at, made, _ in every]
        usual = max(places, key=lambda place: (places.count(place), place))
        others = [f"rank {rank} is out of step: at step {at} after {made} collectives, where {'most are' if self.size > 2 else 'the other is'} at "
                  f"step {usual[0]} after {usual[1]}" for rank, (at, made) in enumerate(places) if (at, made) != usual]  # fmt: skip
        return f"{(faults + others)[0]}. Nothing of this step was saved; the same command continues from the newest checkpoint"

    def collectives(self) -> int:
        """How many this process has begun in the default group, those that wait for others among them."""
        if self.size == 1 or not dist.is_initialized():
            return 0
        return dist.group.WORLD._get_sequence_number_for_group()

    def from_main(self, value: Any) -> Any:
        """The main process's `value`, on every process; all must call."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.hosts)
        return box[0]

    def gathered(self, value: Any) -> list[Any] | None:
        """Every process's `value`, by rank, on the main process; None on the others. All must call."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.main else None
        dist.gather_object(value, values, dst=0, group=self.hosts)
        return values

    def steps_begin(self, timeout: timedelta = STEP_TIMEOUT) -> None:
        """From here on a process that keeps the others waiting is a fault after `timeout` instead of START_TIMEOUT."""
        if self.size > 1:
            for group in {None, self.hosts}:
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Leave the process group together. After an error nobody waits: the others stand in another collective, for ever.

        The error is recorded for torchrun, which then names this process and not one that fell with it.
        """
        if self.size == 1 or not dist.is_initialized():
            return
        if error is None or isinstance(error, Interrupted):
            dist.barrier()
            dist.destroy_process_group()
            return
        if isinstance(error, RuntimeError):  # perhaps a lost connection, another's fault: its record, dated in whole seconds, is to be the older
            time.sleep(1.1)
        record_fault(error)


def record_fault(error: BaseException) -> None:
    """Leave `error` where torchrun looks for what ended a process."""
    _error_handler().record_exception(error)


def open_world() -> World:
    """Join the process group that the launcher prepared, or none. CUDA when there is one, else CPU."""
    variables = (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    size, rank, local_rank, local_size = (int(os.environ.get(name, default)) for name, default in variables)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    hosts = None
    if size > 1 and not dist.is_initialized():
        die_with_parent()
        _error_handler().initialize()
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, timeout=START_TIMEOUT)
        else:
            dist.init_process_group("gloo", timeout=START_TIMEOUT)
        hosts = dist.new_group(backend="gloo", timeout=START_TIMEOUT)  # on CPUs too: what is agreed on must not meet a sum of gradients
    return World(rank, size, device, local_size, hosts)


def _error_handler() -> Any:
    """What torch.distributed.elastic's `@record` uses: a fault's traceback, or the error, into the file that torchrun reads."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    return get_error_handler()
