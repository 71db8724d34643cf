"""What a user can get wrong, which `cli.main` prints as one line with status 2; the stop that a user asked for; and hardware that computes wrong."""

import math
import sys
from numbers import Integral, Real
from typing import Any


class BadInput(ValueError):
    """Wrong input. The message is one line: the culprit, what was found, what was expected, the cure; names in it steer no terminal."""

    def __init__(self, message: str = ""):
        super().__init__(printable(" ".join(str(message).splitlines())))


class Interrupted(Exception):
    """A signal ended the stage early; what it had is saved, and the same command continues. `cli.main` leaves with 0."""


class HardwareFault(Exception):
    """A device computed something wrong. The message is one line: the step, the process, the cure. `cli.main` leaves with 17."""


class PeerFault(RuntimeError):
    """Another process of the run has ended, hangs or does something else. One line that names it; `cli.main` prints it and leaves with 1."""


def printable(text: str) -> str:
    """`text` with what steers a terminal, and bytes that are no text, spelled out: the names of files are not to be trusted with either."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def require(condition: bool, name: str, found: Any, expected: str) -> None:
    """Raise `BadInput` unless `condition`; `name` is a config key or a flag, `expected` reads on from 'must be'."""
    if not condition:
        raise BadInput(f"{name}: must be {expected}, got {found!r}")


def is_integer(value: Any) -> bool:
    """A whole number of Python or NumPy, for `require`; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite real number of Python or NumPy, for `require`; True is none, nor is a tensor."""
    if is_integer(value):
        return abs(int(value)) <= sys.float_info.max
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
