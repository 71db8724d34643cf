"""Images without labels: a flat folder of files, one class, no guidance to fall back on. Other data sets are the paper's future work."""

from vavae_fast.experiments.experiment import Arms, Claim, Experiment
from vavae_fast.experiments.judges import Score
from vavae_fast.experiments.scale import Scale
from vavae_fast.experiments.stages import FlatImages

ONE_CLASS = ("data.num_classes=1", "model.class_dropout_prob=0")
BALANCE = Score("balance", "balance of the classes drawn, 0 to 1", True, digits=3)


def name(scale: Scale, found: str | None) -> str:
    return f"no labels, {scale.named(found)}"


def arms(scale: Scale, seed: int) -> Arms:
    found: Arms = {f"labels, {scale.named(f)}": scale.arm(seed, scale.middle, f) for f in (None, scale.main)}
    flat = FlatImages(scale.images, scale.rates and scale.rates.overhead)
    for foundation in (None, scale.main):
        tokenizer = scale.tokenizer(seed, scale.middle, foundation)
        found[name(scale, foundation)] = scale.lightningdit_on(tokenizer, *ONE_CLASS, images=flat)
    return found


def needs(scale: Scale) -> str | None:
    if scale.name != "imagenet":
        return None
    return "is for scales demo and cifar; for images of your own give extract a folder without class folders and train with data.num_classes=1"


def claims(scale: Scale) -> list[Claim]:
    says = "VF helps without labels too (asked by this project)"
    return [Claim(says, name(scale, scale.main), name(scale, None), scale.judge.generation[0])]


EXPERIMENT = Experiment(
    name="unlabeled",
    title="Images without labels",
    look_at="The judge's classifier says which classes were drawn without being asked for: balance 1 is all equally often.",
    arms=arms,
    scores=lambda scale: (*scale.judge.generation, BALANCE),
    claims=claims,
    needs=needs,
)
