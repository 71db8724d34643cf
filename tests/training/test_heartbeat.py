"""Where each process stands, in its file; and what ends a run that stands still. Worlds of real processes: tests/torture/processes.py."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
import torch

from vavae_fast.distributed import World
from vavae_fast.errors import BadInput, Interrupted, PeerFault
from vavae_fast.training import heartbeat
from vavae_fast.training.heartbeat import Beat, Heart

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # `ends` raises SystemExit in a thread
ALONE, FIRST_OF_TWO = (World(0, size, torch.device("cpu")) for size in (1, 2))


@pytest.fixture(autouse=True)
def ends(monkeypatch):
    """What a heart would end this process with: it ends its thread instead."""
    found = threading.Event()
    monkeypatch.setattr(World, "from_main", lambda self, value: value)
    monkeypatch.setattr(heartbeat, "record_fault", lambda error: None)
    monkeypatch.setattr(heartbeat.os, "_exit", lambda status: (found.set(), sys.exit(status)))
    return found


class Other:
    """Another process of the run, a real one that sleeps; `beats` writes its file, in a thread for as long as it `lives`."""

    def __init__(self, heart, **changes):
        self.process = subprocess.Popen(["sleep", "60"])
        self.path = heart._path(1)
        self.beat = replace(heart.own, rank=1, process=self.process.pid, began=heartbeat._began(self.process.pid), **changes)
        self.lives = threading.Event()
        self.lives.set()
        self.thread = threading.Thread(target=self.beats, daemon=True)
        self.thread.start()

    def beats(self):
        while self.lives.is_set():
            self.beat = replace(self.beat, beat=self.beat.beat + 1)
            self.path.parent.mkdir(exist_ok=True)
            self.path.with_suffix(".tmp").write_text(json.dumps(asdict(self.beat)))
            self.path.with_suffix(".tmp").rename(self.path)
            time.sleep(0.01)

    def falls_silent(self):
        self.lives.clear()
        self.thread.join()


@contextlib.contextmanager
def with_another(heart, **changes):
    other = Other(heart, **changes)
    try:
        with heart:
            heart.steps_begin()
            yield other
    finally:
        other.falls_silent()
        other.process.kill()
        other.process.wait()
        other.path.unlink(missing_ok=True)


def waits(seconds, ends):
    """The main thread, in a place whose stack must be found."""
    return ends.wait(seconds)


def test_the_file_says_where_a_process_stands_and_goes_at_the_end(tmp_path):
    heart = Heart(tmp_path, ALONE, 0.5)
    with heart:
        heart.at(12, "trains")
        deadline, beat = time.monotonic() + 10, None
        while beat is None or beat.step != 12:
            assert time.monotonic() < deadline
            time.sleep(0.02)
            beat = heart._read(0)
        assert (beat.rank, beat.process, beat.doing, beat.ended) == (0, os.getpid(), "trains", None)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    assert not heart.thread.is_alive()


def test_a_step_without_end_ends_the_run_with_every_stack(tmp_path, ends, capsys):
    with Heart(tmp_path, ALONE, 0.3) as heart:
        heart.steps_begin()
        heart.at(7, "waits for its samples of the run's order from 56 on")
        assert waits(20, ends)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"rank 0 (process {os.getpid()} on " in said and "at step 7, where it waits for its samples of the run's order from 56 on" in said
    log = (tmp_path / "log.txt").read_text()
    assert "in waits" in log and "test_a_step_without_end" in log and said.removeprefix("error: ").strip() in log


def test_what_is_not_limited_and_what_is_not_begun_may_last(tmp_path, ends):
    with Heart(tmp_path, ALONE, 0.2) as heart:
        heart.at(1, "trains")
        assert not ends.wait(1), "the first step compiles"
        heart.steps_begin()
        heart.at(1, "saves", limited=False)
        assert not ends.wait(1)


def test_a_run_of_long_steps_may_have_another_long_one(tmp_path, ends):
    with Heart(tmp_path, ALONE, 0.2) as heart:
        heart.at(1, "trains")
        time.sleep(0.7)
        heart.at(2, "trains")
        heart.steps_begin()
        assert not ends.wait(0.9) and ends.wait(20)


def test_without_patience_nothing_ends(tmp_path, ends, monkeypatch):
    monkeypatch.setattr(heartbeat, "PERIOD", 0.02)
    with Heart(tmp_path, ALONE, 0.0) as heart:
        heart.steps_begin()
        heart.at(1, "trains")
        assert not ends.wait(0.5)


def test_a_stopped_process_is_named_and_ended(tmp_path, ends, capsys):
    heart = Heart(tmp_path, FIRST_OF_TWO, 0.4)
    with with_another(heart, step=11, collectives=40, doing="trains") as other:
        heart.at(12, "trains")
        assert not ends.wait(0.3)
        os.kill(other.process.pid, signal.SIGSTOP)
        other.falls_silent()
        heart.at(13, "saves", limited=False)  # the others see it wherever they are
        assert ends.wait(20)
        assert other.process.wait(10) == -signal.SIGKILL
    said = capsys.readouterr().err
    assert f"rank 1 (process {other.process.pid} on " in said and "no sign of life" in said and "step 11" in said and "rank 0" in said


def test_of_those_that_stand_still_the_one_behind_is_named(tmp_path, ends, capsys):
    heart = Heart(tmp_path, FIRST_OF_TWO, 0.4)
    with with_another(heart, step=12, collectives=-1, doing="trains"):
        heart.at(12, "trains")
        assert ends.wait(20)
    said = capsys.readouterr().err
    assert "error: rank 1 (process" in said and "after -1 collectives; rank 0 (process" in said


def test_who_waits_for_one_that_is_busy_is_patient(tmp_path, ends):
    heart = Heart(tmp_path, FIRST_OF_TWO, 0.2)
    with with_another(heart, step=12, limited=False, doing="saves"):
        heart.at(12, "trains")
        assert not ends.wait(1)


def test_a_process_that_has_ended_is_missed_before_the_patience_is_over(tmp_path, ends, capsys):
    heart = Heart(tmp_path, FIRST_OF_TWO, 20.0)
    heart.period = 0.1
    with with_another(heart, step=12, doing="trains") as other:
        heart.at(12, "saves", limited=False)
        assert not ends.wait(0.8)
        other.process.kill()
        other.process.wait()
        other.falls_silent()
        assert ends.wait(10)
    assert "has ended without a word, last seen at step 12" in capsys.readouterr().err


def test_files_of_another_start_say_nothing(tmp_path, ends):
    heart = Heart(tmp_path, FIRST_OF_TWO, 0.2)
    with with_another(heart, step=3, doing="trains") as other:
        other.beat = replace(other.beat, run="an earlier one")
        time.sleep(0.1)
        other.falls_silent()
        heart.others.clear()
        heart.at(4, "saves", limited=False)
        assert not ends.wait(0.8)


@pytest.mark.parametrize("spoil", ["disk", "folder"])
def test_neither_a_full_disk_nor_a_folder_that_is_gone_ends_a_run(tmp_path, ends, monkeypatch, spoil):
    heart = Heart(tmp_path, FIRST_OF_TWO, 0.6)
    with with_another(heart, step=3, doing="trains"):
        if spoil == "disk":
            monkeypatch.setattr(heartbeat.os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        else:
            (tmp_path / "heartbeats").rename(tmp_path / "elsewhere")
        for step in range(12):
            heart.at(step, "trains")
            assert not ends.wait(0.1)


def of_a_collective():
    exec(compile("raise RuntimeError('Connection closed by peer')", "/site-packages/torch/distributed/distributed_c10d.py", "exec"))


def test_a_collective_that_fails_of_a_lost_process_names_it(tmp_path):
    with pytest.raises(PeerFault, match=r"rank 1 \(process \d+ on \S+\) has ended of BadInput: a shard is cut short, last seen at step 5") as caught:
        with with_another(Heart(tmp_path, FIRST_OF_TWO, 1.0), step=5, ended="BadInput: a shard is cut short"):
            time.sleep(0.1)
            of_a_collective()
    assert "\n" not in str(caught.value) and isinstance(caught.value.__cause__, RuntimeError)
    assert "a shard is cut short" in (tmp_path / "log.txt").read_text()


def test_who_ended_first_is_named_before_who_fell_with_it(tmp_path, monkeypatch):
    """Of three; rank 1 lost a connection to rank 2, which was killed."""
    heart = Heart(tmp_path, World(0, 3, torch.device("cpu")), 1.0)
    victim = replace(heart.own, rank=1, ended="RuntimeError: Connection closed by peer", fell=True)
    culprit = replace(heart.own, rank=2, began=-1)
    monkeypatch.setattr(heart, "_read", {1: victim, 2: culprit}.get)
    with pytest.raises(PeerFault, match=r"^rank 2 \(process \d+ on \S+\) has ended without a word"), heart:
        of_a_collective()


def test_a_fault_of_its_own_stays_what_it_is_and_is_left_for_the_others(tmp_path):
    for error in (BadInput("a shard\nis cut"), RuntimeError("CUDA error"), PeerFault("rank 1 is out of step")):
        heart = Heart(tmp_path, FIRST_OF_TWO, 20.0)
        with pytest.raises(type(error)) as caught, heart:
            raise error
        assert caught.value is error and heart._read(0).ended == f"{type(error).__name__}: {' '.join(str(error).split())}"


def test_a_run_that_was_stopped_leaves_nothing(tmp_path):
    with pytest.raises(Interrupted), Heart(tmp_path, ALONE, 1.0):
        raise Interrupted
    assert not (tmp_path / "heartbeats").exists()


def test_a_process_is_known_by_its_number_and_its_beginning():
    child = subprocess.Popen(["sleep", "60"])
    try:
        began = heartbeat._began(child.pid)
        beat = Beat("run", 1, child.pid, "here", began)
        assert isinstance(began, int) and not beat.gone("here") and not replace(beat, began=began - 1).gone("elsewhere")
        assert replace(beat, began=began - 1).gone("here"), "the number is another's now"
    finally:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert beat.gone("here"), "ended, and nobody has asked how"
        child.wait()
    assert beat.gone("here")
