"""The sizes at which experiments run: embedded digits on a CPU, CIFAR-10 on one GPU, ImageNet as published."""

from collections.abc import Callable, Mapping
from pathlib import Path

from vavae_fast.config import given_images, given_path
from vavae_fast.errors import BadInput, require
from vavae_fast.experiments.judges import DigitsJudge, FeatureJudge, InceptionJudge
from vavae_fast.experiments.scale import Files, Ladder, Rates, Scale, Size
from vavae_fast.experiments.standins import LEARNS, Classifier, Encoder, Given, Images

# -- demo ------------------------------------------------------------------------------------------------------------

_DEMO = (
    "UCI handwritten digits at 8 x 8 pixels (1,437 to train on, 360 held out); tokenizers f4, LightningDiT on 2 x 2 tokens. The names d4 to d64 "
    "count channels as the paper's do, but a digit has 64 pixels and 2 x 2 x 16 numbers already hold as many, where the paper's f16d16 holds "
    "1/48 of its image: compare directions, never sizes. Stand-ins: {foundations} in place of pretrained models; a small classifier of "
    "digits for VGG in LPIPS; {judge}, in place of Inception. Stand-ins are trained once: seeds differ in tokenizer and LightningDiT. The "
    "400 steps, and that claims are judged after 100 of them too, were chosen after about ten arms of seed 0 had been looked at: seed 0 is no "
    "independent test of that choice, other seeds are."
)
# One core of a busy x86-64 server, torch 2.13, fp32, one thread, 200 steps each: CPU time, which a busy machine makes longer.
_DEMO_RATES = Rates(tokenizer=0.13, aligned=0.165, lightningdit_fixed=0.02, lightningdit_batch=0.065, image=0.011, encoder=0.025, classifier=0.03,
                    overhead=2.0)  # fmt: skip


def demo(configs: Path, files: Files, budget: float, quick: bool) -> Scale:
    """Everything on embedded digits: hours on two CPU cores."""
    images, foundations = Images("builtin:digits/train", "builtin:digits/test", 8), _standins("supervised")
    steps, marks = (4, (2, 4)) if quick else (_budget(500, budget), tuple(_budget(mark, budget) for mark in (100, 200, 400)))
    learning = (2, 2) if quick else (_budget(250, budget), _budget(250, budget))
    rates, judge = _DEMO_RATES, DigitsJudge()
    return Scale(
        name="demo", says=_DEMO.format(foundations=_said(foundations), judge=judge.says), quick=quick,
        configs=(configs / "demo_tokenizer.yaml", configs / "demo.yaml"), images=images, ratio=4,
        channels={4: None, 16: 16, 32: 32, 64: 64}, middle=16, foundations=foundations,
        align=lambda name, at, grid: Encoder(at, grid, name, learning[0], 64, {}, learning[0] * rates.encoder + rates.overhead),
        perceptual=Classifier(images, learning[1], 64, (16, 32, 64), 0, learning[1] * rates.classifier + rates.overhead), judge=judge,
        tokenizer_steps=(f"train.max_steps={steps}", f"train.ckpt_every={steps}", f"model.params.lossconfig.params.disc_start={steps * 3 // 2}"),
        lightningdit=("optimizer.decay_fraction=0",),  # scores along the way are of runs that could have been that long
        steps=steps, batch=64, marks=marks, samples=40 if quick else 400,
        sizes={
            "B": Size(("model.hidden_size=64", "model.depth=3"), 0.3), "L": Size((), 1.0),
            "XL": Size(("model.hidden_size=192", "model.depth=6", "model.num_heads=6"), 3.0),
        },
        ladder=Ladder(("model.params.ddconfig.ch_mult=[1,1]",), 2, ("model.patch_size=2",), ("model.patch_size=1",), 16, 1e-3, marks[-1]),
        uniformity=(120, 1) if quick else (2000, 3), rates=rates,
    )  # fmt: skip


def _standins(*more: str) -> dict[str, str]:
    """What stands for which model of the paper. Labels in the place of CLIP's texts; nothing here stands for SAM."""
    return {"contrastive": "dinov2", "masked": "mae"} | dict.fromkeys(more, "clip") | {"untrained": ""}


def _said(foundations: Mapping[str, str]) -> str:
    called = {"dinov2": "DINOv2", "mae": "MAE", "clip": "CLIP"}
    pairs = (f"a small ViT for {called[of]}, {LEARNS[name]}" if of else f"the same ViT {LEARNS[name]}" for name, of in foundations.items())
    return "; ".join(pairs)


# -- CIFAR-10 --------------------------------------------------------------------------------------------------------

_CIFAR = (
    "CIFAR-10 at 32 x 32 pixels; tokenizers f4, LightningDiT on 8 x 8 tokens. A token of 4 x 4 pixels holds 48 values, where the paper's of "
    "16 x 16 hold 768: compare directions, never sizes. {foundations}; a small classifier of the same images for VGG in LPIPS; scores: {judge}."
)


def cifar(configs: Path, files: Files, budget: float, quick: bool) -> Scale:
    """CIFAR-10 on one GPU: encoders that learned from the same images, or timm models whose weights are given."""
    cure = "the folder of CIFAR-10's images, a folder a class"
    images = Images(_given(files.data, "--data", cure), _given(files.valid, "--valid", "a folder of images that are not trained on"), 32)
    steps, marks = (4, (2, 4)) if quick else (_budget(20_000, budget), tuple(_budget(mark, budget) for mark in (2500, 5000, 10_000, 20_000, 40_000)))
    learning, batch = ((2, 2), 32) if quick else ((_budget(20_000, budget), _budget(5000, budget)), 512)
    shape = dict(dim=64, depth=2) if quick else dict(dim=256, depth=6, heads=4, lr=1e-3)
    widths = (16, 32) if quick else (64, 128, 256)
    own, judging = (Classifier(images, learning[1], batch, widths, seed) for seed in (0, 1))
    judge = FeatureJudge(judging, images)
    if files.inception:
        reference = _given(files.reference, "--reference", "an .npz of CIFAR-10's images or statistics")
        judge = InceptionJudge(_given(files.inception, "--inception", "Inception's weights"), reference, configs / "cifar_tokenizer.yaml")
    foundations = _standins() | dict.fromkeys(files.foundations, "")

    def align(name: str, at: Images, grid: int) -> Encoder | Given:
        if name in files.foundations:
            return _given_encoder(name, files)
        return Encoder(at, grid, name, learning[0], batch, shape)

    said = _said(_standins()) + "".join(f"; {name} as given" for name in files.foundations)
    return Scale(
        name="cifar", says=_CIFAR.format(foundations=f"Stand-ins for pretrained models: {said}", judge=judge.says), quick=quick,
        configs=(configs / "cifar_tokenizer.yaml", configs / "cifar.yaml"), images=images, ratio=4,
        channels={4: None, 16: 16, 32: 32, 64: 64}, middle=32, foundations=foundations, align=align, perceptual=own, judge=judge,
        tokenizer_steps=(f"train.max_steps={steps}", f"model.params.lossconfig.params.disc_start={steps}", *_tiny(quick)),
        lightningdit=("sample.fid_num=10000", *_tiny_dit(quick)), steps=steps, batch=256, marks=marks, samples=64 if quick else 10_000,
        sizes={"B": Size((), 1.0), "L": Size(("model.hidden_size=384", "model.depth=12", "model.num_heads=6"), 3.4),
               "XL": Size(("model.hidden_size=512", "model.depth=16", "model.num_heads=8"), 8.0)},
        ladder=Ladder(("model.params.ddconfig.ch_mult=[1,2]",), 2, ("model.patch_size=2",), ("model.patch_size=1",), 64, 1e-4, marks[-1]),
        uniformity=(120, 1) if quick else (10_000, 10), rates=None,
    )  # fmt: skip


def _tiny(quick: bool) -> tuple[str, ...]:
    small = ("model.params.ddconfig.ch=32", "model.params.ddconfig.num_res_blocks=1", "train.global_batch_size=8", "train.micro_batch_size=8")
    return small if quick else ()


def _tiny_dit(quick: bool) -> tuple[str, ...]:
    small = ("model.hidden_size=32", "model.depth=1", "model.num_heads=2", "train.global_batch_size=16", "sample.num_sampling_steps=4")
    return small if quick else ()


# -- ImageNet --------------------------------------------------------------------------------------------------------

_IMAGENET = "ImageNet at 256 x 256, published configs: 50-epoch tokenizers, {steps:,} LightningDiT steps; {judge}; FID of {samples:,} samples."


def imagenet(configs: Path, files: Files, budget: float, quick: bool) -> Scale:
    """The published recipe: several GPUs and days an arm."""
    require(not quick, "--quick", quick, "used with --scale demo or cifar")
    images = Images(_given(files.data, "--data", "ImageNet's training images"), _given(files.valid, "--valid", "ImageNet's validation images"), 256)
    weights = {name: _given(getattr(files, name), f"--{name}", what) for name, what in _NEEDED_WEIGHTS.items()}
    if "dinov2" not in files.foundations:
        raise BadInput("--foundation: dinov2=FILE is needed at this scale; mae, sam and clip are compared with it where they are given")
    marks = tuple(_budget(mark, budget) for mark in (20_000, 40_000, 80_000, 120_000, 160_000, 200_000))
    judge = InceptionJudge(weights["inception"], weights["reference"], configs / "tokenizer_f16d32_50ep.yaml", weights["vgg"], weights["lpips"])
    known = {"dinov2", "mae", "sam", "clip"}
    tokenizer = () if budget == 1 else (f"train.max_steps={_budget(250_225, budget)}",)
    return Scale(
        name="imagenet", says=_IMAGENET.format(steps=marks[-1], judge=judge.says, samples=10_000), quick=False,
        configs=(configs / "tokenizer_f16d32_50ep.yaml", configs / "lightningdit_b_160ep.yaml"), images=images, ratio=16,
        channels={16: 16, 32: 32, 64: 64}, middle=32, foundations={name: name if name in known else "" for name in files.foundations},
        align=lambda name, at, grid: _given_encoder(name, files),
        perceptual=Given((f"perceptual.vgg_weights={weights['vgg']}", f"perceptual.linear_weights={weights['lpips']}")), judge=judge,
        tokenizer_steps=(*tokenizer, "train.fused=true"), lightningdit=("train.fused=true", "sample.per_proc_batch_size=64"),
        steps=250_225, batch=1024, marks=marks, samples=10_000,
        sizes={size: Size((f"model.model_type=LightningDiT-{size}/1",), work) for size, work in (("B", 1.0), ("L", 3.5), ("XL", 5.2))},
        ladder=Ladder(("model.params.ddconfig.ch_mult=[1,2,4,4]", "model.params.ddconfig.attn_resolutions=[]"), 8,
                      ("model.model_type=LightningDiT-XL/2",), ("model.model_type=LightningDiT-XL/1",), 256, 1e-4, _budget(100_000, budget)),
        uniformity=(10_000, 10), rates=None, published=files.published,
    )  # fmt: skip


_NEEDED_WEIGHTS = {
    "inception": "the weights of FID's Inception",
    "reference": "ADM's VIRTUAL_imagenet256_labeled.npz",
    "vgg": "torchvision's VGG16 weights",
    "lpips": "LPIPS v0.1's linear weights for VGG",
}


def _given_encoder(name: str, files: Files) -> Given:
    return Given((f"model.params.use_vf={name}", f"foundation.weights={files.foundations[name]}"))


def _given(value: str | None, flag: str, what: str) -> str:
    """An image set or a file, as an absolute path: the hash of an arm holds it."""
    if value is None:
        raise BadInput(f"{flag}: missing; give {what}")
    checked = given_images(value, flag, what) if flag in ("--data", "--valid") else str(given_path(value, flag, what))
    return checked if checked.startswith("builtin:") else str(Path(checked).absolute())


SCALES: dict[str, Callable[[Path, Files, float, bool], Scale]] = {"demo": demo, "cifar": cifar, "imagenet": imagenet}


def _budget(steps: int, factor: float) -> int:
    return max(2, round(steps * factor))
