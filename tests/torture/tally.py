"""What a campaign brings back: a row a fault class, with what went wrong and how to see it again."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


@dataclass
class Tally:
    """One row of the table. Zero in the last three counts, or `remark` says why.

    lost: work or state that was there before the fault cannot be had again. wrong: something other than promised: a silent wrong
    number, other bits, a traceback, an orphan, a payload that ran. hung: no answer within the campaign's patience.
    """

    fault: str  # "SIGKILL at every I/O event of a save, one process"
    tried: int = 0
    lost: int = 0
    wrong: int = 0
    hung: int = 0
    remark: str = ""  # what the reader must know: which count is of a baseline, what was skipped and why
    failures: list[str] = field(default_factory=list)  # a line each, beginning with what reproduces it
    reference: bool = False  # a row of another scheme, for comparison: what it loses is not our failure

    def fail(self, kind: str, line: str) -> None:
        """Count one failure of kind "lost", "wrong" or "hung"."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.failures.append(line)

    @property
    def clean(self) -> bool:
        return self.reference or not (self.lost or self.wrong or self.hung)


class Ran(NamedTuple):
    """What came of a campaign, how long it took, and on which code."""

    rows: list[Tally]
    seconds: float
    commit: str


@dataclass(frozen=True)
class Effort:
    """How hard a campaign tries. Everything random comes from `draw(name)`, so a seed reproduces any failure."""

    seed: int = 0
    size: float = 1.0  # 1: the counts the project promises; `make test` runs a small part
    folder: Path = Path(".")  # an empty folder of the campaign's own

    def draw(self, name: str) -> random.Random:
        """A generator of its own for each use, so that one campaign's draws do not move another's."""
        return random.Random(f"{self.seed}/{name}")

    def count(self, promised: int, least: int = 1) -> int:
        return max(least, round(promised * self.size))


Campaign = Callable[[Effort], list[Tally]]
