"""What each part of the VF loss does (Table 5)."""

from vavae_fast.experiments.dilemma import scores
from vavae_fast.experiments.experiment import Arms, Claim, Experiment, PaperTable
from vavae_fast.experiments.paper import RECONSTRUCTION, TABLE_5
from vavae_fast.experiments.scale import Scale

LOSS = "model.params.lossconfig.params"
FORMS = {
    "full": (),
    "without mcos": (f"{LOSS}.cos_weight=0",),
    "without mdms": (f"{LOSS}.distmat_weight=0",),
    "without margins": (f"{LOSS}.distmat_margin=0", f"{LOSS}.cos_margin=0"),
}


def arms(scale: Scale, seed: int) -> Arms:
    found: Arms = {"none": scale.arm(seed, scale.middle, None)}
    for name, overrides in FORMS.items():
        found[name] = scale.lightningdit_on(scale.tokenizer(seed, scale.middle, scale.main, *overrides))
    return found


def claims(scale: Scale) -> list[Claim]:
    frechet = scale.judge.generation[0]
    without = [Claim(f"the full loss is better than one {name}", "full", name, frechet) for name in list(FORMS)[1:]]
    return [Claim("the full VF loss helps generation", "full", "none", frechet), *without]


def paper(scale: Scale) -> PaperTable:
    note = f"There f16d32 and DINOv2; here d{scale.middle} and its stand-in where one is named below the table."
    return PaperTable("Table 5", (*RECONSTRUCTION, "gFID of LightningDiT-B"), TABLE_5, note)


EXPERIMENT = Experiment(
    name="vf-ablation",
    title="The parts of the VF loss",
    look_at="mcos aligns each token, mdms the relations among tokens, margins leave both slack. Which of them carries the gain?",
    arms=arms,
    scores=scores,
    claims=claims,
    paper=paper,
)
