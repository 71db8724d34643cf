"""Which foundation model to align with (Table 4), and whether it needs to be a trained one."""

from vavae_fast.experiments.dilemma import scores
from vavae_fast.experiments.experiment import Arms, Claim, Experiment, PaperTable
from vavae_fast.experiments.paper import RECONSTRUCTION, TABLE_4
from vavae_fast.experiments.scale import Scale


def arms(scale: Scale, seed: int) -> Arms:
    return {scale.named(found): scale.arm(seed, scale.middle, found) for found in (None, *scale.foundations)}


def claims(scale: Scale) -> list[Claim]:
    frechet, alone = scale.judge.generation[0], scale.named(None)
    helps = [Claim(f"alignment with {of} helps generation", scale.named(found), alone, frechet) for found, of in scale.foundations.items() if of]
    others = [found for found, of in scale.foundations.items() if of and found != scale.main]
    best = [Claim(f"DINOv2 helps more than {scale.foundations[found]}", scale.named(scale.main), scale.named(found), frechet) for found in others]
    control = [found for found in scale.foundations if found == "untrained"]
    trained = "the model must have been trained (implied; the paper has no such control)"
    return helps + best + [Claim(trained, scale.named(scale.main), scale.named(found), frechet) for found in control]


def paper(scale: Scale) -> PaperTable:
    rows = {scale.named(None): TABLE_4[None]} | {scale.named(found): TABLE_4[of] for found, of in scale.foundations.items() if of in TABLE_4}
    missing = sorted(set(TABLE_4) - {None, *scale.foundations.values()})
    lacking = f" Published, and without a counterpart here: {', '.join(f'{of} gFID {TABLE_4[of][-1]}' for of in missing)}." if missing else ""
    return PaperTable("Table 4", (*RECONSTRUCTION, "gFID of LightningDiT-B"), rows, f"There f16d32; here d{scale.middle}.{lacking}")


EXPERIMENT = Experiment(
    name="foundation-models",
    title="What to align with",
    look_at="Does it matter what the aligned-with model has learned? The untrained control tells how much of the gain needs no learning at all.",
    arms=arms,
    scores=scores,
    claims=claims,
    paper=paper,
)
