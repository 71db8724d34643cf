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
MEMORY = 1 << 30  # bytes that one process may take beyond what it had when it was forked
_OUT_OF_MEMORY = ("MemoryError", "out of memory", "can't allocate memory", "not enough memory", "Cannot allocate", "Unable to allocate")
_ARENAS = -8  # M_ARENA_MAX of mallopt: an arena a thread would reserve 64 MB each


class Outcome(NamedTuple):
    """What came of one input. fault: "" when it is as promised, else what is wrong. kind: "wrong" or "hung"."""

    index: int
    refused: bool
    kind: str
    fault: str


class Wrong(Exception):
    """What was given back is not what it should be; the message says so."""


def boxed(work: Callable[[Any], bool], inputs: Sequence[Any], patience: float = PATIENCE, memory: int = MEMORY) -> Iterator[Outcome]:
    """`work` on each of `inputs`, in order. It returns whether the input was refused in one line, or raises: `Wrong`, or what must not be."""
    place = 0
    while place < len(inputs):
        for outcome in _one_child(work, inputs, place, patience, memory):
            place = outcome.index + 1
            yield outcome


def _one_child(work: Callable[[Any], bool], inputs: Sequence[Any], first: int, patience: float, memory: int) -> Iterator[Outcome]:
    """The outcomes from `first` on, up to the first input that the child does not survive."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _work_through(work, inputs, first, memory, send)
    os.close(send)
    try:
        place, buffer = first, b""
        while place < len(inputs):
            if not select.select([receive], [], [], patience)[0]:
                os.kill(child, signal.SIGKILL)
                yield Outcome(place, False, "hung", f"no answer within {patience:.0f} s")
                return
            data = os.read(receive, 1 << 16)
            if not data:
                yield Outcome(place, False, "wrong", "it ended the process")
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                refused, fault = json.loads(line)
                yield Outcome(place, refused, "wrong" if fault else "", fault)
                place += 1
    finally:
        os.close(receive)
        os.waitpid(child, 0)


def _work_through(work: Callable[[Any], bool], inputs: Sequence[Any], first: int, memory: int, send: int) -> None:
    """The child: a line of JSON for each input."""
    try:
        ctypes.CDLL(None).mallopt(_ARENAS, 1)
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        for one in inputs[first:]:
            os.write(send, json.dumps(_answer(work, one)).encode() + b"\n")
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
    if any(words in line for words in _OUT_OF_MEMORY):
        return True, f"took more than {MEMORY >> 30} GB: {line[:200]}"
    return True, ""


def command(argv: Sequence[str]) -> bool:
    """`vavae-fast` with these words: whether it was refused. `Wrong` unless it is done without a word on stderr's behalf, or one line and 2."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
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
