"""All claims in one table: claim of the paper, what is seen here early and at the end, by which score, at which scale, over how many seeds."""

from collections.abc import Sequence
from typing import Any

from vavae_fast import artifacts
from vavae_fast.experiments.experiment import Results, Verdict
from vavae_fast.experiments.scale import Scale


def summary(several: Sequence[Results], scale: Scale) -> dict[str, Any]:
    """What summary.json holds."""
    early = scale.marks[0]
    claims = []
    for results in several:
        for claim in results.experiment.claims(scale):
            at_end = results.verdict(claim)
            claims.append(dict(experiment=results.experiment.name, claim=claim.says, score=claim.score.title, seeds=len(at_end.differences),
                               early=told(results.verdict(claim, early)), at_end=told(at_end)))  # fmt: skip
    return artifacts.manifest("experiments", scale=scale.name, quick=scale.quick, protocol=scale.says, early_steps=early, claims=claims)


def told(verdict: Verdict) -> str:
    """A verdict with the difference of each seed in brackets."""
    score = verdict.claim.score
    differences = ", ".join(f"{score.factor * d:+.{score.digits}f}" for d in verdict.differences)
    return f"{verdict.seen} ({differences})" if differences else verdict.seen


NOTE = (
    "In brackets the difference of each seed; above 0 it agrees with the claim. Seen: every seed agrees and the mean exceeds the standard "
    "deviation over seeds. A Fréchet distance of samples holds the tokenizer's own error too, which is most of it where LightningDiT has "
    "learned all it can: the earlier comparison says more about how easily latents are learned."
)


def markdown(summary: dict[str, Any]) -> str:
    """The claims of a `summary` as a table, a line a claim."""
    head = ("experiment", "claim of the paper", "by", f"after {summary['early_steps']:,} steps", "at the end", "scale", "seeds")
    rows = [(c["experiment"], c["claim"], c["score"], c["early"], c["at_end"], summary["scale"], str(c["seeds"])) for c in summary["claims"]]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))
