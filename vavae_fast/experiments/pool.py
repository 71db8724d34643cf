"""Tasks that wait for one another, run by processes side by side."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from vavae_fast.errors import BadInput


@dataclass(frozen=True)
class Task:
    """`function(*arguments)`, once the tasks named in `needs` are done. All of it goes to another process."""

    name: str
    needs: tuple[str, ...]
    function: Callable[..., Any]
    arguments: tuple = ()


@dataclass(frozen=True)
class Done:
    """What a task gave, the seconds it took and the CPU seconds of its process, and that process's peak memory so far."""

    name: str
    value: Any
    seconds: float
    cpu_seconds: float
    memory_gb: float


def run_tasks(
    tasks: Sequence[Task], processes: int, finished: Callable[[Done], None], failed: Callable[[str, BadInput], None] | None = None
) -> None:
    """Run all, each as soon as what it waits for is done and a process is free, in their order where several could.

    `failed` takes the `BadInput` of one task; those that wait for it are left out. Without it, and for any other error or a signal, the
    first ends all: tasks that run are waited for.
    """
    begun = dict(initializer=_begin, initargs=(processes, os.getpid()))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), **begun) as pool:
        waiting, running, done = list(tasks), {}, set()
        while waiting or running:
            for task in [task for task in waiting if set(task.needs) <= done][: processes - len(running)]:
                waiting.remove(task)
                running[pool.submit(_timed, task)] = task
            if not running:
                return  # what still waits needs a task that failed
            finished_now, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished_now:
                task = running.pop(future)
                try:
                    found = future.result()
                except BadInput as error:
                    if failed is None:
                        raise
                    failed(task.name, error)
                    continue
                finished(found)
                done.add(task.name)


_parent = 0  # process id of who started this one


def _begin(processes: int, parent: int) -> None:
    """Several processes with a thread each use small models' cores better than one process with several threads."""
    global _parent
    import torch

    from vavae_fast.launched import die_with_parent

    _parent = parent
    die_with_parent()
    _leave_if_orphaned()  # it may have died while torch was imported
    if processes > 1:
        torch.set_num_threads(1)
        sys.stdout.isatty = lambda: False  # several progress lines cannot share one line of a terminal


def _timed(task: Task) -> Done:
    import resource

    started, before = time.perf_counter(), time.process_time()
    try:
        value = task.function(*task.arguments)
    finally:
        _leave_if_orphaned()  # a stage answers the signal of its parent's death by saving what it has
        _forget_compiled()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return Done(task.name, value, time.perf_counter() - started, time.process_time() - before, memory)


def _leave_if_orphaned() -> None:
    """Nobody is left to work for."""
    if os.getppid() != _parent:
        os._exit(1)


def _forget_compiled() -> None:
    """What was compiled for one task's model: the next one's would count as recompilations of it, of which there may be few."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
