"""Honest timing: candidates side by side in one process, interleaved, by CUDA events, on inputs that no cache holds.

    with fresh_dynamo() as dynamo:
        race = Race({"ours": calls, "compile": others}, device)      # a call for each set of inputs
        for _ in range(5):
            race.round()
        dynamo.check()
    race.timings["ours"].median, race.ratio("compile")

Warm-up is by time, so clocks have risen and everything is compiled. Work that the host cannot feed fast enough is captured in a
CUDA graph and its replays are timed, for all candidates or for none. On a CPU the wall clock stands for events and a plain call
for a replay, so the same lines run.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Calls = Sequence[Callable[[], Any]]

HOST_BOUND = 0.8  # share of a call that the host needs to enqueue it, above which its graph is timed
MOST_SETS = 32


class FellBack(RuntimeError):
    """A compiled baseline did not run compiled: no number of it may be shown."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one for each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median of the rounds."""
        return (max(self.rounds) - min(self.rounds)) / self.median


class Stopwatch:
    """Device time between `start` and `stop`, in seconds: CUDA events on a GPU, the wall clock elsewhere."""

    def __init__(self, device: torch.device):
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self.began = 0.0

    def start(self) -> None:
        if self.events:
            self.events[0].record()
        else:
            self.began = time.perf_counter()

    def stop(self) -> float:
        if not self.events:
            return time.perf_counter() - self.began
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(calls: Calls, device: torch.device) -> Callable[[], None]:
    """All calls, one after the other, as one CUDA graph -> its replay. The calls have run before; RuntimeError where one cannot be captured."""

    def all_calls() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return all_calls
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # what a library sets up on its first call on a stream must not be captured
        all_calls()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_calls()
    return graph.replay


_subject_seconds = 0.0


def subject_clock() -> float:
    """Seconds of the first candidate of every race so far, a call a round: the timer that pytest-benchmark keeps its books by."""
    return _subject_seconds


Play = Callable[[Callable[[], None], int], None]  # plays a race's round so many times


def play(one_round: Callable[[], None], rounds: int) -> None:
    for _ in range(rounds):
        one_round()


class Race:
    """Candidates by name, the subject first, each a sequence of calls on its sets of inputs. `round` times all of them once.

    seconds: what one candidate gets in one round, 0 for a single pass.
    graph: True replays CUDA graphs, False calls, None decides by the host's share.
    """

    def __init__(self, candidates: Mapping[str, Calls], device: torch.device, seconds: float = 0.05, warm_up: float = 0.1, graph: bool | None = None):
        self.device = device
        self.seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for calls in candidates.values():
            _warm_up(calls, device, warm_up)
        self.graph = any(_host_bound(calls, device) for calls in candidates.values()) if graph is None else graph
        self.count = {name: len(calls) for name, calls in candidates.items()}  # calls in one pass
        one_pass = (lambda calls: captured(calls, device)) if self.graph else _in_turn
        self.passes: dict[str, Callable[[], None]] = {name: one_pass(calls) for name, calls in candidates.items()}
        self.repeats = {name: self._repeats(run, seconds) if seconds > 0 else 1 for name, run in self.passes.items()}

    def _repeats(self, run: Callable[[], None], seconds: float) -> int:
        run()
        synchronize(self.device)
        watch = Stopwatch(self.device)
        watch.start()
        run()
        return max(1, min(1000, round(seconds / max(watch.stop(), 1e-7))))

    def round(self) -> None:
        """Every candidate once; each round begins with the next one, so that none always follows the same."""
        global _subject_seconds
        names = list(self.passes)
        shift = len(next(iter(self.seconds.values()))) % len(names)
        for name in (*names[shift:], *names[:shift]):
            synchronize(self.device)
            watch = Stopwatch(self.device)
            watch.start()
            for _ in range(self.repeats[name]):
                self.passes[name]()
            self.seconds[name].append(watch.stop() / (self.repeats[name] * self.count[name]))
        _subject_seconds += self.seconds[names[0]][-1]

    @property
    def timings(self) -> dict[str, Timing]:
        return {name: Timing(tuple(rounds)) for name, rounds in self.seconds.items()}

    def ratio(self, baseline: str, subject: str | None = None) -> float:
        """How many times faster than `baseline` the subject (the first) is: the median over rounds of their quotient."""
        seconds = self.seconds[subject or next(iter(self.seconds))]
        return statistics.median(b / s for b, s in zip(self.seconds[baseline], seconds))


def _in_turn(calls: Calls) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _warm_up(calls: Calls, device: torch.device, seconds: float) -> None:
    """Run for `seconds`, once over all calls at least."""
    ends = time.perf_counter() + seconds
    while True:
        for call in calls:
            call()
        synchronize(device)
        if time.perf_counter() >= ends:
            return


def _host_bound(calls: Calls, device: torch.device) -> bool:
    """Whether the host is too slow to keep the device busy."""
    if device.type != "cuda":
        return False
    watch, began = Stopwatch(device), time.perf_counter()
    watch.start()
    for call in calls:
        call()
    enqueued = time.perf_counter() - began
    return enqueued > HOST_BOUND * watch.stop()


def rotation(draw: Callable[[], Any], size: Callable[[Any], int], device: torch.device) -> list[Any]:
    """Sets of inputs that hold at least three times the L2 cache, two or more: none is still there when its turn comes again.

    One set on a CPU, where nothing is claimed.
    """
    if device.type != "cuda":
        return [draw()]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    sets = [draw(), draw()]
    while len(sets) < MOST_SETS and len(sets) * size(sets[0]) < 3 * cache:
        sets.append(draw())
    return sets


def tensor_bytes(values: Mapping[str, Any]) -> int:
    """Bytes of the distinct storages behind the tensors of `values`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values.values() if isinstance(t, Tensor)}
    return sum(storages.values())


class Dynamo:
    """What torch.compile has done since it was fresh: `compiles` around a baseline's first call, `settle` after warm-up, `check` at the end."""

    def __init__(self) -> None:
        self.settled: int | None = None

    @property
    def graphs(self) -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    @contextmanager
    def compiles(self, name: str) -> Iterator[None]:
        """`FellBack` unless what runs inside compiles a graph: a baseline that is called compiled runs compiled."""
        before = self.graphs
        yield
        if self.graphs == before:
            raise FellBack(f"{name}: torch.compile compiled no graph, so it would run eager; is TORCHDYNAMO_DISABLE set?")

    def settle(self) -> None:
        self.settled = self.graphs

    def check(self) -> None:
        """`FellBack` if a graph broke, or a call after `settle` compiled again."""
        breaks = dict(torch._dynamo.utils.counters["graph_break"])
        if breaks:
            raise FellBack(f"torch.compile broke the graph: {next(iter(breaks))}")
        if self.settled is not None and self.graphs != self.settled:
            raise FellBack(f"torch.compile compiled {self.graphs - self.settled} more graphs while they were timed")


@contextmanager
def fresh_dynamo() -> Iterator[Dynamo]:
    """Nothing compiled before counts inside; hitting the limit of recompilations is an error, not eager execution."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, suppress_errors=False):
        yield Dynamo()
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """`function` compiled as one graph for exactly the shapes that it gets."""
    return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)
