"""Aligned latents under other diffusion models: three paths, three predictions. Named by the paper as future work."""

from vavae_fast.experiments.experiment import Arms, Claim, Experiment
from vavae_fast.experiments.ladder import SAMPLER
from vavae_fast.experiments.scale import Scale

PATHS, PREDICTIONS = ("Linear", "GVP", "VP"), ("velocity", "score", "noise")


def name(path: str, prediction: str, aligned: bool = True) -> str:
    return f"{path}, {prediction}" + ("" if aligned else ", no VF")


def arms(scale: Scale, seed: int) -> Arms:
    """All nine on aligned latents; the three usual ones on latents without alignment too. Without the direction loss, which is velocity's."""
    found: Arms = {}
    for aligned in (True, False):
        tokenizer = scale.tokenizer(seed, scale.middle, scale.main if aligned else None)
        for path in PATHS:
            for prediction in PREDICTIONS if aligned else ("noise",) if path == "VP" else ("velocity",):
                transport = (f"transport.path_type={path}", f"transport.prediction={prediction}", "transport.use_cosine_loss=false")
                found[name(path, prediction, aligned)] = scale.lightningdit_on(tokenizer, *transport, *SAMPLER, marks=scale.marks[-1:], draws=4)
    return found


def claims(scale: Scale) -> list[Claim]:
    """Not the paper's claims, but what it would imply."""
    usual, frechet = (("Linear", "velocity"), ("GVP", "velocity"), ("VP", "noise")), scale.judge.generation[0]
    return [Claim(f"VF helps on the {path} path too (asked by this project)", name(path, p), name(path, p, False), frechet) for path, p in usual]


EXPERIMENT = Experiment(
    name="paths",
    title="Other paths and predictions",
    look_at="Does alignment help whatever the diffusion model is? All arms are sampled by dopri5, whose steps adapt.",
    arms=arms,
    scores=lambda scale: scale.judge.generation,
    claims=claims,
)
