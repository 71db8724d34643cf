"""Heartbeats: every process says in a file where it stands and watches where the others do. A hang ends the run, with every stack in log.txt
and the name of whoever is behind.

A thread beats. It does not run where its process is stopped (SIGSTOP), its machine gone, or the interpreter lock held by some library: then
the others see no beat. Where the main thread alone hangs, in a deadlock, at a disk, in a collective, its own process sees it; and of all
that stand still the one behind has begun the fewest steps, and of these the fewest collectives.

Time is counted in beats, not by clocks: what was stopped as a whole and goes on (a laptop's lid, a frozen container), or waited for the disk
on which the files lie, has missed none. Files are written in place, so that a full disk stops none.
"""

import faulthandler
import fcntl
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from vavae_fast.distributed import START_TIMEOUT, World, record_fault
from vavae_fast.errors import Interrupted, PeerFault

PERIOD = 2.0  # seconds from beat to beat, at most
MISSED = 3  # beats after which a process that has ended is missed by those whose collectives have not failed of it
GOES_ON = "The same command continues from the newest checkpoint"
_RECORD = 4096  # bytes of a file


@dataclass(frozen=True)
class Beat:
    """Where a process stands: what its file holds, as JSON padded with spaces."""

    run: str  # one start of a run: files of another say nothing
    rank: int
    process: int
    host: str
    began: int | None  # the process's own, in the kernel's ticks, since its number may be another's later; None where that is not told
    beat: int = 0
    step: int = 0
    collectives: int = 0  # begun in the default group
    doing: str = "starts"
    limited: bool = True  # whether it may take only so long over that
    ended: str | None = None  # by which error
    fell: bool = False  # that came of another's end

    def who(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"

    def where(self) -> str:
        return f"step {self.step:,}, where it {self.doing}, after {self.collectives:,} collectives"

    def place(self) -> tuple[int, int]:
        return self.step, self.collectives

    def gone(self, host: str) -> bool:
        """Whether the process is known to have ended: it said so, or it was on this `host` and is no more."""
        return self.ended is not None or (self.host == host and _began(self.process) != self.began)


class Heart:
    """Beats while a run trains; `at` says where. On leaving, an error that came of another process's end becomes one that names it."""

    def __init__(self, folder: Path, world: World, patience: float):
        """`patience`: seconds after which a process without a beat, or a step without end, ends the run; 0: none does."""
        self.folder, self.world, self.patience = folder, world, patience
        self.period = min(PERIOD, patience / 10) if patience else PERIOD
        self.least = START_TIMEOUT.total_seconds() if world.size > 1 else math.inf  # of a limit, until steps begin
        host, process = socket.gethostname(), os.getpid()
        run = world.from_main(f"{host} {process} {time.time_ns()}")
        self.own = Beat(run, world.rank, process, host, _began(process))
        self.others: dict[int, Beat] = {}
        self.silent = {rank: 0 for rank in range(world.size) if rank != world.rank}  # beats missed
        self.still = 0.0  # seconds, by beats, that the main thread has been where it is
        self.since, self.longest = time.monotonic(), 0.0  # when it came there; the longest that it was anywhere with a limit
        self.over, self.ending = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def at(self, step: int, doing: str, limited: bool = True) -> None:
        """The main thread begins `doing` something of step `step`; unless `limited` it may take as long as it likes."""
        now = time.monotonic()
        if self.own.limited:
            self.longest = max(self.longest, now - self.since)
        self.since, self.still = now, 0.0
        self.own = replace(self.own, step=step, doing=doing, limited=limited)

    def steps_begin(self) -> None:
        """From here on the patience holds: what a first step compiles is done. As World.steps_begin."""
        self.least = self.patience

    def __enter__(self) -> "Heart":
        folder = self._path(self.world.rank).parent
        folder.mkdir(parents=True, exist_ok=True)
        self.log: BinaryIO = open(self.folder / "log.txt", "ab", 0)
        self.file = os.open(self._path(self.world.rank), os.O_RDWR | os.O_CREAT, 0o644)
        self._write()
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None and self.ending.is_set():
            self.thread.join()  # which ends the process, once it has said of what: this error is of that, or of how another ended for it
        self.over.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()
        lost = self._lost() if error is not None and _of_a_collective(error) and self.world.size > 1 else None
        if error is None or isinstance(error, Interrupted):
            self._clear_away()
        else:
            why = _ended(lost) if lost is not None else f"{type(error).__name__}: {error}"
            self.own = replace(self.own, ended=" ".join(why.split())[:300], fell=_of_a_collective(error))
            self._write()
        os.close(self.file)
        if lost is not None:
            line = f"{_ended(lost)}. {GOES_ON}"
            if self.world.rank == min({*self.silent, self.world.rank} - {lost.rank}):
                self._note(line)
            raise PeerFault(line) from error
        self.log.close()

    # -- files --------------------------------------------------------------------------------------------------------

    def _path(self, rank: int) -> Path:
        return self.folder / "heartbeats" / f"rank{rank:03d}.json"

    def _write(self) -> None:
        self.own = replace(self.own, collectives=self.world.collectives(), beat=self.own.beat + 1)
        try:
            os.pwrite(self.file, json.dumps(asdict(self.own)).encode().ljust(_RECORD - 1) + b"\n", 0)
        except OSError:  # a fault of the disk, of which the checkpoints speak
            return

    def _read(self, rank: int) -> Beat | None:
        """None: not there, of another start, or just being written."""
        try:
            beat = Beat(**json.loads(self._path(rank).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        return beat if beat.run == self.own.run else None

    def _clear_away(self) -> None:
        try:
            self._path(self.world.rank).unlink(missing_ok=True)
            self._path(self.world.rank).parent.rmdir()
        except OSError:  # files of the others, who will do it, or the folder is no more
            return

    def _note(self, text: str) -> None:
        with suppress(OSError):  # a full disk stops no verdict
            self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n".encode())

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _beat_on(self) -> None:
        while not self.over.wait(self.period):
            self._write()
            if self.patience and math.isfinite(self.least):
                faulthandler.dump_traceback_later(self.least, file=self.log)  # if the interpreter lock keeps this thread, not that one
            self.still += self.period
            self._look_around()
            if self.patience:
                self._judge()

    def _look_around(self) -> None:
        for rank in self.silent:
            beat, before = self._read(rank), self.others.get(rank)
            if beat is not None:  # else nothing is known of it now
                self.silent[rank] = self.silent[rank] + 1 if before is not None and beat.beat == before.beat else 0
                self.others[rank] = beat

    def _judge(self) -> None:
        mute = any(beats * self.period >= self.least for beats in self.silent.values())
        busy = any(not beat.limited for beat in (self.own, *self.others.values()))
        if self._gone() or mute or (self.still >= max(self.least, 2 * self.longest) and not busy):
            self._end(self.still)

    def _gone(self) -> list[int]:
        """Those that have ended, who did so first before who fell with them."""
        gone = [rank for rank, beats in self.silent.items() if beats >= MISSED and self.others[rank].gone(self.own.host)]
        return sorted(gone, key=lambda rank: self.others[rank].fell)

    def _end(self, waited: float) -> None:
        """Leave this process's stacks and, when the others had the time to leave theirs, the verdict; then end."""
        self.ending.set()
        self._leave_stacks()
        if not self._beat_for(2):  # the main thread has come to a good end after all
            return
        gone = self._gone()
        mute = [rank for rank, beats in self.silent.items() if beats >= MISSED and rank not in gone]
        line = self._verdict(gone, mute, waited)
        if self.world.rank == min(set(range(self.world.size)) - {*gone, *mute}):
            self._note(line)
            print(f"error: {line}", file=sys.stderr, flush=True)
        elif not self._beat_for(3):  # nobody ends before it is said of what
            return
        if self.world.size > 1:
            record_fault(PeerFault(line))
        for rank in mute:
            self._end_stopped(self.others[rank])
        os._exit(1)

    def _beat_for(self, beats: int) -> bool:
        """Whether the run is not over meanwhile."""
        for _ in range(beats):
            if self.over.wait(self.period):
                return False
            self._write()
            self._look_around()
        return True

    def _verdict(self, gone: list[int], mute: list[int], waited: float) -> str:
        every = [replace(self.own, collectives=self.world.collectives()), *self.others.values()]
        furthest = max(every, key=Beat.place)
        behind = self.others[(gone + mute)[0]] if gone or mute else min(every, key=Beat.place)
        if gone:
            what = _ended(behind)
        elif mute:
            what = f"{behind.who()} has given no sign of life for {self.silent[behind.rank] * self.period:.0f} s, since {behind.where()}"
        else:
            what = f"{behind.who()} has stood for {waited:.0f} s at {behind.where()}"
        if behind.place() < furthest.place():
            what += f"; {furthest.who()} is at {furthest.where()}"
        elif self.world.size > 1 and not gone and not mute:
            what += "; so have all"
        return f"{what}. Stacks are in {self.folder / 'log.txt'}. {GOES_ON}"

    def _leave_stacks(self) -> None:
        """Of all threads, to the end of log.txt, one process after the other."""
        try:
            fcntl.flock(self.log, fcntl.LOCK_EX)
            self._note(f"{self.own.who()} at {self.own.where()}:")
            faulthandler.dump_traceback(self.log, all_threads=True)
            fcntl.flock(self.log, fcntl.LOCK_UN)
        except OSError:  # no room, or a file system without locks
            faulthandler.dump_traceback(self.log, all_threads=True)

    def _end_stopped(self, beat: Beat) -> None:
        """A stopped process of this machine would keep the launcher waiting: what it is sent stops with it, but for this."""
        if beat.host == self.own.host and beat.began is not None and _began(beat.process) == beat.began:
            os.kill(beat.process, signal.SIGKILL)

    def _lost(self) -> Beat | None:
        """After a collective failed, the process that has ended; looks for as long as it takes to miss one of another machine."""
        for _ in range(MISSED):
            self._look_around()
            gone = [beat for beat in self.others.values() if beat.gone(self.own.host)]
            if first := [beat for beat in gone if not beat.fell]:
                return first[0]
            time.sleep(1.5 * self.period)
        return gone[0] if gone else next((self.others[rank] for rank, beats in self.silent.items() if beats >= MISSED - 1), None)


def _ended(beat: Beat) -> str:
    how = f" of {beat.ended}" if beat.ended else " without a word"
    return f"{beat.who()} has ended{how}, last seen at {beat.where()}"


def _of_a_collective(error: BaseException) -> bool:
    """Whether it was raised by one: a lost connection, most often. What was found wrong by agreement has named its culprit."""
    if not isinstance(error, RuntimeError) or isinstance(error, PeerFault):
        return False
    return any("distributed" in frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))


def _began(process: int) -> int | None:
    """When a process began, by the kernel (Linux), in its ticks; None: there is none, or it has ended and is not waited for yet."""
    try:  # fields from the third on; the second is a name, which may hold anything
        status, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if status in "ZX" else int(fields[18])
