"""Many inputs in one warm, forked process that may take 1 GB more and 30 s for each; one that it does not survive is named, the rest goes on.

The child says on a pipe which input it begins and what came of it; a child that hangs is killed by the parent, and a new one goes on
behind the culprit. Called before any thread has started: a process with threads must not fork.
"""

import contextlib
import ctypes
import io
import json
import os
import resource
import select
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vavae_fast.cli import main
from vavae_fast.errors import BadInput

PATIENCE = 30.0  # seconds for one input
MEMORY = 1 << 30  # bytes of memory that the process may touch beyond what it had when it was forked
_ADDRESSES = 6 << 30  # bytes of address space beyond: what asks for more is stopped at once
_ARENAS = -8  # M_ARENA_MAX of mallopt: an arena a thread would reserve 64 MB each


class Outcome(NamedTuple):
    """What came of one input. fault: "" when it is as promised, else what is wrong. kind: "wrong" or "hung"."""

    index: int
    refused: bool
    kind: str
    fault: str


class Wrong(Exception):
    """What was given back is not what it should be; the message says so."""


def boxed(work: Callable[[Any], bool], inputs: Sequence[Any]) -> Iterator[Outcome]:
    """`work` on each of `inputs`, in order. It returns whether the input was refused in one line, or raises: `Wrong`, or what must not be."""
    place = 0
    while place < len(inputs):
        for outcome in _one_child(work, inputs, place):
            place = outcome.index + 1
            yield outcome


def _one_child(work: Callable[[Any], bool], inputs: Sequence[Any], first: int) -> Iterator[Outcome]:
    """The outcomes from `first` on, up to the first input that the child does not survive."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _work_through(work, inputs, first, send)
    os.close(send)
    try:
        place, buffer = first, b""
        while place < len(inputs):
            if not select.select([receive], [], [], PATIENCE)[0]:
                os.kill(child, signal.SIGKILL)
                yield Outcome(place, False, "hung", f"no answer within {PATIENCE:.0f} s")
                return
            data = os.read(receive, 1 << 16)
            if not data:
                yield Outcome(place, False, "wrong", "it ended the process")
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                refused, fault, ends = json.loads(line)
                yield Outcome(place, refused, "wrong" if fault else "", fault)
                place += 1
                if ends:
                    return
    finally:
        os.close(receive)
        os.waitpid(child, 0)


def _work_through(work: Callable[[Any], bool], inputs: Sequence[Any], first: int, send: int) -> None:
    """The child: a line of JSON for each input. It ends after one that took too much memory, whose peak would hide others."""
    try:
        ctypes.CDLL(None).mallopt(_ARENAS, 1)
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        most = _peak() + MEMORY
        for one in inputs[first:]:
            refused, fault = _answer(work, one)
            if ends := _peak() > most:
                fault = f"took more than {MEMORY >> 30} GB{'; ' + fault if fault else ''}"
            os.write(send, json.dumps((refused, fault, ends)).encode() + b"\n")
            if ends:
                break
    finally:
        os._exit(0)


def _answer(work: Callable[[Any], bool], one: Any) -> tuple[bool, str]:
    """(refused, fault) of one input."""
    try:
        return work(one), ""
    except Wrong as error:
        return False, str(error)
    except BadInput as error:
        line = str(error)
    except BaseException as error:  # of any kind: that is what is looked for
        where = traceback.extract_tb(error.__traceback__)
        inside = next((f"{Path(f.filename).name}:{f.lineno}" for f in reversed(where) if "vavae" in f.filename), "?")
        return False, f"{type(error).__name__} at {inside}: {' '.join(str(error).split())[:200]}"
    if "\n" in line:
        return True, f"more than one line: {line[:200]!r}"
    if line.startswith("out of memory"):
        return True, f"asked for more than {_ADDRESSES >> 30} GB: {line[:200]}"
    return True, ""


def _peak() -> int:
    """Bytes of memory that this process has ever touched at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def command(argv: Sequence[str]) -> bool:
    """`vavae-fast` with these words: whether it was refused. `Wrong` unless it is done without a word on stderr's behalf, or one line and 2."""
    said, out = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8")  # which refuses what a terminal would
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        status = main([str(word) for word in argv])
    line = said.getvalue()
    if status == 0:
        return False
    errors = [one for one in line.splitlines() if one.startswith("error: ")]
    if status != 2 or len(errors) != 1 or "Traceback" in line:
        raise Wrong(f"status {status}, said {line[-300:]!r}")
    raise BadInput(errors[0].removeprefix("error: "))


def in_a_child(action: Callable[[], Any]) -> None:
    """`action` in a forked process, so that the threads it starts are not here when others are forked. `RuntimeError` when it fails."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
                action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise RuntimeError("a child that prepares did not come to its end, see above")
