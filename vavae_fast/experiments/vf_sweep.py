"""Weights and margins of the VF loss about the configured ones: named by the paper as future work."""

from vavae_fast.config import load_config
from vavae_fast.experiments.dilemma import scores
from vavae_fast.experiments.experiment import Arms, Experiment
from vavae_fast.experiments.scale import Scale
from vavae_fast.experiments.vf_ablation import FORMS, LOSS

FACTORS = (0.2, 5.0)  # of the configured weight


def arms(scale: Scale, seed: int) -> Arms:
    loss = load_config(scale.configs[0]).model.params.lossconfig.params
    margins = (2 * loss.distmat_margin, 2 * loss.cos_margin)
    forms = {f"weight {loss.vf_weight * factor:g}": (f"{LOSS}.vf_weight={loss.vf_weight * factor:g}",) for factor in FACTORS} | {
        f"weight {loss.vf_weight:g} taken as it is": (f"{LOSS}.adaptive_vf=false",),
        "margins 0": FORMS["without margins"],
        f"margins {margins[0]:g}, {margins[1]:g}": (f"{LOSS}.distmat_margin={margins[0]:g}", f"{LOSS}.cos_margin={margins[1]:g}"),
    }
    found: Arms = {"as configured": scale.arm(seed, scale.middle, scale.main)}
    for name, overrides in forms.items():
        found[name] = scale.lightningdit_on(scale.tokenizer(seed, scale.middle, scale.main, *overrides))
    return found


EXPERIMENT = Experiment(
    name="vf-sweep",
    title="Weights and margins of the VF loss",
    look_at="How far may weight and margins go before reconstruction or generation suffers? One arm takes its weight as it is, without adapting it.",
    arms=arms,
    scores=scores,
    claims=lambda scale: [],
)
