"""The published checkpoints by the published presets, scored here (Table 3)."""

from vavae_fast.experiments.experiment import Arms, Experiment, PaperTable
from vavae_fast.experiments.judges import Score
from vavae_fast.experiments.paper import TABLE_3
from vavae_fast.experiments.scale import Scale
from vavae_fast.experiments.stages import Published

PRESETS = {"64ep": ("paper-64ep", "lightningdit_xl_64ep.yaml"), "800ep": ("paper-800ep", "lightningdit_xl_800ep.yaml")}
SAMPLES = 50_000
SCORES = (Score("frechet", "FID", False, digits=2), Score("sfid", "sFID", False, digits=2), Score("is", "IS", True),
          Score("precision", "precision", True, digits=2), Score("recall", "recall", True, digits=2))  # fmt: skip


def name(preset: str, guided: bool) -> str:
    return f"{preset}, {'guided' if guided else 'without guidance'}"


def needs(scale: Scale) -> str | None:
    if scale.name == "imagenet" and {"vavae", "latents"} <= set(scale.published) and set(PRESETS) & set(scale.published):
        return None
    files = "vavae=FILE, latents=FOLDER (of latents_stats.pt), 64ep=FILE and/or 800ep=FILE"
    return f"needs --scale imagenet and the published files: --published NAME=PATH for {files}"


def arms(scale: Scale, seed: int) -> Arms:
    found: Arms = {}
    for given, (preset, config) in PRESETS.items():
        for guided in (False, True) if given in scale.published else ():
            files = scale.published[given], scale.published["vavae"], scale.published["latents"]
            path = scale.configs[1].with_name(config)
            found[name(preset, guided)] = Published(path, preset, *files, guided, SAMPLES, scale.judge, seed)
    return found


def paper(scale: Scale) -> PaperTable:
    rows = {name(*which): row for which, row in TABLE_3.items()}
    return PaperTable("Table 3", ("FID", "sFID", "IS", "precision", "recall"), rows, "The same weights: here the halves may be compared.")


EXPERIMENT = Experiment(
    name="system",
    title="The published system",
    look_at="Do the published weights give the published scores, by this package's sampler and its evaluation?",
    arms=arms,
    scores=lambda scale: SCORES,
    claims=lambda scale: [],
    paper=paper,
    needs=needs,
)
