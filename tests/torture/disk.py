"""Disks that are full, refuse, are slow, or go while a stage works: one line says so, what was there stays, and with the fault gone the
same command ends in the bits of an undisturbed one.

Parts: `full`, `refusing`, `removed`, `slow`.
"""

import errno
import json
import os
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import torch
from processes import main, start, statuses
from torture.io_events import Event, Watch, ended
from torture.kills import counted, skipped, some
from torture.mounts import SmallDisk, no_mounts
from torture.restarts import PATIENCE, Undisturbed, undisturbed, wait
from torture.stages import STAGES, STEPS, TRAIN, Stage, prepared, run_to_the_end, said, slowed
from torture.tally import Effort, Tally

from vavae_fast.training import dit, saver
from vavae_fast.training.checkpoint import checkpoint_fault, checkpoints

ALONE = [(stage, 1) for stage in STAGES]
TRIED = [*ALONE, (TRAIN, 2)]
LEVELS = 10
ROOM = 1 << 26  # bytes: more than any of these stages needs
SAVE_SECONDS, SLOW_EVERY = 0.6, 4
# What a disk refuses, and the words by which one line says so.
REFUSED = {
    errno.ENOSPC: (("open", "write", "mkdir"), "No space left"),
    errno.EROFS: (("open", "write", "mkdir", "rename", "unlink", "chmod"), "Read-only"),
    errno.EIO: (("write", "sync"), "Input/output error"),
}


def run(effort: Effort) -> list[Tally]:
    return [*full(effort), *refusing(effort), *removed(effort), *slow(effort)]


class Trial:
    """One run of a stage, in a place of its own, that meets a fault."""

    def __init__(self, stage: Stage, processes: int, folder: Path, number: int, expected: Undisturbed, tally: Tally):
        self.stage, self.processes, self.folder, self.files, self.tally = stage, processes, folder, expected.files, tally
        self.name = f"{stage.name}-{processes}-{''.join(filter(str.isalpha, tally.fault))[:8]}-{number}"
        self.place = folder / self.name

    def start(self, inside: Callable[[], None] = lambda: None) -> list[int]:
        """Its processes; `inside` is called in each of them first."""

        def work() -> int:
            inside()
            return slowed(self.stage, self.folder, self.name)

        self.tally.tried += 1
        return start(self.processes, work, said(self.folder, self.name))

    def fail(self, kind: str, line: str) -> None:
        text = " | ".join(said(self.folder, self.name).read_text(errors="replace").splitlines()[-12:])
        self.tally.fail(kind, f"{self.name}: {line}; it said: {text}")

    def judge(self, children: list[int], fault: str, words: str, partial: bool = False) -> None:
        """It must end well, with all that it was to make unless `partial`, or with status 2 and one line that has one of `words`.

        Of several processes the main one must; the others may have been ended by what starts them.
        """
        if wait(children):
            statuses(children)
            self.fail("hung", f"{fault}: it had not ended after {PATIENCE:.0f} s")
            return
        codes, text = statuses(children), said(self.folder, self.name).read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        if codes == [0] * self.processes:
            if not partial and self.stage.made(self.place) != self.files:
                self.fail("wrong", f"{fault}: it left with 0, and without all that it was to make")
        elif codes[0] != 2 or len(lines) != 1 or not any(word in lines[0] for word in words.split("|")):
            self.fail("wrong", f"{fault}: exit codes {codes}, {len(lines)} lines of errors")
        elif self.processes == 1 and "Traceback" in text:
            self.fail("wrong", f"{fault}: a traceback")
        half = self.stage.fault(self.place, self.files)
        if half is not None and not partial:
            self.fail("wrong", f"{fault}: {half}")

    def mended(self, fault: str) -> None:
        """With the fault gone."""
        try:
            run_to_the_end(self.stage, self.folder, self.name, self.processes)
        except RuntimeError as error:
            self.tally.fail("lost", f"{self.name}: {fault}: does not go on: {' | '.join(str(error).splitlines()[-12:])}")
            return
        if self.stage.made(self.place) != self.files:
            self.fail("wrong", f"{fault}: afterwards it did not end in the bits of the undisturbed one")


def _begin(effort: Effort) -> Path:
    torch.set_num_threads(1)
    folder = effort.folder / "stages"
    return folder if folder.exists() else prepared(folder)


# -- full -------------------------------------------------------------------------------------------------------------


def full(effort: Effort) -> list[Tally]:
    """Room for a tenth, two tenths, … of what each stage needs; at every other level it is told of room that others then take."""
    tried = some(TRIED, effort, "full")
    rows = {(stage, n): Tally(f"full at {LEVELS} levels of fill: {stage.name}, {counted(n)}") for stage, n in tried}
    reason = no_mounts()
    if reason is not None:
        for row in rows.values():
            row.remark = f"not tried: {reason}"
        return list(rows.values())
    folder = _begin(effort)
    for (stage, processes), row in rows.items():
        draw = effort.draw(row.fault)
        expected = undisturbed(stage, folder, processes)
        peak = _most_used(stage, folder, processes)
        levels = sorted(draw.sample(range(LEVELS), min(LEVELS, effort.count(LEVELS))))
        for number in range(max(1, round(effort.size))):
            for level in levels:
                trial = Trial(stage, processes, folder, LEVELS * number + level, expected, row)
                _on_a_full_disk(trial, int(peak * (level + draw.random()) / LEVELS), surprise=level % 2 == 1)
    return list(rows.values())


def _on_a_full_disk(trial: Trial, room: int, surprise: bool) -> None:
    fault = f"room for {room:,} bytes{', told of more' if surprise else ''}"
    with SmallDisk(trial.place, ROOM) as disk:
        trial.stage.before(trial.folder, trial.place)
        disk.resize(disk.used() + max(room, 1))
        trial.judge(trial.start(_untold if surprise else lambda: None), fault, "No space left|are free; make room|File too large")
        disk.resize(ROOM)
        trial.mended(fault)
        _empty(trial.place)


def _untold() -> None:
    """In a child: it believes in room that is not there."""
    shutil.disk_usage = lambda path: namedtuple("usage", "total used free")(1 << 40, 0, 1 << 40)


def _empty(place: Path) -> None:
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _most_used(stage: Stage, folder: Path, processes: int) -> int:
    """Bytes that the stage has on the disk at its most, beside what it starts from."""
    name = f"{stage.name}-{processes}-measured"
    with SmallDisk(folder / name, ROOM) as disk:
        stage.before(folder, folder / name)
        before = most = disk.used()
        children = start(processes, lambda: slowed(stage, folder, name), said(folder, name))
        while not all(map(ended, children)):
            most = max(most, disk.used())
            time.sleep(0.0005)
        if any(statuses(children)):
            raise RuntimeError(said(folder, name).read_text())
    return max(most - before, 1 << 14)


# -- refusing ---------------------------------------------------------------------------------------------------------


def refusing(effort: Effort) -> list[Tally]:
    """From its first I/O event on, or from a random one, every call fails: no space, read-only, an I/O error."""
    rows = {number: Tally(f"{os.strerror(number)}, from the first or a random I/O event on, in each stage") for number in REFUSED}
    if skipped(list(rows.values())):
        return list(rows.values())
    folder = _begin(effort)
    for stage, processes in some(ALONE, effort, "refusing"):
        expected = undisturbed(stage, folder, processes)
        for number, row in rows.items():
            draw = effort.draw(f"{row.fault} {stage.name}")
            for trial in range(effort.count(5)):
                since = 1 if trial == 0 else draw.randint(2, expected.events)
                _on_a_refusing_disk(Trial(stage, processes, folder, trial, expected, row), number, since)
    return list(rows.values())


def _on_a_refusing_disk(trial: Trial, number: int, since: int) -> None:
    calls, words = REFUSED[number]
    fault = f"{errno.errorcode[number]} from I/O event {since} on"
    trial.stage.before(trial.folder, trial.place)
    whole: list[Path] = []

    def refuse(event: Event) -> int:
        if len(watch.events) + 1 < since or event.name not in calls:
            return 0
        if not whole:
            whole.extend(checkpoints(trial.place / "checkpoints"))
        return number

    watch = Watch(trial.place, refuse=refuse)
    children = trial.start(watch.join)
    attending = threading.Thread(target=watch.attend, args=(lambda: all(map(ended, children)),))
    attending.start()
    trial.judge(children, fault, words)
    attending.join()
    if whole and checkpoint_fault(whole[-1]) is not None:
        trial.fail("lost", f"{fault}: {whole[-1]} was there before: {checkpoint_fault(whole[-1])}")
    trial.mended(fault)


# -- removed ----------------------------------------------------------------------------------------------------------


def removed(effort: Effort) -> list[Tally]:
    """The folder that a stage writes into is removed at a random moment; the stage may end well, or in one line."""
    row = Tally("the folder removed at a random moment, in each stage")
    folder = _begin(effort)
    for stage, processes in some(ALONE, effort, "removed"):
        expected = undisturbed(stage, folder, processes)
        draw = effort.draw(f"{row.fault} {stage.name}")
        for number in range(effort.count(8)):
            _in_a_removed_folder(Trial(stage, processes, folder, number, expected, row), draw.uniform(0, expected.seconds))
    return [row]


def _in_a_removed_folder(trial: Trial, moment: float) -> None:
    fault = f"removed after {moment:.3f} s"
    trial.stage.before(trial.folder, trial.place)
    children = trial.start()
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline and not any(map(ended, children)):
        time.sleep(0.001)
    if trial.place.exists():
        shutil.rmtree(trial.place.rename(trial.place.with_name(f"{trial.name}.gone")))
    trial.judge(children, fault, "o such file|o such run folder|not a run folder|missing or not whole", partial=True)
    shutil.rmtree(trial.place, ignore_errors=True)
    trial.stage.before(trial.folder, trial.place)
    trial.mended(fault)


# -- slow -------------------------------------------------------------------------------------------------------------


def slow(effort: Effort) -> list[Tally]:
    """A disk that takes long for a save: the next steps do not wait for it, the next save does, and no third one is in memory."""
    row = Tally(f"a disk that takes {SAVE_SECONDS} s for a save: training waits for one at most")
    folder = _begin(effort)
    expected = undisturbed(TRAIN, folder, 1)
    for number in range(effort.count(4)):
        trial = Trial(TRAIN, 1, folder, number, expected, row)
        notes = folder / f"{trial.name}.json"

        def work(trial: Trial = trial, notes: Path = notes) -> int:
            return _noted(lambda: main([*TRAIN.words(folder, trial.name), f"train.ckpt_every={SLOW_EVERY}"]), notes)

        row.tried += 1
        trial.judge(start(1, work, said(folder, trial.name)), "slow", "nothing is refused")
        if notes.exists() and (line := _waits(json.loads(notes.read_text()))) is not None:
            trial.fail("wrong", line)
    return [row]


def _noted(train: Callable[[], int], notes: Path) -> int:
    """In a child: train on the slow disk, and note when each step began and when each save began and ended."""
    times: dict[str, list] = {"steps": [], "saves": []}
    step, save = dit.dit_step, saver.save_checkpoint

    def noted_step(state, number, batches):
        times["steps"].append(time.monotonic())
        return step(state, number, batches)

    def slow_save(folder, number, *rest):
        began = time.monotonic()
        time.sleep(SAVE_SECONDS)
        path = save(folder, number, *rest)
        times["saves"].append([number, began, time.monotonic()])
        return path

    dit.dit_step, saver.save_checkpoint = noted_step, slow_save
    code = train()
    notes.write_text(json.dumps(times))
    return code


def _waits(times: dict[str, list]) -> str | None:
    """Who waited for what it should not have waited for, or did not wait."""
    saves = times["saves"]
    if [number for number, *_ in saves] != list(range(SLOW_EVERY, STEPS + 1, SLOW_EVERY)):
        return f"saved at {[number for number, *_ in saves]}"
    for (number, began, ended_at), (_, next_began, _) in zip(saves, saves[1:]):
        if next_began < ended_at:
            return f"two saves at a time: the one of step {number} took from {began} to {ended_at}, the next began at {next_began}"
        if times["steps"][number + SLOW_EVERY - 1] > ended_at:  # the last step before the next save
            return f"the steps after {number} waited for its save"
    return None
