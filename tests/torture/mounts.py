"""Small file systems of a process's own: in memory, of a given size, seen by it and its children, gone when they end."""

import ctypes
import os
from pathlib import Path

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x20000
_REMOUNT, _PRIVATE_BELOW = 32, (1 << 18) | 16384
_libc = ctypes.CDLL(None, use_errno=True)


def no_mounts() -> str | None:
    """Give this process mounts of its own; why it cannot have them, None when it has. Call it before the first thread starts."""
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_NEW_MOUNTS) != 0:
        if _libc.unshare(_NEW_USER | _NEW_MOUNTS) != 0:
            return "this system does not let a process have mounts of its own"
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(line)
    return None if _libc.mount(b"none", b"/", None, _PRIVATE_BELOW, None) == 0 else "mounts cannot be made private here"


class SmallDisk:
    """A file system of `size` bytes at `folder`, in memory, while inside `with`."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size

    def __enter__(self) -> "SmallDisk":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mount(0, self.size)
        return self

    def resize(self, size: int) -> None:
        self._mount(_REMOUNT, size)

    def used(self) -> int:
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def _mount(self, flags: int, size: int) -> None:
        if _libc.mount(b"tmpfs", os.fsencode(self.folder), b"tmpfs", flags, f"size={max(size, 1)}".encode()) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(self.folder))

    def __exit__(self, *_: object) -> None:
        _libc.umount2(os.fsencode(self.folder), 2)  # MNT_DETACH: even where a file is still open
