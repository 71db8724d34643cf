"""The training loop, the same for both stages: step, log, save, stop, go on.

A stage brings a state (what is trained and saved) and a step (what is done with a batch). The loop brings the rest:
resume from the newest complete checkpoint, means since the last log line read with one host sync, checkpoints saved in
the background, SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) answered by a checkpoint.
"""

import copy
import math
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vavae_fast.data.streams import Share
from vavae_fast.distributed import STEP_TIMEOUT, World
from vavae_fast.errors import BadInput
from vavae_fast.training.checkpoint import Groups, checkpoints, latest_checkpoint, load_checkpoint, sweep
from vavae_fast.training.guard import Guard
from vavae_fast.training.heartbeat import Heart
from vavae_fast.training.log import RunLog
from vavae_fast.training.postmortem import dissect
from vavae_fast.training.saver import Retention, Saver


class State(Protocol):
    """What a stage trains."""

    guard: Guard

    def groups(self) -> Groups:
        """File name -> named tensors: everything a checkpoint holds."""

    def load_groups(self, groups: Groups, source: str) -> None:
        """Put back what `groups` gave."""

    def learning_rate(self, step: int) -> float: ...


@dataclass(frozen=True)
class LoopSettings:
    """How long, how often, where."""

    folder: Path
    max_steps: int
    global_batch: int
    log_every: int
    ckpt_every: int
    keep: Retention
    facts: dict[str, Any]  # into every checkpoint's manifest
    peak_images_per_second: float | None = None  # at which the model's own FLOPs would fill all devices; None: not known, no MFU
    stages: Mapping[str, int] = field(default_factory=dict)  # a run's parts in their order and the steps done at their ends; none: it has no parts

    share: Share | None = None  # what this process takes of each step's samples, which is then watched; None: batches are not of the run's order
    hang_seconds: float = 300.0  # that a process may give no sign of life, or a step may take, before the run ends; 0: for ever

    def stage(self, step: int) -> str | None:
        """The name of the part that the step number `step`, counted from 1, belongs to."""
        return next((name for name, end in self.stages.items() if step <= end), None)


@dataclass(frozen=True)
class Observer:
    """What is looked at every `every` steps and at the end of a stage and of the run, on every process: held-out loss, samples. It trains nothing."""

    every: int
    look: Callable[[int], dict[str, float]]  # steps done -> values for the log line


class StopSignal:
    """A signal to stop, noticed and not yet answered; the old handlers come back on exit."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> "StopSignal":
        self.name: str | None = None
        self.old = {s: signal.signal(s, self._notice) for s in self.SIGNALS}
        return self

    def _notice(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


def resume(state: State, folder: Path, world: World, log: RunLog) -> int:
    """Load the newest complete checkpoint of a run into `state`; returns its step, 0 when the run has none.

    The main process verifies, and sweeps away what a killed one left; all load the same. `BadInput` when there are checkpoints
    and all are damaged: to begin again must be the user's choice.
    """
    newest, damaged = world.from_main(_newest(folder, log) if world.main else None)
    if newest is None:
        if damaged:
            raise BadInput(f"{folder}: none of its {damaged} checkpoints is whole; bring one back, or remove the folder to begin again")
        return 0
    groups, manifest = load_checkpoint(newest, verify=False)
    state.load_groups(groups, str(newest))
    before = manifest.get("processes", world.size)
    differs = f", with {world.size} processes instead of {before}: the same samples and noise"
    log.say(f"continues from {newest}{differs if before != world.size else ''}")
    return manifest["step"]


def _newest(folder: Path, log: RunLog) -> tuple[Path | None, int]:
    """The newest checkpoint that verifies; without one, how many complete ones do not."""
    sweep(folder)
    newest = latest_checkpoint(folder, log.say)
    return newest, 0 if newest else sum((path / "manifest.json").is_file() for path in checkpoints(folder))


def train(
    state: State,
    step: Callable[[State, int, list[Any]], dict[str, Tensor]],
    batches: Callable[[int], Iterator[list[Any]]],
    settings: LoopSettings,
    world: World,
    log: RunLog,
    start: int,
    gradients: Callable[[State, int, list[Any]], dict[str, Tensor]],
    observers: Sequence[Observer] = (),
    after_save: Callable[[], None] = lambda: None,
) -> int:
    """Run steps `start` to `max_steps`; `batches(n)` gives each step's micro-batches from the n-th on. Returns the number of steps done.
    `gradients` does what `step` does up to p.grad, and changes nothing else: asked for when a run ends because they are not finite.

    A line is logged every `log_every` steps; what an observer sees between two has a line of its own, so that nothing but
    `log_every` sets the windows that lines and guards read. The time that observers take is no training time. A stage ends with a line
    and a checkpoint, which it waits for.
    Where the loss of a line leaps up, the run goes back to a checkpoint from before that line, and on with batches not seen yet.
    """
    meter = _Meter(settings.global_batch, settings.peak_images_per_second)
    checkpoint_folder = settings.folder / "checkpoints"
    done = logged = start
    stage = None
    # Saver and heart are made together with the other processes; a signal that comes while those do not is not to be put off.
    saver = Saver(checkpoint_folder, world, settings.facts, settings.keep, log.say)
    heart = Heart(settings.folder, world, settings.hang_seconds)
    with saver, StopSignal() as stop, heart, _Feed(batches, settings.share, world.device) as feed:
        feed.begin(start + state.guard.passed_over)
        while done < settings.max_steps:
            done += 1
            if settings.stage(done) != stage:
                stage = settings.stage(done)
                log.say(f"stage {stage}: to step {settings.stages[stage]:,}")
            heart.at(done, f"waits for {feed.awaited()}")
            with meter.waiting():
                micro_batches = feed.next()
            heart.at(done, "trains")
            meter.add(step(state, done - 1, micro_batches))
            if done == start + 1:
                world.steps_begin(max(STEP_TIMEOUT, timedelta(seconds=2 * settings.hang_seconds)))
                heart.steps_begin()
            ends = done == settings.max_steps or done in settings.stages.values()
            line_due = done % settings.log_every == 0 or ends
            # Before any other collective than those of the step, which must not meet one of another kind.
            stopped = world.agree(done, saver.check() or stop.name is not None, feed.fault() if line_due else None)
            place = {"step": done} | ({"stage": stage} if stage else {})
            seen = _look(observers, done, ends, meter, heart)
            if seen and not line_due:
                log.values(place | seen)
            if line_due:
                values = meter.read(world) | {"lr": state.learning_rate(done - 1), "skipped": float(state.guard.skipped)} | seen
                log.step(place | values, settings.max_steps, meter.seconds_a_step * (settings.max_steps - done))
                if state.guard.exhausted():
                    whose = dissect(state, gradients(state, done - 1, micro_batches), {"step": done}, log)
                    raise state.guard.verdict(done, settings.global_batch, whose)
                watched = values[state.guard.watches]
                state.guard.pulse.feel(done, done - logged, values.get("grad_norm", math.nan), watched)
                if state.guard.spiked(watched) and (target := _go_back(state, done, logged, watched, saver, world, log)) is not None:
                    done = logged = target
                    feed.begin(done + state.guard.passed_over)
                    meter.restart()
                    continue
                logged = done
                meter.restart()
            if done % settings.ckpt_every == 0 or ends or stopped:
                heart.at(done, "saves", limited=False)
                saver.save(done, state.groups())
                if ends or stopped:
                    saver.finish()
                after_save()
            if stopped:
                who = stop.name or "another process was stopped"
                log.say(f"{who}: saved step {done} in {checkpoint_folder}; the same command continues from there")
                return done
    return settings.max_steps


def _look(observers: Sequence[Observer], done: int, ends: bool, meter: "_Meter", heart: Heart) -> dict[str, float]:
    """The values of those that are due."""
    seen: dict[str, float] = {}
    for observer in observers:
        if done % observer.every == 0 or ends:
            heart.at(done, "looks at what it has learnt", limited=False)
            with meter.paused():
                seen |= observer.look(done)
            heart.at(done, "trains")
    return seen


def _go_back(state: State, done: int, logged: int, value: float, saver: Saver, world: World, log: RunLog) -> int | None:
    """Load the newest whole checkpoint of step `logged`, the last good line's, or before, and drop those after it. Returns its step.

    None, and nothing done, without one. `BadInput` when the run has gone back as often as it may.
    """
    saver.settle()
    spike = f"the {state.guard.watches} leapt to {value:.4g} at step {done}"
    if state.guard.rollbacks >= state.guard.max_rollbacks:
        raise BadInput(
            f"{saver.folder.parent}: {spike}, for the {state.guard.rollbacks + 1}. time; lower the learning rate, clip gradients "
            "(max_grad_norm), for LightningDiT set model.use_qknorm=true, or train.max_rollbacks=0 to go on all the same"
        )
    target = world.from_main(saver.rewind(logged) if world.main else None)
    if target is None:
        log.say(f"{spike}; there is no checkpoint from before, so the run goes on")
        return None
    groups, manifest = load_checkpoint(target, verify=False)
    before = copy.copy(state.guard)
    state.load_groups(groups, str(target))
    state.guard.went_back(before, done - manifest["step"])
    log.forget_after(manifest["step"])
    log.say(f"{spike}: back to {target}, and past the batches since ({state.guard.rollbacks}. of {state.guard.max_rollbacks} times)")
    return manifest["step"]


class _Feed:
    """The steps' micro-batches, from where `begin` says; closes what it leaves. Counts the samples, beside those that it must bring."""

    def __init__(self, batches: Callable[[int], Iterator[list[Any]]], share: Share | None, device: torch.device):
        self.batches, self.share, self.device = batches, share, device
        self.steps: Iterator[list[Any]] = iter(())

    def begin(self, step: int) -> None:
        self.__exit__()
        self.steps = self.batches(step)
        self.step = step
        self._count_from_here()

    def next(self) -> list[Any]:
        """The coming step's. `BadInput` names its samples where the disk does not give them; what is wrong with their content names itself."""
        try:
            micro_batches = next(self.steps)
        except OSError as error:
            raise BadInput(f"{self.awaited()}: cannot be read ({error}); look after the disk, and start the same command again") from error
        self.step += 1
        for batch in micro_batches if self.share is not None else ():
            self.sum += batch.index.sum()
        return micro_batches

    def awaited(self) -> str:
        """The samples of the coming step, for who waits for them."""
        if self.share is None:
            return f"batch {self.step:,}"
        return f"its samples of the run's order from {next(self.share.positions(self.step))[0]:,} on"

    def fault(self) -> str | None:
        """What is wrong with the samples since the last call: their places in the run's order must be this process's. One host sync, which
        waits for nothing where a log line has been read."""
        if self.share is None:
            return None
        first, found = self.counted, int(self.sum)
        batches = islice(self.share.positions(first), self.share.batches_per_step * (self.step - first))
        expected = sum(int(positions.sum()) for positions in batches)
        steps = self.step - first
        self._count_from_here()
        wrong = f"was given other samples than its own, in the {steps} steps from step {first:,} of the run's order on"
        return f"{wrong} (their places add up to {found:,}, not {expected:,})" if found != expected else None

    def _count_from_here(self) -> None:
        self.counted, self.sum = self.step, torch.zeros((), dtype=torch.int64, device=self.device)

    def __enter__(self) -> "_Feed":
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self.steps, "close"):
            self.steps.close()


class _Meter:
    """Means of a step's values since the last reading, kept on the device; rates by the wall clock.

    `seconds_a_step` is the pace for the time left: all that happens between steps counts, what comes before the first reading
    (compilation) only until the second.
    """

    def __init__(self, global_batch: int, peak_images_per_second: float | None = None):
        self.global_batch, self.peak_images_per_second = global_batch, peak_images_per_second
        self.seconds_a_step = 0.0
        self.paced_from, self.paced_steps = None, 0
        self.restart()

    def restart(self) -> None:
        """Begin a window now."""
        self.sums: dict[str, Tensor] = {}
        self.steps, self.waited, self.started = 0, 0.0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside takes no time of the window. Waits for the device, which may be steps behind."""
        _wait_for_device()
        paused = time.perf_counter()
        yield
        _wait_for_device()
        self.started += time.perf_counter() - paused

    def waiting(self) -> "_Meter":
        return self

    def __enter__(self) -> None:
        self.wait_started = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.waited += time.perf_counter() - self.wait_started

    def add(self, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.steps += 1

    def read(self, world: World) -> dict[str, float]:
        """Means over the steps since the window began and over all processes: one host sync."""
        # fp64, divided at the end: the mean of what is the same on all processes is that, however many they are.
        means = (world.mean(torch.stack([value.double() for value in self.sums.values()])) / self.steps).tolist()
        now = time.perf_counter()
        seconds = now - self.started
        self._pace(now, seconds)
        rate = self.global_batch * self.steps / seconds
        rates = {"images_per_second": rate, "data_wait": self.waited / seconds, "seconds": seconds, "memory_gb": _peak_memory() / 1e9}
        if self.peak_images_per_second is not None:
            rates["mfu"] = rate / self.peak_images_per_second
        return dict(zip(self.sums, means)) | rates

    def _pace(self, now: float, seconds: float) -> None:
        self.paced_steps += self.steps
        if self.paced_from is not None:
            self.seconds_a_step = (now - self.paced_from) / self.paced_steps
        else:
            self.seconds_a_step = seconds / self.steps
            self.paced_from, self.paced_steps = now, 0


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_memory() -> int:
    """Bytes: the most that PyTorch held on the GPU, or this process's largest resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
