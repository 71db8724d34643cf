"""Saving checkpoints in the background, from one process or many: training waits for the copy to host memory, not for the disk.

    snapshot      each process copies what it has to write: whole tensors the main one, rows of sharded tensors those that hold them
    write         into step_NNNNNNNN.tmp, each file hashed and synced by its writer
    commit        the main process writes manifest.json last, syncs, renames the folder, syncs its parent
    retain        then older checkpoints go, by rename and removal

The processes agree after each stage, over a process group of CPUs that nothing else uses: an error of one is the error of all, the
temporary folder goes, and training goes on without that checkpoint.
"""

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vavae_fast import artifacts
from vavae_fast.distributed import SAVE_TIMEOUT, World
from vavae_fast.errors import BadInput
from vavae_fast.training.checkpoint import ROWS, Groups, checkpoint_fault, checkpoints, step_folder, write_tensors
from vavae_fast.training.parallel import first_row, is_sharded, local_rows, shard_place

HELD_OUT = "valid_mse"  # the key of metrics.jsonl by which a checkpoint is the best
PINNED = "pinned"  # an empty file of this name in a checkpoint's folder keeps it
FAILURES = 3  # saves that may fail in a row
PATIENCE = 60.0  # seconds that a failing run waits for the save in flight


class SaveFailed(Exception):
    """A checkpoint could not be written, by this process or another; the message is one line, the same on all."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the `last` ones (None: all), every one whose step is a multiple of `every` or in `steps`, the best, the pinned."""

    last: int | None = None
    every: int | None = None
    steps: frozenset[int] = frozenset()

    def asks_for(self, step: int) -> bool:
        """Whether a checkpoint of this step stays however old it is."""
        return step in self.steps or bool(self.every and step % self.every == 0)


@dataclass(frozen=True)
class Part:
    """One file that this process writes: tensors in host memory."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None = None

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


# -- what to write ----------------------------------------------------------------------------------------------------


def snapshot(groups: Groups, rank: int = 0) -> list[Part]:
    """Copies of what process `rank` has to write of `groups`. From a GPU the copies are only queued: see `ready`."""
    parts = []
    for group, tensors in groups.items():
        sharded = {name: t for name, t in tensors.items() if is_sharded(t)}
        if not sharded and rank == 0:
            parts.append(Part(f"{group}.safetensors", {name: _to_host(t) for name, t in tensors.items()}))
        elif sharded:
            index, count, replica = shard_place(next(iter(sharded.values())))
            if replica == 0:
                mine = {name: _to_host(local_rows(t)) for name, t in tensors.items() if name in sharded or index == 0}
                rows = {name: [first_row(t), t.shape[0]] for name, t in sharded.items()}
                held = {name: t for name, t in mine.items() if name not in sharded or t.shape[0]}
                parts.append(Part(f"{group}.rank{index:02d}of{count:02d}.safetensors", held, {ROWS: json.dumps(rows)}))
    return parts


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in row order; from a GPU into pinned memory, without waiting for it."""
    tensor = tensor.detach()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def ready() -> Callable[[], None]:
    """Call it after `snapshot`, and what it returns on the thread that reads the copies: it waits until they are made."""
    if not torch.cuda.is_initialized():
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


# -- the protocol -----------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, parts: list[Part], facts: dict[str, Any], rank: int = 0, group: Any = None) -> Path:
    """Write `parts`, this process's of all in `group` (None: there is no other), as the checkpoint of `step`; all must call.

    `SaveFailed` on all when one cannot, or holds a NaN; nothing of that step is left then. A damaged folder of that step, which the run went back
    behind, is kept beside it as `*.damaged`; a whole one is never written over.
    """
    final = step_folder(folder, step)
    temporary = final.with_name(final.name + ".tmp")
    main = rank == 0
    sizes = _together(group, lambda: _size(parts))
    try:
        _together(group, lambda: _prepare(final, temporary, sum(sizes)) if main else None)
        written = _together(group, lambda: _write(temporary, parts))
        files = {name: entry for entries in written for name, entry in entries.items()}
        _together(group, lambda: _commit(final, temporary, artifacts.manifest("checkpoint", step=step, files=files, **facts)) if main else None)
    finally:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _together(group: Any, action: Callable[[], Any]) -> list[Any]:
    """Do `action` here; the results of all processes, or `SaveFailed` on all when it failed on any."""
    result, fault = None, None
    try:
        result = action()
    except BadInput as error:
        fault = str(error)
    except OSError as error:
        fault = f"{error.filename or 'file system'}: {error.strerror or error}"
    outcomes = [(result, fault)]
    if group is not None:
        outcomes = [None] * dist.get_world_size(group)
        dist.all_gather_object(outcomes, (result, fault), group=group)
    faults = [fault for _, fault in outcomes if fault is not None]
    if faults:
        raise SaveFailed(faults[0])
    return [result for result, _ in outcomes]


def _size(parts: list[Part]) -> int:
    """Bytes. `BadInput` for a NaN or infinity, wherever it came from: saved, it would be all that a run could continue from."""
    for part in parts:
        for name, tensor in part.tensors.items():
            if tensor.is_floating_point() and tensor.numel() and not all(math.isfinite(end) for end in tensor.aminmax()):
                raise BadInput(f"{part.name}: {name} holds NaN or infinity; stop, and continue from the checkpoint before")
    return sum(part.bytes for part in parts)


def _prepare(final: Path, temporary: Path, size: int) -> None:
    artifacts.require_space(final.parent, int(artifacts.SPARE * size) + (1 << 20))
    if final.exists():
        if checkpoint_fault(final) is None:
            raise BadInput(f"{final}: is there already, and whole; a checkpoint is never written over")
        aside = final.with_name(final.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    shutil.rmtree(temporary, ignore_errors=True)
    artifacts.make_folder(final.parent)
    temporary.mkdir()


def _write(temporary: Path, parts: list[Part]) -> dict[str, dict[str, Any]]:
    """File name -> its size and hash, as the manifest holds them."""
    files = {}
    for part in parts:
        path = temporary / part.name
        write_tensors(path, part.tensors, part.metadata)
        artifacts.sync(path)
        files[part.name] = {"bytes": path.stat().st_size, "sha256": artifacts.sha256(path)}
    return files


def _commit(final: Path, temporary: Path, manifest: dict[str, Any]) -> None:
    artifacts.write_json(temporary / "manifest.json", manifest)
    artifacts.sync(temporary)
    temporary.rename(final)
    artifacts.sync(final.parent)


def retain(folder: Path, keep: Retention, verified: set[Path]) -> None:
    """Remove what `keep` does not ask for. Only whole checkpoints count and go; those in `verified` need no reading, others join it."""
    if keep.last is None:
        return
    whole = [path for path in checkpoints(folder) if path in verified or checkpoint_fault(path) is None]
    verified.update(whole)
    best = _best(whole, folder.parent / "metrics.jsonl")
    for path in whole[: -keep.last]:
        if path != best and not (path / PINNED).exists() and not keep.asks_for(_step(path)):
            _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path.rename(path.with_name(path.name + ".del")))  # a half removed folder must not have a checkpoint's name


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _best(whole: Iterable[Path], metrics: Path) -> Path | None:
    """The checkpoint at whose step the lowest held-out loss was logged; None when none was."""
    losses = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        if HELD_OUT in line and line.endswith("}"):  # the line being written now may not be whole
            values = json.loads(line)
            losses[values["step"]] = values[HELD_OUT]
    scored = [path for path in whole if losses.get(_step(path)) is not None]
    return min(scored, key=lambda path: losses[_step(path)], default=None)


# -- in the background ------------------------------------------------------------------------------------------------


class Saver:
    """Saves a run's checkpoints, one at a time, while training goes on. A failed save is said; FAILURES in a row end the run."""

    def __init__(self, folder: Path, world: World, facts: dict[str, Any], keep: Retention, say: Callable[[str], None]):
        self.folder, self.world, self.facts, self.keep, self.say = folder, world, facts, keep, say
        self.group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT) if world.size > 1 else None
        self.verified: set[Path] = set()
        self.failures, self.fault = 0, ""  # in a row, and the last one's line
        self.job: _Job | None = None

    def save(self, step: int, groups: Groups) -> None:
        """Begin to save `groups` as they are now; waits only for the save before it."""
        self.settle()
        parts = snapshot(groups, self.world.rank)
        self.job = _Job(self._write, step, parts, ready())
        self.job.start()

    def check(self) -> bool:
        """Say what became of a save that has ended; costs nothing while it runs. Whether the run is to end, which the next `save` does:
        processes may learn of a failure at different steps, and must end at one."""
        if self.job is not None and not self.job.is_alive():
            self._learn()
        return self.failures >= FAILURES

    def rewind(self, step: int) -> Path | None:
        """The newest whole checkpoint of `step` or before; those after it are removed. None, and nothing removed, without one."""
        whole = [path for path in checkpoints(self.folder) if _step(path) <= step and checkpoint_fault(path) is None]
        if not whole:
            return None
        for path in checkpoints(self.folder):
            if path > whole[-1]:
                self.verified.discard(path)
                _remove(path)
        return whole[-1]

    def finish(self) -> None:
        """Wait for the save in flight. `BadInput` when the newest checkpoint could not be saved."""
        self.settle()
        if self.failures:
            raise BadInput(f"{self.folder}: the last checkpoint could not be saved: {self.fault}; mend that, and start the same command again")

    def _write(self, step: int, parts: list[Part], wait: Callable[[], None]) -> str | None:
        wait()
        path = save_checkpoint(self.folder, step, parts, self.facts, self.world.rank, self.group)
        if self.world.main:
            self.verified.add(path)
            try:
                retain(self.folder, self.keep, self.verified)
            except OSError as error:
                return f"older checkpoints than that of step {step} stay: {error}"
        return None

    def settle(self) -> None:
        """Wait for the save in flight and say what became of it. `BadInput` after FAILURES in a row. All processes must call."""
        self._learn()
        if self.failures >= FAILURES:
            raise BadInput(f"{self.folder}: {FAILURES} checkpoints in a row could not be saved: {self.fault}")

    def _learn(self) -> None:
        job, self.job = self.job, None
        if job is None:
            return
        job.join()
        if job.error is None:
            self.failures = 0
            if job.note is not None:
                self.say(job.note)
        elif isinstance(job.error, SaveFailed):
            self.failures, self.fault = self.failures + 1, str(job.error)
            self.say(f"the checkpoint of step {job.step} was not saved: {job.error}")
        else:
            raise job.error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        """Give the save in flight its chance, whatever ended the run; its own errors are the lesser news then."""
        if self.job is not None:
            self.job.join(PATIENCE)


class _Job(threading.Thread):
    """One save. A daemon: a run that fails does not wait for a disk, or a process, that does not answer."""

    def __init__(self, write: Callable[..., str | None], step: int, parts: list[Part], wait: Callable[[], None]):
        super().__init__(name=f"checkpoint of step {step}", daemon=True)
        self.write, self.step, self.parts, self.wait = write, step, parts, wait
        self.note: str | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.note = self.write(self.step, self.parts, self.wait)
        except BaseException as error:  # noqa: B036  raised again by the thread that asked for the save
            self.error = error
