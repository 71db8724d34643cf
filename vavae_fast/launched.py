"""What a process owes to the launcher that started it; without torch, whose import takes long enough for a launcher to be killed in."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def world_size() -> int:
    """How many processes the launcher started, known before any of them talks to another."""
    return int(os.environ.get("WORLD_SIZE", 1))


def die_with_parent() -> None:
    """Ask the kernel (Linux) to end this process when its parent ends, so that a killed launcher leaves no orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
