"""What a process does to the files of one folder, seen call by call by its parent, which may end it at any of them, or refuse it one.

By seccomp's user notification, so that Python, C++ and Rust are seen alike, without a debugger, a compiler or a privilege: the kernel
holds the child at each call that changes a disk, or orders its changes, until the parent has answered. Memory that maps a file is not
seen; nothing here writes through any.
"""

import ctypes
import fcntl
import os
import platform
import select
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# x86-64: number -> (name, where its paths are: fd = argument 0 is open; path, at = a path, after a folder's descriptor with at)
_CALLS = {
    1: ("write", "fd"), 18: ("write", "fd"), 20: ("write", "fd"), 296: ("write", "fd"), 328: ("write", "fd"), 40: ("write", "fd"),
    326: ("write", "fd2"), 77: ("write", "fd"), 285: ("write", "fd"), 76: ("write", "path"),
    74: ("sync", "fd"), 75: ("sync", "fd"), 306: ("sync", "fd"),
    2: ("open", "path"), 85: ("open", "path"), 257: ("open", "at"),
    82: ("rename", "path path"), 264: ("rename", "at at"), 316: ("rename", "at at"), 86: ("link", "path path"), 265: ("link", "at at"),
    83: ("mkdir", "path"), 258: ("mkdir", "at"), 87: ("unlink", "path"), 84: ("unlink", "path"), 263: ("unlink", "at"),
    90: ("chmod", "path"), 91: ("chmod", "fd"), 268: ("chmod", "at"), 452: ("chmod", "at"),
}  # fmt: skip
_FLAGS = {2: 1, 257: 2}  # calls that open, and which argument holds their flags
_PLAIN_WRITE, _PWRITE = 1, 18
_SECCOMP, _PIDFD_GETFD = 317, 438
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # ioctls: SECCOMP_IOCTL_NOTIF_RECV, _SEND
_NOTIFICATION, _ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_GO_ON = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Event:
    """One call: open (to write), write (or truncate), sync, rename, link, mkdir, chmod, unlink (or rmdir)."""

    name: str
    path: str
    to: str | None = None  # of a rename or link
    truncates: bool = False  # an open


def missing() -> str | None:
    """Why events cannot be seen here; None where they can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"I/O events are seen on Linux on x86-64 only, this is {platform.system()} on {platform.machine()}"
    watch = Watch(Path("/nowhere"))
    child = os.fork()
    if child == 0:
        try:
            watch.join()
            os._exit(0)
        except OSError:
            os._exit(1)
    watch.attend(lambda: ended(child))
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        return "this kernel, or what contains us, does not let a process watch its child's calls (seccomp's user notification)"
    return None


class Watch:
    """Counts the events below `folder` of the processes that `join`, and ends one at the event number `kill_at`, before it happens.

    torn: the part of it that does happen, where the event is a write. refuse: event -> 0, or the errno with which the call fails.
    """

    def __init__(self, folder: Path, kill_at: int | None = None, torn: float = 0.0, refuse: Callable[[Event], int] = lambda event: 0):
        self.folder, self.kill_at, self.torn, self.refuse = str(folder.absolute()), kill_at, torn, refuse
        self.events: list[Event] = []  # that happened; of a torn write a part of it
        self.killed = False
        self._ours, self._theirs = socket.socketpair()
        self._listeners: list[int] = []

    def join(self) -> None:
        """In a child that has one thread: from now on it, its threads and its children are watched."""
        socket.send_fds(self._theirs, [b"!"], [_listen()])

    def attend(self, done: Callable[[], bool], pause: float = 0.002) -> None:
        """In the parent: let the watched go on, and note what they do, until `done`, which is asked every `pause` seconds or sooner."""
        try:
            while not done():
                ready, _, _ = select.select([self._ours, *self._listeners], [], [], pause)
                for readable in ready:
                    if readable is self._ours:
                        self._listeners += socket.recv_fds(self._ours, 1, 1)[1]
                    else:
                        self._answer(readable)
        finally:
            for descriptor in self._listeners:
                os.close(descriptor)
            self._ours.close()
            self._theirs.close()

    def _answer(self, listener: int) -> None:
        call = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, call)
        except OSError:  # the last that it watched has ended
            self._listeners.remove(listener)
            os.close(listener)
            return
        cookie, process, _, number, _, _, *arguments = _NOTIFICATION.unpack(call)
        try:
            event = self._event(process, number, arguments)
        except OSError:  # it was killed meanwhile
            return
        refused = 0
        if event is not None:
            if len(self.events) + 1 == self.kill_at and not self.killed:
                self._kill(process, number, arguments, event)
                return
            refused = self.refuse(event)
            self.events += [] if refused else [event]
        try:
            fcntl.ioctl(listener, _SEND, bytearray(_ANSWER.pack(cookie, 0, -refused, 0 if refused else _GO_ON)))
        except OSError:
            pass  # as above

    def _kill(self, process: int, number: int, arguments: list[int], event: Event) -> None:
        if self.torn and number in (_PLAIN_WRITE, _PWRITE):
            _write_part(process, number, arguments, self.torn)
            self.events.append(event)
        self.killed = True
        os.kill(process, signal.SIGKILL)

    def _event(self, process: int, number: int, arguments: list[int]) -> Event | None:
        name, places = _CALLS[number]
        paths, arguments = [], list(arguments)
        flags = arguments[_FLAGS[number]] if number in _FLAGS else os.O_TRUNC * (number == 85)
        for place in places.split():
            if place == "fd":
                paths.append(_linked(process, arguments.pop(0)))
            elif place == "fd2":
                paths.append(_linked(process, arguments[2]))
            else:
                folder = arguments.pop(0) if place == "at" else None
                paths.append(_named(process, folder, arguments.pop(0)))
        if not any(path == self.folder or path.startswith(self.folder + "/") for path in paths):
            return None
        return Event(name, *paths, truncates=bool(name == "open" and flags & os.O_TRUNC))


def ended(child: int) -> bool:
    """Whether a child has ended; leaves it to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _listen() -> int:
    """Have the kernel hold this process at the calls above; the descriptor that tells of them."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = b"".join(struct.pack("=HBBI", *step) for step in _program())
    steps = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(steps)))
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, without which only root may
    listener = libc.syscall(_SECCOMP, 1, 8, header)  # SECCOMP_SET_MODE_FILTER, _FLAG_NEW_LISTENER
    if listener < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return listener


def _program() -> list[tuple[int, int, int, int]]:
    """Berkeley packet filter: hold the calls of the table; those that open only when they may change something."""
    load, equal, any_bit, answer = 0x20, 0x15, 0x45, 0x06
    hold, allow = (answer, 0, 0, 0x7FC00000), (answer, 0, 0, 0x7FFF0000)
    steps = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E), allow, (load, 0, 0, 0)]  # AUDIT_ARCH_X86_64
    for number in _CALLS:
        if number in _FLAGS:
            steps += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * _FLAGS[number]), (any_bit, 0, 1, _CHANGING), hold, allow]
        else:
            steps += [(equal, 0, 1, number), hold]
    return [*steps, allow]


def _linked(process: int, descriptor: int) -> str:
    return os.readlink(f"/proc/{process}/fd/{ctypes.c_int(descriptor & 0xFFFFFFFF).value}")


def _named(process: int, folder: int | None, address: int) -> str:
    name = _text(process, address)
    if name.startswith("/"):
        return os.path.normpath(name)
    at = None if folder is None else ctypes.c_int(folder & 0xFFFFFFFF).value
    return os.path.normpath(os.path.join(os.readlink(f"/proc/{process}/cwd") if at in (None, -100) else _linked(process, at), name))


def _text(process: int, address: int) -> str:
    data = b""
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        while b"\0" not in data:
            more = os.pread(memory.fileno(), 4096 - (address + len(data)) % 4096, address + len(data))
            if not more:
                raise ProcessLookupError(f"process {process} was killed in a call")  # whose memory is then read as empty, not refused
            data += more
    return os.fsdecode(data.split(b"\0")[0])


def _write_part(process: int, number: int, arguments: list[int], part: float) -> None:
    """Do the beginning of a write that the process will not live to do."""
    descriptor, address, size = arguments[:3]
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
        data = os.pread(memory.fileno(), int(size * part), address)
    group = int(next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("Tgid")).split()[1])
    handle = os.pidfd_open(group)
    file = ctypes.CDLL(None).syscall(_PIDFD_GETFD, handle, int(descriptor), 0)  # the same open file, with its position
    os.pwrite(file, data, arguments[3]) if number == _PWRITE else os.write(file, data)
    os.close(file)
    os.close(handle)
