"""Twice the resolution: four times the tokens, position tables of another grid. Named by the paper as future work."""

from dataclasses import replace

from vavae_fast.config import load_config
from vavae_fast.experiments.dilemma import scores
from vavae_fast.experiments.experiment import Arms, Claim, Experiment
from vavae_fast.experiments.scale import Scale


def name(scale: Scale, size: int, found: str | None) -> str:
    return f"{size} px, {scale.named(found)}"


def arms(scale: Scale, seed: int) -> Arms:
    small, large = scale.images, replace(scale.images, size=2 * scale.images.size)
    at = load_config(scale.configs[0]).model.params.ddconfig.attn_resolutions  # where the latents are, so they are twice as large too
    attention = f"model.params.ddconfig.attn_resolutions={[2 * side for side in at]}"
    found: Arms = {}
    for foundation in (None, scale.main):
        found[name(scale, small.size, foundation)] = scale.arm(seed, scale.middle, foundation)
        tokenizer = scale.tokenizer(seed, scale.middle, foundation, attention, images=large)
        found[name(scale, large.size, foundation)] = scale.lightningdit_on(tokenizer)
    return found


def claims(scale: Scale) -> list[Claim]:
    size = 2 * scale.images.size
    says = "VF helps at twice the resolution too (asked by this project)"
    return [Claim(says, name(scale, size, scale.main), name(scale, size, None), scale.judge.generation[0])]


EXPERIMENT = Experiment(
    name="resolution",
    title="Twice the resolution",
    look_at="Does the same recipe work on a latent grid of twice the side, with and without VF? At 256 px this is the paper's 512 px.",
    arms=arms,
    scores=scores,
    claims=claims,
)
