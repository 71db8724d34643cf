"""Ranks and collectives. One process needs no process group; `torchrun` gives several, over NCCL or gloo."""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class World:
    """This process among all: `rank` in [0, size), its `device`."""

    rank: int
    size: int
    device: torch.device

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
        """Whether any process has the flag set; all must call."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the process group together. After an error nobody waits: the others stand in another collective, for ever."""
        if kind is None and self.size > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def die_with_parent() -> None:
    """Ask the kernel (Linux) to end this process when its parent ends, so that a killed launcher leaves no orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def open_world() -> World:
    """Join the process group that the launcher prepared, or none. CUDA when there is one, else CPU."""
    size, rank, local_rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        die_with_parent()
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return World(rank, size, device)
