"""The config of a tokenizer run: the reference's LDM-style YAML, plus where to find images and frozen weights.

Keys of the reference repository come first and keep its defaults; those under `# ours` leave its results as they are.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from vavae_fast.errors import BadInput, require
from vavae_fast.schema import LogConfig, TrainConfig


@dataclass(frozen=True)
class TokenizerLossConfig:
    """`model.params.lossconfig.params`. Null means the published recipe's first stage."""

    disc_start: int | None = None  # counts the steps of both optimizers, as the reference: 5001 is iteration 2501
    kl_weight: float = 1.0
    pixelloss_weight: float = 1.0
    perceptual_weight: float = 1.0
    disc_weight: float = 1.0
    disc_factor: float = 1.0
    disc_num_layers: int = 3
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    disc_ndf: int = 64  # ours: channels of the discriminator's first layer
    vf_weight: float | None = None
    adaptive_vf: bool = False
    vf_loss_type: str | None = None  # read by no code of the reference either
    distmat_margin: float | None = None
    cos_margin: float | None = None
    distmat_weight: float = 1.0
    cos_weight: float = 1.0

    def __post_init__(self):
        stage_one = dict(disc_start=5001, vf_weight=0.5, distmat_margin=0.0, cos_margin=0.0)
        for key, value in stage_one.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        for key in ("disc_start", "kl_weight", "perceptual_weight", "disc_weight", "disc_factor"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        for key in ("vf_weight", "distmat_margin", "cos_margin", "distmat_weight", "cos_weight"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        for key in ("disc_num_layers", "disc_ndf"):
            require(getattr(self, key) > 0, key, getattr(self, key), "above 0")


@dataclass(frozen=True)
class TargetConfig:
    """`target:` and `params:` of parts that the reference builds by import path; ours are built by name."""

    target: str | None = None
    params: dict = field(default_factory=dict)


@dataclass(frozen=True)
class LossTargetConfig:
    target: str | None = None
    params: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)


@dataclass(frozen=True)
class AutoencoderConfig:
    """`model.params.ddconfig`."""

    double_z: bool = True
    z_channels: int = 32
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    num_res_blocks: int = 2
    attn_resolutions: list[int] = field(default_factory=lambda: [16])
    dropout: float = 0.0

    def __post_init__(self):
        require(self.double_z, "double_z", self.double_z, "true: the posterior has a mean and a variance")
        for key in ("in_channels", "out_ch"):
            require(getattr(self, key) == 3, key, getattr(self, key), "3: images are red, green and blue")
        for key in ("z_channels", "resolution", "ch", "num_res_blocks"):
            require(getattr(self, key) > 0, key, getattr(self, key), "above 0")
        require(bool(self.ch_mult) and min(self.ch_mult) > 0, "ch_mult", self.ch_mult, "a list of whole numbers above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True)
class TokenizerParams:
    """`model.params` of a tokenizer config."""

    monitor: str | None = None
    embed_dim: int = 32
    use_vf: str | None = None  # the foundation model, by a name of models/foundation_models.py or timm:<name>; null: no alignment
    reverse_proj: bool = False  # true: project z to the features; false: the features to z
    proj_fix: bool = False  # do not train the projection
    ckpt_path: str | None = None
    ignore_keys: list[str] = field(default_factory=list)
    image_key: str = "image"
    lossconfig: LossTargetConfig = field(default_factory=LossTargetConfig)
    ddconfig: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    def __post_init__(self):
        require(self.embed_dim > 0, "embed_dim", self.embed_dim, "above 0")
        if ":" in (self.use_vf or "") and not self.use_vf.startswith("timm:"):
            found = f"{self.use_vf!r} is an import path, and a config, which may come with somebody's weights, runs no code"
            raise BadInput(f"model.params.use_vf: {found}; name it on the command line: --foundation {self.use_vf}")


@dataclass(frozen=True)
class TokenizerModelConfig:
    base_learning_rate: float = 1e-4  # taken as it stands, never scaled
    target: str | None = None
    params: TokenizerParams = field(default_factory=TokenizerParams)

    def __post_init__(self):
        require(self.base_learning_rate > 0, "base_learning_rate", self.base_learning_rate, "above 0")


@dataclass(frozen=True)
class TokenizerDataParams:
    batch_size: int = 8  # per process
    wrap: bool = False
    num_workers: int | None = None
    train: TargetConfig = field(default_factory=TargetConfig)
    validation: TargetConfig = field(default_factory=TargetConfig)
    test: TargetConfig = field(default_factory=TargetConfig)

    def __post_init__(self):
        require(self.batch_size > 0, "batch_size", self.batch_size, "above 0")


@dataclass(frozen=True)
class TokenizerDataConfig:
    """`data:` of a tokenizer config."""

    target: str | None = None
    params: TokenizerDataParams = field(default_factory=TokenizerDataParams)
    # ours
    path: str | None = None  # images; null: data.params.train.params.data_root
    valid_path: str | None = None  # images that are not trained on, for the scores of log.valid_every; null: none
    image_size: int | None = None  # null: ddconfig.resolution
    crop: Literal["random", "center"] = "random"
    flip: bool = False  # the reference does not flip
    backend: Literal["auto", "pil", "fast", "dali"] = "auto"  # what decodes and cuts; auto: fast, or pil without a C++ compiler; the same pixels
    max_corrupt: float = 0.001  # share of the images that may turn out unreadable: named, and replaced; more is an error

    def __post_init__(self):
        require(0 <= self.max_corrupt < 1, "max_corrupt", self.max_corrupt, "0 or more and below 1")


@dataclass(frozen=True)
class TrainerConfig:
    """`lightning.trainer`: what sets the number of steps and the global batch; the rest is accepted for the reference's sake."""

    devices: int = 1
    num_nodes: int = 1
    strategy: str | None = None
    accelerator: str | None = None
    max_epochs: int | None = None
    precision: int | str = 32
    gpus: int | str | None = None
    benchmark: bool | None = None
    accumulate_grad_batches: int = 1

    def __post_init__(self):
        for key in ("devices", "num_nodes", "accumulate_grad_batches"):
            require(getattr(self, key) > 0, key, getattr(self, key), "above 0")
        require(self.max_epochs is None or self.max_epochs > 0, "max_epochs", self.max_epochs, "above 0")


@dataclass(frozen=True)
class LightningConfig:
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: dict = field(default_factory=dict)
    modelcheckpoint: dict = field(default_factory=dict)


@dataclass(frozen=True)
class PerceptualConfig:
    """`perceptual:`, ours: where LPIPS finds its weights. Needed when perceptual_weight is above 0."""

    vgg_weights: str | None = None  # torchvision's vgg16 state dict
    linear_weights: str | None = None  # LPIPS v0.1's linear layers for vgg
    standin: str | None = None  # a small trained stand-in (demos)


@dataclass(frozen=True)
class FoundationConfig:
    """`foundation:`, ours: the frozen model behind `use_vf`."""

    weights: str | None = None  # a local file, or "hub" to let timm fetch it
    # legacy: images in [-1, 1], as the released VA-VAE was trained; trained: normalised as the model was trained;
    # auto: legacy for DINOv2 and MAE, the two that the reference knows, trained for all others
    input_range: Literal["auto", "legacy", "trained"] = "auto"
    pixels_per_patch: int = 16  # of the image behind one patch of the model; fewer: finer features, more tokens
    standin: str | None = None  # a small trained stand-in (demos), with use_vf: standin

    def __post_init__(self):
        require(self.pixels_per_patch > 0, "pixels_per_patch", self.pixels_per_patch, "above 0")


@dataclass(frozen=True)
class StageConfig:
    """One of `stages:`, ours: a part of a run, for what the reference does with a chain of runs. What it leaves null is as without it.

    A stage begins as a run with `weight_init` does: from the weights of the one before, its discriminator and projection among them, with
    fresh optimizers; disc_start and decay_fraction count from its beginning. Its images are those that come next in the run's order, where
    the reference's next run draws the first epochs once more.
    """

    name: str
    epochs: int | None = None  # its length, in this or
    steps: int | None = None  # in this; 0 leaves the stage out
    base_learning_rate: float | None = None
    proj_fix: bool | None = None
    disc_start: int | None = None  # and these of lossconfig.params
    disc_factor: float | None = None
    disc_weight: float | None = None
    kl_weight: float | None = None
    vf_weight: float | None = None
    adaptive_vf: bool | None = None
    distmat_margin: float | None = None
    cos_margin: float | None = None
    distmat_weight: float | None = None
    cos_weight: float | None = None

    def __post_init__(self):
        require(self.name.isidentifier(), "name", self.name, "one word of letters, digits and _")
        lengths = [length for length in (self.epochs, self.steps) if length is not None]
        if len(lengths) != 1:
            raise BadInput(f"epochs, steps: one of them is the length of stage {self.name}, got {'both' if lengths else 'neither'}")
        require(lengths[0] >= 0, "epochs, steps", lengths[0], "0 or more")

    def changes(self, schema: type) -> dict[str, float]:
        """What it sets of the keys of `schema`."""
        names = {f.name for f in fields(schema)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in names and getattr(self, f.name) is not None}


@dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer run: the reference's YAML, unchanged."""

    model: TokenizerModelConfig = field(default_factory=TokenizerModelConfig)
    data: TokenizerDataConfig = field(default_factory=TokenizerDataConfig)
    lightning: LightningConfig = field(default_factory=LightningConfig)
    ckpt_path: str | None = None  # weights to extract or evaluate with
    weight_init: str | None = None  # weights to start from
    init_weight: str | None = None  # the same; the name that the reference's code reads
    # ours
    train: TrainConfig = field(default_factory=lambda: TrainConfig(log_every=50, ckpt_every=5000))
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    max_grad_norm: float | None = None  # L2, of each network; null: no clipping
    decay_fraction: float = 0.0  # the last part of the run, or of each stage, in which the learning rate falls linearly to 0
    stages: list[StageConfig] = field(default_factory=list)  # parts of the run in their order; none: the run is one, max_epochs or max_steps long
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        params = self.model.params
        require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0, or null")
        require(0 <= self.decay_fraction <= 1, "decay_fraction", self.decay_fraction, "in [0, 1]")
        if self.image_size % 2 ** (len(params.ddconfig.ch_mult) - 1):
            raise BadInput(f"data.image_size {self.image_size} is not a multiple of the downsampling factor {self.downsample_ratio}")
        self._check_stages()
        given = {self.weight_init, self.init_weight, params.ckpt_path} - {None}
        if len(given) > 1:
            raise BadInput(f"weight_init, init_weight and model.params.ckpt_path name different files ({', '.join(sorted(given))}); keep one")
        if params.ignore_keys:
            raise BadInput("model.params.ignore_keys: weights are loaded whole or not at all; remove the key, or the entries from the file")

    def _check_stages(self) -> None:
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), "stages", names, "of different names")
        epochs = self.lightning.trainer.max_epochs
        require(not names or epochs is None, "lightning.trainer.max_epochs", epochs, "null with stages, which have lengths of their own")
        for stage in self.stages:
            try:
                self.at(stage)
            except BadInput as error:
                raise BadInput(f"stages.{stage.name}.{error}") from None

    def at(self, stage: StageConfig) -> "TokenizerConfig":
        """The config of a run that is this stage alone."""
        model, params, loss = self.model, self.model.params, self.model.params.lossconfig
        loss = replace(loss, params=replace(loss.params, **stage.changes(TokenizerLossConfig)))
        params = replace(params, lossconfig=loss, **stage.changes(TokenizerParams))
        return replace(self, model=replace(model, params=params, **stage.changes(TokenizerModelConfig)), stages=[])

    @property
    def start_weights(self) -> str | None:
        """The weights that training starts from; null: none."""
        return self.weight_init or self.init_weight or self.model.params.ckpt_path

    @property
    def image_size(self) -> int:
        return self.data.image_size or self.model.params.ddconfig.resolution

    @property
    def downsample_ratio(self) -> int:
        return 2 ** (len(self.model.params.ddconfig.ch_mult) - 1)

    @property
    def image_path(self) -> str | None:
        return self.data.path or self.data.params.train.params.get("data_root")

    @property
    def global_batch_size(self) -> int:
        trainer = self.lightning.trainer
        return self.train.global_batch_size or (
            self.data.params.batch_size * trainer.devices * trainer.num_nodes * trainer.accumulate_grad_batches
        )
