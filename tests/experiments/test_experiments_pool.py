"""Tasks side by side: what waits for what, and what becomes of one that fails."""

import operator
import os
import signal
import subprocess
import sys
import time

import pytest

from vavae_fast.errors import require
from vavae_fast.experiments.pool import Task, run_tasks


def test_tasks_wait_for_what_they_need_and_a_failed_one_leaves_out_those_that_need_it():
    """Functions of modules that another process can import; one process, so the order is known."""
    fails = Task("fails", (), require, (False, "key", 1, "2"))
    tasks = [Task("late", ("early",), operator.add, (1, 2)), fails, Task("never", ("fails",), operator.add, (1, 1)), Task("early", (), os.getpid)]
    done, failed = [], []
    run_tasks(tasks, 1, done.append, lambda name, error: failed.append((name, str(error))))
    assert [one.name for one in done] == ["early", "late"] and done[1].value == 3 and done[0].value != os.getpid()
    assert all(one.seconds >= 0 and one.memory_gb > 0 for one in done)
    assert failed == [("fails", "key: must be 2, got 1")]
    with pytest.raises(ZeroDivisionError):  # no user's error: it ends all
        run_tasks([fails, Task("fault", (), operator.truediv, (1, 0))], 1, done.append, lambda name, error: failed.append(name))
    assert failed[1:] == ["fails"]


ORPHANS = """
import signal, sys, time
from vavae_fast.experiments.pool import Task, run_tasks
if __name__ == "__main__":
    print("started", flush=True)
    run_tasks([Task("sleep", (), time.sleep, (120,))], 1, print)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_a_killed_parent_leaves_no_process_behind(tmp_path):
    """Killed while its worker still imports: the worker must notice by itself, since the kernel's signal is asked for too late."""
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "started\n"
    children = wait_for(lambda: children_of(parent.pid))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert wait_for(lambda: not any(map(alive, children))), children


def wait_for(condition, seconds: float = 90.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    return condition()


def children_of(pid: int) -> list[int]:
    """By the kernel's list; multiprocessing's resource tracker is one of them and ends with its pipe."""
    return [int(word) for word in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
