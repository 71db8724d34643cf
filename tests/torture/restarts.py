"""A stage is killed, started again, killed again, until it ends: it must end in the bits of one that nobody disturbed."""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from processes import start, statuses
from torture.io_events import Watch, ended
from torture.stages import LISTENING, Files, Stage, run_to_the_end, said, slowed
from torture.tally import Tally

PATIENCE = 60.0  # seconds that the others of a killed process, or one asked to stop, may take to end
TRIES = 200  # starts of one run
FAILURES = 3  # of a stage, after which the others have their turn


@dataclass(frozen=True)
class Undisturbed:
    """How it goes when nothing happens."""

    seconds: float
    events: int
    files: Files


def undisturbed(stage: Stage, folder: Path, processes: int) -> Undisturbed:
    name = f"{stage.name}-{processes}-undisturbed"
    shutil.rmtree(folder / name, ignore_errors=True)
    stage.before(folder, folder / name)
    watch = Watch(folder / name)
    began = time.monotonic()
    children = start(processes, _watched(watch, stage, folder, name), said(folder, name))
    watch.attend(lambda: all(map(ended, children)))
    codes = statuses(children)
    if codes != [0] * processes:
        raise RuntimeError(f"{name}: exit codes {codes}\n{said(folder, name).read_text()}")
    return Undisturbed(time.monotonic() - began, len(watch.events), stage.made(folder / name))


def _watched(watch: Watch, stage: Stage, folder: Path, name: str) -> Callable[[], int]:
    def run() -> int:
        watch.join()
        return slowed(stage, folder, name)

    return run


def killed_and_started_again(stage: Stage, folder: Path, processes: int, kills: int, draw: random.Random, tally: Tally) -> None:
    """`kills` kills over as many runs as it takes. Half of them strike at an I/O event, half at a moment; of several processes one or all.

    A third of those at a moment are SIGTERM, which must be answered by leaving with 0 and without a trace of what is not whole.
    """
    expected = undisturbed(stage, folder, processes)
    if not expected.files:
        raise RuntimeError(f"{stage.name} made nothing")
    run, wanted, failures = 0, tally.tried + kills, len(tally.failures)
    while tally.tried < wanted and len(tally.failures) < failures + FAILURES:
        name = f"{stage.name}-{processes}-{run}"
        run += 1
        fault = _one_run(stage, folder, name, processes, wanted, draw, expected, tally)
        if fault is not None:
            kind, line = fault
            tally.fail(kind, f"{name} of {processes} processes, after {tally.tried} kills: {line}; it said: {_tail(said(folder, name))}")


def _one_run(
    stage: Stage, folder: Path, name: str, processes: int, wanted: int, draw: random.Random, expected: Undisturbed, tally: Tally
) -> tuple[str, str] | None:
    """Start and strike until it ends. What went wrong: ("wrong" or "hung", how)."""
    place = folder / name
    stage.before(folder, place)
    for _ in range(TRIES):
        if tally.tried >= wanted:
            run_to_the_end(stage, folder, name, processes)
            break
        strike = _Strike(draw, processes, expected)
        complete, fault = strike.upon(stage, folder, name, expected)
        tally.tried += strike.struck
        if fault is not None:
            return fault
        if (half := stage.fault(place, expected.files)) is not None:
            return "wrong", f"{strike}: {half}"
        if complete:
            break
    if stage.made(place) != expected.files:
        return "wrong", "not the bits of the undisturbed one"
    litter = [path.name for pattern in ("*.tmp", "*.del") for path in place.rglob(pattern)]
    return ("wrong", f"it came to its end and left {litter}") if litter else None


class _Strike:
    """One start and, unless it ends first, one signal."""

    def __init__(self, draw: random.Random, processes: int, expected: Undisturbed):
        self.processes = processes
        self.at_event = draw.randint(1, expected.events) if draw.random() < 0.5 else None
        self.torn = draw.random() if draw.random() < 0.5 else 0.0
        self.moment = draw.uniform(0, 0.9 * expected.seconds)
        self.all, self.one = draw.random() < 0.5, draw.randrange(processes)
        self.number = signal.SIGTERM if self.at_event is None and draw.random() < 1 / 3 else signal.SIGKILL
        self.struck = False

    def __str__(self) -> str:
        when = f"I/O event {self.at_event}" if self.at_event else f"{self.moment:.3f} s"
        return f"{self.number.name} at {when} to {'all' if self.all else f'process {self.one}'}"

    def upon(self, stage: Stage, folder: Path, name: str, expected: Undisturbed) -> tuple[bool, tuple[str, str] | None]:
        """Whether it has come to its end; what went wrong."""
        heard = _listening(said(folder, name))
        watch = Watch(folder / name, self.at_event, self.torn)
        children = start(self.processes, _watched(watch, stage, folder, name), said(folder, name))
        attending = threading.Thread(target=watch.attend, args=(lambda: all(map(ended, children)),))
        attending.start()
        deadline = time.monotonic() + self.moment
        while not any(map(ended, children)) and not watch.killed and (self.at_event or time.monotonic() < deadline):
            time.sleep(0.001)
        listened = _listening(said(folder, name)) == heard + self.processes
        self.struck = watch.killed or not any(map(ended, children))
        if self.struck:
            self._strike(children, watch)
        hung = wait(children)
        attending.join()
        self.struck |= watch.killed  # at an event after another process had come to its end
        codes = statuses(children)
        if hung:
            return False, ("hung", f"{self}: {hung} processes had not ended after {PATIENCE:.0f} s")
        complete = stage.made(folder / name) == expected.files
        return self._outcome(codes, listened, complete)

    def _strike(self, children: list[int], watch: Watch) -> None:
        for child in children if self.all else [] if watch.killed else [children[self.one]]:
            os.kill(child, self.number)
        if self.number == signal.SIGKILL:
            time.sleep(0.1)
            _terminate(children)  # as torchrun does with the others

    def _outcome(self, codes: list[int], listened: bool, complete: bool) -> tuple[bool, tuple[str, str] | None]:
        if codes == [0] * self.processes:  # to its end, or stopped as asked
            return complete, None
        if not self.struck:
            return False, ("wrong", f"exit codes {codes} without a signal")
        if self.number == signal.SIGTERM and listened and not complete:  # a process with nothing left to do no longer listens
            return False, ("wrong", f"{self}: exit codes {codes}")
        return False, None


def _terminate(children: list[int]) -> None:
    for child in children:
        if not ended(child):
            os.kill(child, signal.SIGTERM)


def wait(children: list[int]) -> int:
    """Until all have ended, those that wait for one that left with a fault terminated; how many had to be killed."""
    deadline = time.monotonic() + PATIENCE
    while not all(map(ended, children)) and time.monotonic() < deadline:
        time.sleep(0.005)
        if any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT).si_status for child in filter(ended, children)):
            time.sleep(0.1)
            _terminate(children)
    left = [child for child in children if not ended(child)]
    for child in left:
        os.kill(child, signal.SIGKILL)
    return len(left)


def _listening(file: Path) -> int:
    return file.read_text(errors="replace").count(LISTENING) if file.exists() else 0


def _tail(file: Path) -> str:
    return " | ".join(file.read_text(errors="replace").splitlines()[-12:])
