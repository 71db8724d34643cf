"""One holder of a folder at a time, whatever locks its file system has."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time

import pytest

from vavae_fast.commands import run_lock
from vavae_fast.commands.run_lock import locked
from vavae_fast.errors import BadInput


def test_a_second_holder_is_refused_and_told_who_the_first_is(tmp_path):
    folder = tmp_path / "run"
    with locked(folder):
        with pytest.raises(BadInput, match=rf"in use by process {os.getpid()} on \S+; wait for it") as caught, locked(folder):
            pass
        assert "\n" not in str(caught.value)
    with locked(folder):
        pass
    assert list(folder.iterdir()) == []


def test_the_lock_dies_with_its_holder(tmp_path):
    """A killed process leaves the file, not the lock."""
    code = "import sys, time, pathlib\nfrom vavae_fast.commands.run_lock import locked\nwith locked(pathlib.Path(sys.argv[1])): time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "run.lock").exists() or not (tmp_path / "run.lock").read_text():
            assert time.monotonic() < deadline and holder.poll() is None
            time.sleep(0.02)
        with pytest.raises(BadInput, match=f"in use by process {holder.pid}"), locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert (tmp_path / "run.lock").exists()
    with locked(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / "run.lock").read_text()


def test_a_lock_file_that_its_holder_has_removed_is_no_lock(tmp_path, monkeypatch):
    """Opened before the holder removed it, locked after: others would lock a new file of that name."""
    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, how: (real(file, how), (tmp_path / "run.lock").unlink())[0])
    with pytest.raises(BadInput, match="in use by another process"), locked(tmp_path):
        pass


@pytest.mark.parametrize("locks", ["another machine's, untold", "none"])
@pytest.mark.parametrize("lives", [True, False])
def test_a_holder_that_no_lock_speaks_for_is_told_by_its_dating(tmp_path, monkeypatch, capsys, locks, lives):
    """Its file names it; whether it lives shows within a lease."""
    monkeypatch.setattr(run_lock, "LEASE", 0.6)
    held = threading.Event()

    def first():
        monkeypatch.setattr(run_lock.socket, "gethostname", lambda: "node7" if threading.current_thread() is holder else "node8")
        with locked(tmp_path):
            held.set()
            while not done.wait(0.05):
                pass
            if not lives:
                (tmp_path / "left").write_bytes((tmp_path / "run.lock").read_bytes())

    done = threading.Event()
    holder = threading.Thread(target=first)
    with monkeypatch.context() as patched:
        error = OSError(errno.EOPNOTSUPP, "no locks") if locks == "none" else None

        def flock(file, how):
            if error is not None:
                raise error

        patched.setattr(fcntl, "flock", flock)
        holder.start()
        held.wait()
        if not lives:
            done.set()
            holder.join()
            (tmp_path / "left").rename(tmp_path / "run.lock")
        try:
            if lives:
                with pytest.raises(BadInput, match=f"in use by process {os.getpid()} on node7; wait for it"), locked(tmp_path):
                    pass
            else:
                with locked(tmp_path):
                    assert "on node8" in (tmp_path / "run.lock").read_text()
        finally:
            done.set()
            holder.join()
    assert f"was held by process {os.getpid()} on node7; waits 1 s" in capsys.readouterr().out
