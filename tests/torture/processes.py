"""Processes that are killed, stopped, raise, leave, hang or do something else: the culprit is named, all end, no orphan is left, what was
promised is saved, and the same command goes on.

Parts: `worlds`, forked without a launcher, and `launched`, by torchrun.
"""

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import processes as forked
import torch
from torture.launching import launched
from torture.tally import Effort, Tally

from vavae_fast.data.streams import LatentStream
from vavae_fast.training import dit
from vavae_fast.training.checkpoint import checkpoint_fault, checkpoints
from vavae_fast.training.reduction import Reduction

HANG = 3.0  # train.hang_seconds
AFTER = 10.0  # seconds from detection to the end of all
PATIENCE = 60.0
SETTINGS = ("train.max_steps=100000", "train.ckpt_every=4", "train.keep_last=2", f"train.hang_seconds={HANG}", "log.layers_every=null")


def run(effort: Effort) -> list[Tally]:
    return [*worlds(effort), *launched(effort)]


@dataclass(frozen=True)
class Fault:
    """What one rank does at a step, and what must come of it. `said`: with {rank}, what the run says; codes are of the rank, of the others."""

    name: str
    strike: Callable[[int], None]  # at a step, in the rank: now, or by changing what it does then
    said: str
    codes: tuple[int | None, int] = (None, 1)
    hangs: bool = False  # noticed after HANG
    ranks: int = 2
    every: tuple[int, ...] = (1, 4)  # train.log_every: one of them


def at(step: int, act: Callable[[], None]) -> None:
    """In this process, `act` when training comes to `step`."""
    real = dit.dit_step

    def acting(state, number, micro_batches):
        if number == step:
            act()
        return real(state, number, micro_batches)

    dit.dit_step = acting


def dies_by(number: int) -> Callable[[int], None]:
    return lambda step: at(step, lambda: os.kill(os.getpid(), number))


def raises(step: int) -> None:
    def act():
        raise KeyError("a fault of ours")

    at(step, act)


def skips_a_sum(step: int) -> None:
    real, calls = Reduction.across, []

    def across(self, values):
        calls.append(None)
        return values if len(calls) == step + 1 else real(self, values)

    Reduction.across = across


def skips_a_step(step: int) -> None:
    """With all of its collectives: it goes on to the next while the others make this one."""
    from vavae_fast.distributed import World

    real, agree, skipped = dit.dit_step, World.agree, []

    def acting(state, number, micro_batches):
        if number == step:
            skipped.append(number)
            return {"loss": torch.ones(()), "grad_norm": torch.ones(())}
        return real(state, number, micro_batches)

    def agreeing(self, number, stop, fault=None):
        return False if number - 1 in skipped else agree(self, number, stop, fault)

    dit.dit_step, World.agree = acting, agreeing


def reads(act: Callable[[], None]) -> Callable[[int], None]:
    """`act` in the loader's thread, at the samples of a step."""

    def strike(step):
        real = LatentStream._read

        def reading(self, positions):
            if positions[0] >= step * 8:
                act()
            return real(self, positions)

        LatentStream._read = reading

    return strike


def reads_others(step: int) -> None:
    real = LatentStream._read
    LatentStream._read = lambda self, positions: real(self, positions + 8 * (positions[0] >= step * 8))


def hangs() -> None:
    time.sleep(1000)


def fails() -> None:
    raise OSError(5, "Input/output error")


FAULTS = (
    Fault("killed", dies_by(signal.SIGKILL), r"rank {rank} \(process {pid} on \S+\) has ended without a word", (-signal.SIGKILL, 1)),
    Fault("stopped (SIGSTOP)", dies_by(signal.SIGSTOP), r"rank {rank} \(process {pid} on \S+\) has given no sign", (-signal.SIGKILL, 1), True),
    Fault("raises", raises, r"rank {rank} \(process {pid} on \S+\) has ended of KeyError: 'a fault of ours'", (1, 1)),
    Fault("exits with 0", lambda step: at(step, lambda: os._exit(0)), r"rank {rank} \(process {pid} on \S+\) has ended without a word", (0, 1)),
    Fault("deadlocked", lambda step: at(step, hangs), r"rank {rank} \(process {pid} on \S+\) has stood for .* at step {after}", (1, 1), True),
    Fault("leaves out a sum of gradients", skips_a_sum, r"rank {rank} \(process {pid} on \S+\) has stood for .* at step {after}", (1, 1), True),
    Fault("leaves out a step, of three ranks", skips_a_step, r"rank {rank} is out of step", (1, 1), ranks=3, every=(1000,)),
    Fault("leaves out a step at a line, of three ranks", skips_a_step, r"rank {rank} .*(has ended|is out of)", (None, 1), ranks=3, every=(1,)),
    Fault("trains on other samples", reads_others, r"rank {rank}: was given other samples than its own", (1, 1)),
    Fault("its loader hangs", reads(hangs), r"rank {rank} .* has stood for .*waits for its samples of the run's order from {first} on", (1, 1), True),
    Fault("its loader fails", reads(fails), r"rank {rank} .* has ended of BadInput: its samples of the run's order from {first} on: cannot", (2, 1)),
)


def worlds(effort: Effort) -> list[Tally]:
    torch.set_num_threads(1)
    folder = effort.folder / "worlds"
    forked.begin(folder)
    rows = []
    plan = [(fault.name, fault) for fault in FAULTS] + [(name, None) for name in ASKED]
    for name, fault in plan if effort.size >= 0.1 else effort.draw("worlds").sample(plan, 2):
        row = Tally(f"one rank {name}" if fault else name)
        slowest = 0.0
        for trial in range(effort.count(6)):
            row.tried += 1
            draw = effort.draw(f"{name} {trial}")
            run_name = f"{re.sub('[^a-z]+', '_', name.lower())}{trial}"
            try:
                slowest = max(slowest, strike(fault, folder, run_name, draw) if fault else ASKED[name](folder, run_name, draw))
                continues(folder, run_name)
            except Wrong as error:
                row.fail(error.kind, f"--seed {effort.seed}, {name}, trial {trial}: {error}")
        row.remark = f"all ended {slowest:.1f} s after it was noticed, at most"
        rows.append(row)
    return rows


class Wrong(Exception):
    """Not what is promised; `kind` as Tally counts it."""

    def __init__(self, line: str, kind: str = "wrong"):
        super().__init__(line)
        self.kind = kind


def strike(fault: Fault, folder: Path, name: str, draw: random.Random) -> float:
    """One world, one fault. Seconds from when it could be noticed to the end of all; `Wrong` when it is not as promised."""
    step, rank, said, moment = draw.randrange(5, 15), draw.randrange(fault.ranks), folder / f"{name}.txt", folder / f"{name}.moment"
    size = 8 * fault.ranks // 2
    every = draw.choice(fault.every)

    def process() -> int:
        if int(os.environ["RANK"]) == rank:
            fault.strike(step)
            at(step, moment.touch)
        return forked.main(forked.words(folder, name, *SETTINGS, f"train.global_batch_size={size}", f"train.log_every={every}"))

    children = forked.start(fault.ranks, process, said)
    codes, ended = ends(children)
    text = said.read_text() + read(folder / name / "log.txt")
    if codes is None:
        raise Wrong(f"not all ended: {text[-1500:]}", "hung")
    expected = [fault.codes[0] if k == rank else fault.codes[1] for k in range(fault.ranks)]
    what = f"rank {rank} at step {step}, exit codes {codes}"
    if any(want is not None and want != code for want, code in zip(expected, codes)):
        raise Wrong(f"{what}, not {expected}: {text[-1500:]}")
    share = size // fault.ranks
    pattern = fault.said.format(rank=rank, pid=children[rank], after=step + 1, first=f"{step * size + rank * share:,}")
    if not re.search(pattern, text):
        raise Wrong(f"{what}: {pattern!r} is not said: {text[-1500:]}")
    stacks = [re.search(rf"rank {k} \(process {child} on \S+\) at step", text) for k, child in enumerate(children)]
    if fault.hangs and "has stood" in text and not all(stacks):
        raise Wrong(f"{what}: a stack is missing: {text[-3000:]}")
    begun = (moment if moment.exists() else folder / name / "metrics.jsonl").stat().st_mtime  # a loader strikes before its samples are asked for
    after = ended - begun - (HANG if fault.hangs else 0.0)
    if after > AFTER:
        raise Wrong(f"{what}: {after:.1f} s from detection to the end", "hung")
    return max(after, 0.0)


def ends(children: list[int], patience: float = PATIENCE) -> tuple[list[int] | None, float]:
    """Exit codes of all, None where some had to be killed; and when the last one ended."""
    watchdog = threading.Timer(patience, lambda: [os.kill(child, signal.SIGKILL) for child in children if not gone(child)])
    watchdog.start()
    codes = forked.statuses(children)
    late = not watchdog.is_alive()
    watchdog.cancel()
    return (None if late else codes), time.time()


def gone(child: int) -> bool:
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def continues(folder: Path, name: str) -> None:
    """What has a checkpoint's name is whole, and one process goes on from the newest."""
    found = checkpoints(folder / name / "checkpoints")
    faults = [fault for path in found if (fault := checkpoint_fault(path)) is not None]
    if faults:
        raise Wrong(f"{name}: {faults}", "lost")
    newest = int(found[-1].name[5:]) if found else 0
    said = folder / f"{name}_again.txt"
    size = "train.global_batch_size=12" if "three" in name else "train.global_batch_size=8"
    again = forked.words(folder, name, *SETTINGS, f"train.max_steps={newest + 2}", size)
    (code,) = forked.statuses(forked.start(1, lambda: forked.main(again), said))
    if code or not (folder / name / "checkpoints" / f"step_{newest + 2:08d}" / "manifest.json").is_file():
        raise Wrong(f"{name}: does not go on from step {newest}: {said.read_text()[-1000:]}", "lost")
    if newest and f"continues from {found[-1]}" not in said.read_text():
        raise Wrong(f"{name}: began elsewhere than at step {newest}", "lost")


# -- what is asked for -------------------------------------------------------------------------------------------------


def stopped_by(number: int, both: bool) -> Callable[[Path, str, random.Random], float]:
    """A signal to one worker, or to both as a scheduler sends it: all save the same step and leave with 0."""

    def ask(folder: Path, name: str, draw: random.Random) -> float:
        said = folder / f"{name}.txt"
        children = forked.start(2, lambda: forked.main(forked.words(folder, name, *SETTINGS)), said)
        wait_for(lambda: "step 2/" in read(folder / name / "log.txt"), children)
        time.sleep(draw.uniform(0, 0.5))
        begun = time.time()
        for child in children if both else [draw.choice(children)]:
            os.kill(child, number)
        codes, ended = ends(children)
        log = read(folder / name / "log.txt")
        found = re.search(r"saved step (\d+) in", log)
        if codes != [0, 0] or not found:
            raise Wrong(f"exit codes {codes}: {said.read_text()[-1500:]}", "hung" if codes is None else "wrong")
        newest = checkpoints(folder / name / "checkpoints")[-1]
        if newest.name != f"step_{int(found[1]):08d}" or checkpoint_fault(newest) is not None:
            raise Wrong(f"said {found[0]!r}, the newest checkpoint is {newest.name}", "lost")
        return ended - begun

    return ask


def second_job(folder: Path, name: str, draw: random.Random) -> float:
    """It is refused with who holds the folder; the first one does not notice."""
    settings = (*SETTINGS, "train.max_steps=60")
    first = forked.start(2, lambda: forked.main(forked.words(folder, name, *settings)), folder / f"{name}.txt")
    wait_for(lambda: "step 2/" in read(folder / name / "log.txt"), first)
    said = folder / f"{name}_second.txt"
    count = draw.choice((1, 2))
    codes, _ = ends(forked.start(count, lambda: forked.main(forked.words(folder, name, *settings)), said))
    if codes is None or codes[0] != 2 or 0 in codes or f"in use by process {first[0]} on " not in said.read_text():
        raise Wrong(f"the second job: {codes}: {said.read_text()[-1500:]}", "hung" if codes is None else "wrong")
    codes, _ = ends(first)
    if codes != [0, 0]:
        raise Wrong(f"the first job: {codes}: {read(folder / f'{name}.txt')[-1500:]}")
    return 0.0


ASKED: dict[str, Callable[[Path, str, random.Random], float]] = {
    "SIGTERM to one worker of two": stopped_by(signal.SIGTERM, both=False),
    "SIGUSR1 to one worker of two": stopped_by(signal.SIGUSR1, both=False),
    "SIGTERM to both workers": stopped_by(signal.SIGTERM, both=True),
    "two jobs in one run folder": second_job,
}


def wait_for(condition: Callable[[], bool], children: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline or any(map(gone, children)):
            ends(children, 1.0)
            raise Wrong("it did not come to train")
        time.sleep(0.02)


def read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
