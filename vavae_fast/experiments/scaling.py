"""Aligned latents need smaller models (Figure 4 c, Table 2): three sizes with and without VF."""

from vavae_fast.commands._html import svg_lines
from vavae_fast.experiments import dilemma
from vavae_fast.experiments.convergence import widths
from vavae_fast.experiments.experiment import Arms, Claim, Experiment, PaperTable, Results
from vavae_fast.experiments.paper import TABLE_2
from vavae_fast.experiments.scale import Scale


def name(scale: Scale, channels: int, found: str | None, size: str) -> str:
    return f"{dilemma.name(scale, channels, found)}, {size}"


def arms(scale: Scale, seed: int) -> Arms:
    tokenizers = {(c, found): scale.tokenizer(seed, c, found) for c in widths(scale) for found in (None, scale.main)}
    return {
        name(scale, *which, size): scale.lightningdit_on(tokenizer, *model.overrides, work=model.work)
        for which, tokenizer in tokenizers.items() for size, model in scale.sizes.items()
    }  # fmt: skip


def claims(scale: Scale) -> list[Claim]:
    frechet, (smallest, *_, largest) = scale.judge.generation[0], scale.sizes
    found = []
    for c in widths(scale):
        for size in scale.sizes:
            found.append(Claim(f"d{c}: VF helps at size {size}", name(scale, c, scale.main, size), name(scale, c, None, size), frechet))
        found.append(Claim(f"d{c}: larger is better, without VF", name(scale, c, None, largest), name(scale, c, None, smallest), frechet))
    return found


def paper(scale: Scale) -> PaperTable:
    rows = {}
    for c, theirs in zip(widths(scale), (32, 64)):
        for found, of in ((None, None), (scale.main, "dinov2")):
            rows |= {name(scale, c, found, size): (TABLE_2[theirs, of][4 + k],) for k, size in enumerate(scale.sizes)}
    note = "B, L and XL name the paper's sizes and what stands for them here."
    return PaperTable("Table 2 and Figure 4 (c): f16d32, f16d64", ("FID-10K",), rows, note)


def plot(results: Results) -> list[tuple[str, str]]:
    scale, frechet = results.scale, results.scale.judge.generation[0]
    ours, theirs = {}, {}
    for c, published in zip(widths(scale), (32, 64)):
        for found, of in ((None, None), (scale.main, "dinov2")):
            line = [(float(k), results.mean(name(scale, c, found, size), frechet.key)) for k, size in enumerate(scale.sizes, 1)]
            ours[dilemma.name(scale, c, found)] = line
            theirs[f"f16d{published}, {of or 'no VF'}"] = [(float(k + 1), TABLE_2[published, of][4 + k]) for k in range(3)]
    label = f"size: {', '.join(f'{k} = {size}' for k, size in enumerate(scale.sizes, 1))}"
    both = svg_lines(ours, f"here: {frechet.title}", x_label=label) + svg_lines(theirs, "the paper: FID-10K", x_label=label)
    return [("Score over size", both)]


EXPERIMENT = Experiment(
    name="scaling",
    title="Sizes of LightningDiT",
    look_at="Is the gap between latents with and without VF larger for small models?",
    arms=arms,
    scores=lambda scale: scale.judge.generation,
    claims=claims,
    paper=paper,
    sections=plot,
)
