"""What an experiment is: arms by name, the paper's numbers, what the paper claims; and the scores of its arms over seeds."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vavae_fast.experiments.judges import Score
from vavae_fast.experiments.scale import Scale
from vavae_fast.experiments.stages import LightningDiT, Tokenizer
from vavae_fast.experiments.work import Lab, Work, in_order

Arms = dict[str, Work | tuple[Work, ...]]  # by name: the work whose scores are an arm's


@dataclass(frozen=True)
class PaperTable:
    """Numbers as they were published, by the name of the arm that stands for them here; `where` names table and page."""

    where: str
    columns: tuple[str, ...]
    rows: Mapping[str, Sequence[Any]]
    note: str = ""  # what of it has no counterpart here


@dataclass(frozen=True)
class Claim:
    """The paper says that arm `better` scores better than arm `worse`."""

    says: str
    better: str
    worse: str
    score: Score


@dataclass(frozen=True)
class Verdict:
    """A claim, and what was seen: the differences by seed, positive where they agree with it."""

    claim: Claim
    differences: tuple[float, ...]
    seen: str  # "–": arms have no such score after so many steps


@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments, at any scale.

    arms: (scale, seed) -> work by the name of the arm; the same names for every seed. needs: (scale) -> why it cannot be done there, or None.
    sections: what its page shows beside the table, as (heading, HTML) pairs.
    """

    name: str
    title: str
    look_at: str
    arms: Callable[[Scale, int], Arms]
    scores: Callable[[Scale], Sequence[Score]]
    claims: Callable[[Scale], Sequence[Claim]]
    paper: Callable[[Scale], PaperTable | None] = lambda scale: None
    sections: Callable[["Results"], list[tuple[str, str]]] = lambda results: []
    findings: Callable[["Results"], list[str]] = lambda results: []
    needs: Callable[[Scale], str | None] = lambda scale: None


@dataclass(frozen=True)
class Results:
    """The arms of an experiment, each a list over seeds, and their scores in `lab`; an arm that failed has none."""

    experiment: Experiment
    scale: Scale
    lab: Lab
    arms: Mapping[str, Sequence[tuple[Work, ...]]]
    failed: Mapping[str, str] = field(default_factory=dict)  # key of the work -> its error

    def scores(self, arm: str) -> list[dict[str, Any] | None]:
        """By seed, the scores of the arm's work and of the tokenizer behind it; those of marks under their numbers. None: failed."""
        return [self._scores(works) for works in self.arms[arm]]

    def _scores(self, works: tuple[Work, ...]) -> dict[str, Any] | None:
        joined: dict[str, Any] = {}
        for work in in_order(list(works)):
            if isinstance(work, Tokenizer) or work in works:
                result = self.lab.result(work)
                if result is None:
                    return None
                own = result["scores"]
                joined |= own | (own[str(work.marks[-1])] if isinstance(work, LightningDiT) else own.get("final", {}))
        return joined

    def values(self, arm: str, key: str, mark: int | None = None) -> list[float]:
        """One a seed, of those that have it; `mark`: after so many steps, by default at the end."""
        found = [scores if mark is None else scores[str(mark)] for scores in self.scores(arm) if scores is not None]
        return [scores[key] for scores in found if scores.get(key) is not None]

    def mean(self, arm: str, key: str, mark: int | None = None) -> float | None:
        values = self.values(arm, key, mark)
        return statistics.fmean(values) if values else None

    def cell(self, arm: str, score: Score, mark: int | None = None) -> str:
        """mean ± standard deviation over seeds; of one seed the value."""
        values = [score.factor * value for value in self.values(arm, score.key, mark)]
        if not values:
            return "failed" if None in self.scores(arm) else "–"
        text = f"{statistics.fmean(values):.{score.digits}f}"
        return text + (f" ± {statistics.stdev(values):.{score.digits}f}" if len(values) > 1 else "")

    def verdict(self, claim: Claim, mark: int | None = None) -> Verdict:
        """Arms with the same seed are compared, at their ends or after `mark` steps. It shows where every seed agrees and the mean
        difference exceeds the seeds' spread."""
        key, sign = claim.score.key, 1 if claim.score.more_is_better else -1
        pairs = [(a, b) for a, b in zip(self.scores(claim.better), self.scores(claim.worse)) if a is not None and b is not None]
        if mark is not None:
            pairs = [(a.get(str(mark), {}), b.get(str(mark), {})) for a, b in pairs]
            if not all(key in scores for pair in pairs for scores in pair):
                return Verdict(claim, (), "–")
        differences = tuple(sign * (a[key] - b[key]) for a, b in pairs)
        return Verdict(claim, differences, "quick run: no meaning" if self.scale.quick else _seen(differences))


def _seen(differences: Sequence[float]) -> str:
    if not differences:
        return "failed"
    if len(differences) == 1:
        return "seen, one seed" if differences[0] > 0 else "not seen, one seed"
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if not math.copysign(1, min(differences)) == math.copysign(1, max(differences)) or abs(mean) <= spread:
        return "not clear: within the spread of the seeds"
    return "seen" if mean > 0 else "the opposite is seen"
