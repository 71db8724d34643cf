"""Whether memory and disk will do: told by --dry-run, and before a run writes anything."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.errors import BadInput
from vavae_fast.schema import TrainConfig

SMALL = 5_000_000  # parameters of a network that a CPU has trained for a while before its memory is predicted
DOUBT = 1.1  # predictions hold to a few percent


def predicts(device: Any, parameters: int) -> bool:
    """Whether memory is asked about: by the first process of a machine for all of its kind, and not for what any machine holds."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and (device.type == "cuda" or parameters >= SMALL)


def free_memory(device: Any) -> int:
    """Bytes that this process can have: of its GPU, or its share of the machine's, or container's, memory."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0]
    return _host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _host_memory() -> int:
    lines = dict(line.split(":") for line in _read(Path("/proc/meminfo")).splitlines())
    if "MemAvailable" in lines:
        machine = int(lines["MemAvailable"].split()[0]) * 1024
    else:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (_read(Path("/sys/fs/cgroup") / name).strip() for name in ("memory.max", "memory.current"))
    return min(machine, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else machine


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def require_memory(need: Callable[[int], int], micro: int, share: int, device: Any) -> None:
    """`BadInput` with a micro-batch that fits, unless need(micro) bytes are free. need grows by the same with each sample; `share` is a
    process's of the global batch."""
    needed, free = need(micro), free_memory(device)
    if needed <= DOUBT * free:
        return
    one, two = need(1), need(2)
    fitting = [size for size in range(1, share + 1) if share % size == 0 and one + (size - 1) * (two - one) <= free]
    cure = f"set train.micro_batch_size={max(fitting)}" if fitting else "one is too many; set model.use_checkpoint=true, or take a larger GPU"
    what = "GPU memory" if device.type == "cuda" else "memory"
    found = f"{micro} samples at once need about {artifacts.readable_bytes(needed)} of {what}, {artifacts.readable_bytes(free)} are free"
    raise BadInput(f"train.micro_batch_size: {found}; {cure}")


def memory_line(predicted: int, precision: str) -> str:
    """What --dry-run says of it."""
    import torch

    free = f"; {artifacts.readable_bytes(free_memory(torch.device('cuda')))} are free here" if torch.cuda.is_available() else ""
    return f"about {artifacts.readable_bytes(predicted)} per GPU in {precision}, predicted{free}; less with train.micro_batch_size"


@dataclass(frozen=True)
class Disk:
    """What the checkpoints of a run will take, in words; and whether that is more than is free."""

    line: str
    short: bool = False


def plan_disk(folder: Path, checkpoint_bytes: int, c: TrainConfig, max_steps: int | None, ends: int = 0) -> Disk:
    """max_steps None: not known yet. `ends`: of how many stages checkpoints stay."""
    line = f"{artifacts.readable_bytes(checkpoint_bytes)} a checkpoint, every {c.ckpt_every:,} steps"
    if max_steps is None:
        return Disk(line)
    there = sum((path / "manifest.json").is_file() for path in (folder / "checkpoints").glob("step_????????"))
    most, free = _held(max_steps, c.ckpt_every, c.keep_last, c.keep_every, ends), artifacts.free_space(folder)
    needed = max(0, most - there) * checkpoint_bytes
    line += f"; {most:,} at a time at most: {artifacts.readable_bytes(needed)} more than now, {artifacts.readable_bytes(free)} are free"
    if needed <= free:
        return Disk(line)
    least = _held(max_steps, c.ckpt_every, 2, None, ends) * checkpoint_bytes
    return Disk(f"{line}, the disk will be full; make room, or set train.keep_last=2, which takes {artifacts.readable_bytes(least)}", True)


def _held(max_steps: int, every: int, last: int | None, keep_every: int | None, ends: int) -> int:
    """The most checkpoints there are at a time: a new one is whole before an old one goes."""
    saves = math.ceil(max_steps / every) + ends
    if last is None:
        return saves
    return min(saves, last + 1 + ends + (max_steps // math.lcm(every, keep_every) if keep_every else 0))
