"""What a scale is: configs, data, stand-ins and budgets, and from them the work of an arm."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vavae_fast.experiments.judges import Judge
from vavae_fast.experiments.stages import FlatImages, Latents, LightningDiT, Tokenizer, Uniformity
from vavae_fast.experiments.standins import Classifier, Encoder, Given, Images


@dataclass(frozen=True)
class Files:
    """What the user gave: images, and pretrained weights by name."""

    data: str | None = None
    valid: str | None = None
    inception: str | None = None
    reference: str | None = None
    vgg: str | None = None
    lpips: str | None = None
    foundations: Mapping[str, str] = field(default_factory=dict)  # dinov2, mae, sam, clip, or timm:<name> -> weights
    published: Mapping[str, str] = field(default_factory=dict)  # 64ep, 800ep, vavae, latents -> path


@dataclass(frozen=True)
class Size:
    """A LightningDiT, and its work relative to the one of the ablations."""

    overrides: tuple[str, ...]
    work: float


@dataclass(frozen=True)
class Ladder:
    """What the first rung of Table 1 is at a scale, and what its last one goes to."""

    tokenizer: tuple[str, ...]  # overrides: half the compression, 4 channels, in the place of the SD-VAE
    ratio: int  # at which it compresses
    patch_two: tuple[str, ...]
    patch_one: tuple[str, ...]
    batch: int  # before it is made four times as large
    lr: float  # before it is doubled
    steps: int  # of the rungs with the large batch; four times as many before


@dataclass(frozen=True)
class Rates:
    """CPU seconds of one core, measured: of a tokenizer's step and of one with alignment, of a LightningDiT's step, of a drawn image."""

    tokenizer: float
    aligned: float
    lightningdit_fixed: float
    lightningdit_batch: float
    image: float
    encoder: float
    classifier: float
    overhead: float  # of any piece of work


@dataclass(frozen=True)
class Scale:
    """Configs, data, stand-ins and budgets; and from them the work of an arm."""

    name: str
    says: str  # under every table
    quick: bool
    configs: tuple[Path, Path]  # of tokenizer and LightningDiT
    images: Images
    ratio: int  # at which tokenizers compress
    channels: Mapping[int, int | None]  # of the dilemma -> those of the paper's Table 2 that stand beside
    middle: int  # channels of the ablations: the paper's 32
    foundations: Mapping[str, str]  # name of an arm's alignment -> the paper's model that it stands for, or "" for none
    align: Callable[[str, Images, int], Encoder | Given]  # (name, images, latent grid) -> what the VF loss aligns with
    perceptual: Classifier | Given
    judge: Judge
    tokenizer_steps: tuple[str, ...]  # overrides
    lightningdit: tuple[str, ...]  # overrides
    steps: int  # of a tokenizer, for predictions
    batch: int  # of a LightningDiT
    marks: tuple[int, ...]  # steps after which a LightningDiT is sampled
    samples: int
    sizes: Mapping[str, Size]  # the paper's B, L and XL -> here
    ladder: Ladder
    uniformity: tuple[int, int]  # tokens, repeats
    rates: Rates | None
    published: Mapping[str, str] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """The alignment that stands for DINOv2."""
        return next(name for name, of in self.foundations.items() if of == "dinov2")

    def tokenizer(
        self, seed: int, channels: int, foundation: str | None, *overrides: str, images: Images | None = None, ratio: int | None = None
    ) -> Tokenizer:
        images, wide = images or self.images, (f"model.params.embed_dim={channels}", f"model.params.ddconfig.z_channels={channels}")
        aligned = None if foundation is None else self.align(foundation, images, images.size // (ratio or self.ratio))
        seconds = None
        if self.rates:
            step = self.rates.tokenizer if foundation is None else self.rates.aligned
            seconds = self.rates.overhead + self.steps * step * (images.size / self.images.size) ** 2
        return Tokenizer(self.configs[0], (*self.tokenizer_steps, *wide, *overrides), images, aligned, self.perceptual, self.judge, seed, seconds)

    def latents(self, tokenizer: Tokenizer, images: FlatImages | None = None) -> Latents:
        return Latents(tokenizer, images, self.rates and self.rates.overhead)

    def lightningdit_on(
        self, tokenizer: Tokenizer, *overrides: str, marks: tuple[int, ...] | None = None, images: FlatImages | None = None,
        work: float = 1.0, draws: float = 1.0, batch: int | None = None,
    ) -> LightningDiT:  # fmt: skip
        """`work` of a step and `draws` of an image relative to the scale's own, for the prediction alone."""
        marks, seconds = marks or self.marks, None
        if self.rates:
            r, share = self.rates, (batch or self.batch) / self.batch * (tokenizer.images.size / self.images.size) ** 2
            step = (r.lightningdit_fixed + r.lightningdit_batch * share) * work
            seconds = 2 * r.overhead + marks[-1] * step + len(marks) * self.samples * r.image * work * draws
        wide = f"model.in_chans={_channels(tokenizer)}"
        return LightningDiT(self.configs[1], (*self.lightningdit, wide, *overrides), self.latents(tokenizer, images), marks, self.samples,
                            self.judge, images is None, tokenizer.seed, seconds)  # fmt: skip

    def arm(self, seed: int, channels: int, foundation: str | None) -> LightningDiT:
        """The arm that most experiments share."""
        return self.lightningdit_on(self.tokenizer(seed, channels, foundation))

    def uniformity_of(self, tokenizer: Tokenizer) -> Uniformity:
        tokens, repeats = self.uniformity
        return Uniformity(self.latents(tokenizer), tokens, repeats, self.rates and repeats * tokens * 0.006)

    def named(self, foundation: str | None) -> str:
        """Of an arm."""
        return "no VF" if foundation is None else f"VF {foundation}"


def _channels(tokenizer: Tokenizer) -> int:
    return next(int(word.partition("=")[2]) for word in tokenizer.overrides if word.startswith("model.params.embed_dim="))
