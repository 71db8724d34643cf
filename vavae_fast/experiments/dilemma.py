"""The dilemma, and the way out: wider latents reconstruct better and are harder to generate, unless they are aligned (Figures 1 and 2, Table 2)."""

from vavae_fast.commands._html import svg_lines
from vavae_fast.experiments.experiment import Arms, Claim, Experiment, PaperTable, Results
from vavae_fast.experiments.judges import Score
from vavae_fast.experiments.paper import RECONSTRUCTION, TABLE_2
from vavae_fast.experiments.scale import Scale


def name(scale: Scale, channels: int, foundation: str | None) -> str:
    return f"d{channels}, {scale.named(foundation)}"


def aligned(scale: Scale) -> tuple[str | None, ...]:
    """No alignment, and those that stand for the models of Table 2."""
    return (None, *(found for found, of in scale.foundations.items() if of in ("dinov2", "mae")))


def arms(scale: Scale, seed: int) -> Arms:
    return {name(scale, c, found): scale.arm(seed, c, found) for c in scale.channels for found in aligned(scale)}


def scores(scale: Scale) -> tuple[Score, ...]:
    return (*scale.judge.reconstruction, *scale.judge.generation)


def paper(scale: Scale) -> PaperTable:
    rows = {}
    for ours, theirs in scale.channels.items():
        for found in aligned(scale):
            row = TABLE_2.get((theirs, scale.foundations.get(found)))
            rows[name(scale, ours, found)] = row and row[:5]
    return PaperTable("Table 2 (f16d16, f16d32, f16d64)", (*RECONSTRUCTION, "FID-10K of LightningDiT-B"), rows)


def claims(scale: Scale) -> list[Claim]:
    psnr, frechet = scale.judge.reconstruction[0], scale.judge.generation[0]
    psnr = next((score for score in scale.judge.reconstruction if score.key == "psnr"), psnr)
    known = [ours for ours, theirs in scale.channels.items() if theirs]
    first, last = known[0], known[-1]
    found = [
        Claim("more channels reconstruct better", name(scale, last, None), name(scale, first, None), psnr),
        Claim("and are harder to generate", name(scale, first, None), name(scale, last, None), frechet),
    ]
    for channels in known:
        alone, with_vf = name(scale, channels, None), name(scale, channels, scale.main)
        found.append(Claim(f"VF alignment makes d{channels} easier to generate", with_vf, alone, frechet))
    return found


def frontier(results: Results) -> list[tuple[str, str]]:
    """Generation over reconstruction, a line an alignment, a point a width; the paper's in a plot of its own."""
    scale = results.scale
    ours: dict[str, list[tuple[float, float]]] = {}
    for found in aligned(scale):
        pairs = [tuple(results.mean(name(scale, c, found), key) for key in ("rfrechet", "frechet")) for c in scale.channels]
        ours[scale.named(found)] = sorted(pair for pair in pairs if None not in pair)
    theirs = {of or "no VF": sorted((TABLE_2[c, of][0], TABLE_2[c, of][4]) for c in (16, 32, 64)) for of in (None, "mae", "dinov2")}
    here, there = (next(s.title for s in part if s.key.endswith("frechet")) for part in (scale.judge.generation, scale.judge.reconstruction))
    plots = svg_lines(ours, f"here: {here} (lower is better)", x_label=f"{there} (lower is better)")
    plots += svg_lines(theirs, "the paper, Table 2: FID-10K of LightningDiT-B", x_label="rFID")
    return [("The frontier: left and low is good", plots)]


EXPERIMENT = Experiment(
    name="dilemma",
    title="Reconstruction or generation: the dilemma of wide latents",
    look_at="Without VF, does generation fall behind as channels and PSNR rise? Does VF close the gap, and at what cost in PSNR?",
    arms=arms,
    scores=scores,
    claims=claims,
    paper=paper,
    sections=frontier,
)
