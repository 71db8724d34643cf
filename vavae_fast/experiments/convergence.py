"""How much sooner aligned latents are learned (Figure 4 a, b): score against steps, and the speed-up at equal score."""

import math
import statistics

from vavae_fast.commands._html import svg_lines, table
from vavae_fast.experiments import dilemma
from vavae_fast.experiments.experiment import Arms, Claim, Experiment, PaperTable, Results
from vavae_fast.experiments.paper import FIGURE_4_SPEED_UP
from vavae_fast.experiments.scale import Scale


def widths(scale: Scale) -> tuple[int, ...]:
    """The middle width, which stands beside the paper's d32, and the widest, beside its d64."""
    return (scale.middle, max(scale.channels))


def arms(scale: Scale, seed: int) -> Arms:
    return {dilemma.name(scale, c, found): scale.arm(seed, c, found) for c in widths(scale) for found in (None, scale.main)}


def speed_up(slow: list[tuple[int, float]], fast: list[tuple[int, float]]) -> float | None:
    """How many times sooner `fast` reaches the last score of `slow`: (steps, score), lower is better, in rising steps.

    Between two marks the score is a straight line over log steps. None: it never does; where its first mark is there already, a lower bound.
    """
    end, target = slow[-1]
    if fast[0][1] <= target:
        return end / fast[0][0]
    for (a, high), (b, low) in zip(fast, fast[1:]):
        if low <= target < high:
            part = (high - target) / (high - low)
            return end / math.exp(math.log(a) + part * (math.log(b) - math.log(a)))
    return None


def speed_ups(results: Results, channels: int) -> list[float | None]:
    """By seed."""
    scale = results.scale
    both = zip(*(results.scores(dilemma.name(scale, channels, found)) for found in (None, scale.main)))
    curve = lambda scores: [(mark, scores[str(mark)]["frechet"]) for mark in scale.marks]
    return [None if slow is None or fast is None else speed_up(curve(slow), curve(fast)) for slow, fast in both]


def findings(results: Results) -> list[str]:
    lines = []
    for channels, width in zip(widths(results.scale), FIGURE_4_SPEED_UP):
        found = speed_ups(results, channels)
        by_seed = ", ".join("never" if value is None else f"{value:.2f}" for value in found)
        reached = [value for value in found if value is not None]
        said = reached and f"{statistics.fmean(reached):.2f} times sooner (by seed: {by_seed}; at least, where its first mark is there already)"
        lines.append(f"d{channels}: the aligned arm reaches the other's last score {said if reached else 'in no seed'}. "
                     f"The paper, f16d{width}: {FIGURE_4_SPEED_UP[width]} times (Figure 4).")  # fmt: skip
    return lines


def curves(results: Results) -> list[tuple[str, str]]:
    """One plot a score: lines of means over seeds; and the numbers."""
    scale, plots = results.scale, ""
    rows = [("arm", "score", *(f"{mark:,} steps" for mark in scale.marks))]
    for score in scale.judge.generation:
        lines = {}
        for name in results.arms:
            means = [results.mean(name, score.key, mark) for mark in scale.marks]
            lines[name] = [(mark, value and score.factor * value) for mark, value in zip(scale.marks, means)]
            rows.append((name, score.title, *(results.cell(name, score, mark) for mark in scale.marks)))
        plots += svg_lines(lines, f"here: {score.title}", log=score.key == "frechet", dashed=[name for name in lines if scale.named(None) in name])
    return [("Score against steps", plots + table(rows))]


def claims(scale: Scale) -> list[Claim]:
    frechet = scale.judge.generation[0]
    named = lambda c: (dilemma.name(scale, c, scale.main), dilemma.name(scale, c, None))
    return [Claim(f"aligned d{c} is ahead", *named(c), frechet) for c in widths(scale)]


def paper(scale: Scale) -> PaperTable:
    rows = {dilemma.name(scale, c, scale.main): (value,) for c, value in zip(widths(scale), FIGURE_4_SPEED_UP.values())}
    return PaperTable("Figure 4 (a), (b): f16d32, f16d64, LightningDiT-B, 160 epochs", ("speed-up at equal FID",), rows)


EXPERIMENT = Experiment(
    name="convergence",
    title="How much sooner aligned latents are learned",
    look_at="At which step does the aligned arm reach the score that the other has at its end?",
    arms=arms,
    scores=lambda scale: scale.judge.generation,
    claims=claims,
    paper=paper,
    sections=curves,
    findings=findings,
)
