"""How evenly latents fill their space, beside how well they are generated (Table 6)."""

import math

import numpy as np

from vavae_fast.commands._html import scatter
from vavae_fast.experiments import dilemma
from vavae_fast.experiments.convergence import widths
from vavae_fast.experiments.experiment import Arms, Claim, Experiment, PaperTable, Results
from vavae_fast.experiments.judges import Score
from vavae_fast.experiments.paper import TABLE_6
from vavae_fast.experiments.scale import Scale

DENSITY = Score("density_cv", "density std / mean", False, digits=3)
UNIFORMITY = (DENSITY, Score("gini", "Gini coefficient", False, digits=3), Score("normalized_entropy", "normalised entropy", True, digits=3),
              Score("neighbour_distance_cv", "neighbour distance std / mean", False, digits=3))  # fmt: skip


def arms(scale: Scale, seed: int) -> Arms:
    found: Arms = {}
    for channels in widths(scale):
        for foundation in dilemma.aligned(scale):
            made = scale.arm(seed, channels, foundation)
            found[dilemma.name(scale, channels, foundation)] = (made, scale.uniformity_of(made.latents.tokenizer))
    return found


def claims(scale: Scale) -> list[Claim]:
    says = "VF alignment makes d{} more uniform"
    named = lambda c, found: dilemma.name(scale, c, found)
    return [Claim(says.format(c), named(c, scale.main), named(c, None), DENSITY) for c in widths(scale)]


def paper(scale: Scale) -> PaperTable:
    rows = {}
    for channels, theirs in zip(widths(scale), (32, 64)):
        rows |= {dilemma.name(scale, channels, f): TABLE_6.get((theirs, scale.foundations.get(f))) for f in dilemma.aligned(scale)}
    tokens, repeats = scale.uniformity
    note = f"There 10,000 tokens and 10 t-SNE runs; here {tokens:,} and {repeats}. The paper reads a possible positive correlation off six rows."
    return PaperTable("Table 6 (f16d32, f16d64)", ("density", "Gini", "normalised entropy", "gFID"), rows, note)


def correlation(results: Results) -> list[str]:
    """Of density and score over all arms and seeds: one number, of few points."""
    density, frechet = (sum((results.values(name, key) for name in results.arms), []) for key in ("density_cv", "frechet"))
    if len(density) != len(frechet) or len(density) < 3 or not np.std(density) or not np.std(frechet):
        return []
    r = float(np.corrcoef(density, np.log(frechet))[0, 1])
    published = float(np.corrcoef(*zip(*((row[0], math.log(row[3])) for row in TABLE_6.values())))[0, 1])
    said = f"Correlation of density std / mean with the logarithm of the generation score, over {len(density)} arms and seeds: {r:.2f}."
    return [f"{said} Over the six rows of the paper's Table 6 it is {published:.2f}."]


def plot(results: Results) -> list[tuple[str, str]]:
    frechet = results.scale.judge.generation[0]
    points = [(d, f, name) for name in results.arms for d, f in zip(results.values(name, "density_cv"), results.values(name, frechet.key))]
    shown = scatter(np.array([p[:2] for p in points]).reshape(-1, 2), [p[2] for p in points], f"here: {frechet.title} over density std / mean")
    return [("Score over uniformity", shown)]


EXPERIMENT = Experiment(
    name="uniformity",
    title="Uniform latents",
    look_at="Are aligned latents spread more evenly (density and Gini lower, entropy higher), and do evener latents generate better?",
    arms=arms,
    scores=lambda scale: (*UNIFORMITY, scale.judge.generation[0]),
    claims=claims,
    paper=paper,
    sections=plot,
    findings=correlation,
)
