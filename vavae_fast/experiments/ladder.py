"""From DiT to LightningDiT, one change at a time (Table 1)."""

from vavae_fast.commands._html import svg_lines
from vavae_fast.experiments.experiment import Arms, Claim, Experiment, PaperTable, Results
from vavae_fast.experiments.paper import TABLE_1
from vavae_fast.experiments.scale import Scale

# DiT's own: noise prediction on a VP path, t uniform, AdamW's default beta2, LayerNorm, GELU, absolute positions alone.
DIT = (
    "transport.path_type=VP", "transport.prediction=noise", "transport.use_lognorm=false", "transport.use_cosine_loss=false",
    "optimizer.beta2=0.999", "model.use_swiglu=false", "model.use_rmsnorm=false", "model.use_rope=false",
)  # fmt: skip
# One sampler for all rungs: its steps adapt, so no path is at a disadvantage.
SAMPLER = ("sample.sampling_method=dopri5", "sample.timestep_shift=0")
LARGE_BATCH, LAST = "+ batch x4, lr x2", "+ patch 1, VA-VAE"
RUNGS = {
    "DiT": (),
    "+ rectified flow": ("transport.path_type=Linear", "transport.prediction=velocity"),
    LARGE_BATCH: (),  # two numbers that depend on the scale, and a quarter of the steps: as many images
    "+ AdamW beta2 0.95": ("optimizer.beta2=0.95",),
    "+ logit-normal t": ("transport.use_lognorm=true",),
    "+ velocity direction loss": ("transport.use_cosine_loss=true",),
    "+ SwiGLU": ("model.use_swiglu=true",),
    "+ RMSNorm": ("model.use_rmsnorm=true",),
    "+ rotary positions": ("model.use_rope=true",),
    LAST: (),  # another tokenizer, and a patch of one latent
}


def arms(scale: Scale, seed: int) -> Arms:
    """Each rung is the one before and one line."""
    step, found = scale.ladder, {}
    compressed = scale.tokenizer(seed, 4, None, *step.tokenizer, ratio=step.ratio)
    tokenizer, shape, large = compressed, (*step.patch_two, f"vae.downsample_ratio={step.ratio}"), False
    so_far = (*DIT, *SAMPLER)
    for name, line in RUNGS.items():
        if name == LARGE_BATCH:
            large = True
        if name == LAST:
            tokenizer, shape = scale.tokenizer(seed, scale.middle, scale.main), step.patch_one
        so_far = (*so_far, *line)
        batch, lr = (4 * step.batch, 2 * step.lr) if large else (step.batch, step.lr)
        budget = (f"train.global_batch_size={batch}", f"optimizer.lr={lr}")
        marks = (step.steps if large else 4 * step.steps,)
        found[name] = scale.lightningdit_on(tokenizer, *shape, *so_far, *budget, marks=marks, draws=4, batch=batch)
    return found


def claims(scale: Scale) -> list[Claim]:
    """Every rung the paper measured as an improvement."""
    names, frechet = list(RUNGS), scale.judge.generation[0]
    better = [(a, b) for a, b in zip(names, names[1:]) if TABLE_1[b] < TABLE_1[a]]
    return [Claim(f"{b.removeprefix('+ ')} improves on the rung before", b, a, frechet) for a, b in better] + [
        Claim("the whole ladder: LightningDiT with VA-VAE over DiT", names[-1], names[0], frechet)
    ]


def paper(scale: Scale) -> PaperTable:
    note = (
        "There: XL models, SD-VAE f8d4 at patch 2, then VA-VAE f16d32 at patch 1. Here every rung up to the last works on a tokenizer of half "
        "the compression with 4 channels, trained here without alignment, in the SD-VAE's place; DiT's learned variance and its discrete steps are "
        "left out: the first rung predicts noise on the continuous VP path."
    )
    return PaperTable("Table 1", ("FID-50k",), {name: (value,) for name, value in TABLE_1.items()}, note)


def climb(results: Results) -> list[tuple[str, str]]:
    """Score by rung: ours, and the paper's in a plot of its own."""
    frechet = results.scale.judge.generation[0]
    ours = [(float(rung), results.mean(name, frechet.key)) for rung, name in enumerate(RUNGS, 1)]
    theirs = [(float(rung), value) for rung, value in enumerate(TABLE_1.values(), 1)]
    plots = svg_lines({"here": ours}, f"here: {frechet.title}", x_label="rung") + svg_lines({"paper": theirs}, "the paper: FID-50k", x_label="rung")
    return [("The climb", plots)]


EXPERIMENT = Experiment(
    name="ladder",
    title="From DiT to LightningDiT, ten rungs",
    look_at="Each rung differs from the one before in one line. Which lines help at this size, and by how much?",
    arms=arms,
    scores=lambda scale: scale.judge.generation,
    claims=claims,
    paper=paper,
    sections=climb,
)
