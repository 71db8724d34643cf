"""One holder of a folder at a time, on one machine or on several that share its disk."""

import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from vavae_fast.artifacts import make_folder
from vavae_fast.errors import BadInput

LEASE = 15.0  # seconds: a holder on another machine shows that it lives well within


@contextmanager
def locked(folder: Path, cure: str = "choose another train.exp_name") -> Iterator[None]:
    """Hold `folder` for this process; a second holder is `BadInput`, with another `cure` than to wait. The lock dies with its holder.

    Not every shared file system tells one machine of another's locks, and some have none: so the holder also dates its file anew all the
    time, and who finds the name of one that the system's lock does not speak for waits for a LEASE to see whether it does.
    """
    make_folder(folder)
    path = folder / "run.lock"
    with open(path, "a+", encoding="utf-8") as file:
        lock = _lock(file)
        file.seek(0)
        holder = file.read().strip()
        told = lock is True and holder.endswith(f" on {socket.gethostname()}")  # one of this machine would have held the lock
        if lock is False or not _still_at(path, file) or (holder and not told and _renewed(path, holder)):
            raise BadInput(f"{folder}: in use by {holder or 'another process'}; wait for it, or {cure}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        with _renewing(file):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)


def _lock(file: TextIO) -> bool | None:
    """Whether the lock was had; None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise
        return None
    return True


def _renewed(path: Path, holder: str) -> bool:
    """Whether `holder` dates the file anew, watched for a LEASE. By the file's own times: two machines' clocks may differ."""
    print(f"{path.parent}: was held by {holder}; waits {LEASE:.0f} s to see whether it still is", flush=True)
    first, end = _date(path), time.monotonic() + LEASE
    while time.monotonic() < end:
        time.sleep(LEASE / 30)
        if _date(path) != first:
            return True
    return False


def _date(path: Path) -> int | None:
    """Opened each time: NFS asks the server then, and not only its memory."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


@contextmanager
def _renewing(file: TextIO) -> Iterator[None]:
    """Date the file anew meanwhile, in a thread."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(LEASE / 5):
            with suppress(OSError):  # a disk's fault, of which others speak
                os.utime(file.fileno())

    thread = threading.Thread(target=renew, name="run.lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _still_at(path: Path, file: TextIO) -> bool:
    """Whether the locked file is the one that others will find: its last holder may have removed it since it was opened."""
    return path.exists() and os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
