"""What becomes of a run when torchrun, or a worker of it, is signalled or killed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import processes as forked
from torture.tally import Effort, Tally

from vavae_fast.training.checkpoint import checkpoint_fault, checkpoints

AFTER = 10.0  # seconds in which all workers end
PATIENCE = 120.0
SETTINGS = ("train.max_steps=100000", "train.ckpt_every=4", "train.keep_last=2", "train.hang_seconds=5", "log.layers_every=null")
HANDLED = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")  # as the shipped Slurm script does


@dataclass(frozen=True)
class Case:
    """A signal, to the launcher or a worker; `saves`: the step at hand is saved. `said`: by torchrun or the run."""

    name: str
    number: int
    to: str  # "launcher", "worker"
    saves: bool
    said: str = ""
    flags: tuple[str, ...] = ()
    starting: bool = False  # while the workers still start


CASES = (
    Case("SIGTERM to the launcher", signal.SIGTERM, "launcher", True),
    Case("SIGUSR1 to the launcher", signal.SIGUSR1, "launcher", True),
    Case("SIGUSR1 to the launcher, which handles it", signal.SIGUSR1, "launcher", True, flags=HANDLED),
    Case("SIGKILL to the launcher", signal.SIGKILL, "launcher", True),
    Case("SIGKILL to the launcher while its workers start", signal.SIGKILL, "launcher", False, starting=True),
    Case("SIGTERM to a worker", signal.SIGTERM, "worker", True),
    Case("SIGUSR1 to a worker", signal.SIGUSR1, "worker", True),
    Case("SIGKILL to a worker", signal.SIGKILL, "worker", False, r"rank 1 \(process {worker} on \S+\) has ended without a word, last"),
    Case("SIGSTOP to a worker", signal.SIGSTOP, "worker", False, r"rank 1 \(process {worker} on \S+\) has given no sign of life"),
)


def launched(effort: Effort) -> list[Tally]:
    folder = effort.folder / "launched"
    forked.begin(folder)
    rows = []
    for case in CASES if effort.size >= 0.1 else effort.draw("launched").sample(CASES, 1):
        row = Tally(f"torchrun, two workers: {case.name}")
        rows.append(row)
        slowest = 0.0
        for trial in range(effort.count(2)):
            row.tried += 1
            name = f"{re.sub('[^a-z]+', '_', case.name.lower())}{trial}"
            kind, line, seconds = tried(case, folder, name, effort.draw(name).uniform(0.2, 3.0) if case.starting else 0.0)
            slowest = max(slowest, seconds)
            if kind:
                row.fail(kind, f"--seed {effort.seed}, {case.name}, trial {trial}: {line}")
        row.remark = f"all ended {slowest:.1f} s after it was noticed, at most"
    return rows


def tried(case: Case, folder: Path, name: str, delay: float) -> tuple[str, str, float]:
    """One launch. ("", "", seconds to the end of all), or what went wrong."""
    said, log = folder / f"{name}.txt", folder / name / "log.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *case.flags, "-m", "vavae_fast"]
    with open(said, "wb") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen([*command, *forked.words(folder, name, *SETTINGS)], stdout=file, stderr=file, env=environment)
    try:
        workers = wait_for(lambda: two_children(launcher.pid))
        if case.starting:
            time.sleep(delay)
        else:
            wait_for(lambda: log.is_file() and "step 6/" in log.read_text() and (folder / name / "heartbeats" / "rank001.json").is_file())
        begun = time.monotonic() + (7.0 if case.number == signal.SIGSTOP else 0.0)  # hang_seconds, and the beat before
        os.kill(launcher.pid if case.to == "launcher" else workers[1], case.number)
        ended = all_end([*workers], begun + PATIENCE)
        seconds = time.monotonic() - begun
        launcher.wait(60)
    except TimeoutError as error:
        return "hung", f"{error}: {said.read_text()[-1500:]}", 0.0
    finally:
        launcher.kill()
        launcher.wait()
        for worker in workers:
            if alive(worker):
                os.kill(worker, signal.SIGKILL)
    text = said.read_text() + (log.read_text() if log.is_file() else "")
    if not ended or seconds > AFTER:
        return "hung", f"workers ended after {seconds:.0f} s: {text[-1500:]}", seconds
    said_so = case.said.replace("{worker}", str(workers[1]))
    if not re.search(said_so, text):
        return "wrong", f"{said_so!r} is not said: {text[-3000:]}", seconds
    return (*saved(case, folder / name / "checkpoints", text), seconds)


def saved(case: Case, folder: Path, text: str) -> tuple[str, str]:
    found = checkpoints(folder)
    faults = [fault for path in found if (fault := checkpoint_fault(path)) is not None]
    if faults:
        return "lost", str(faults)
    step = re.search(r"saved step (\d+) in", text)
    if case.saves and (step is None or found[-1].name != f"step_{int(step[1]):08d}"):
        return "lost", f"the step was not saved: {text[-1500:]}"
    return "", ""


def two_children(parent: int) -> list[int] | None:
    """The workers, by rank: torchrun starts them in that order."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
    children = sorted(map(int, found.stdout.split()))
    return children if len(children) == 2 else None


def wait_for(condition: Callable[[], object], patience: float = PATIENCE):
    deadline = time.monotonic() + patience
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come to train")
        time.sleep(0.05)
    return found


def all_end(workers: list[int], deadline: float) -> bool:
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, workers))


def alive(process: int) -> bool:
    """Whether it runs, or is stopped; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False
