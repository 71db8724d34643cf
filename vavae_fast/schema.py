"""The config of a LightningDiT run: every key, its default, its reason, its check.

Keys of the reference repository come first and keep its defaults; those under `# ours` leave its results as they are.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from vavae_fast.errors import BadInput, require

SIZES = ("S", "B", "L", "XL", "1p0B", "1p6B")
MODEL_TYPES = (*(f"LightningDiT-{size}/{patch}" for size in SIZES for patch in (1, 2)), "custom")

# Published settings, by the paper's table; `sample --preset` overrides `sample.*` with them.
_PAPER = dict(mode="ODE", sampling_method="euler", num_sampling_steps=250, timestep_shift=0.3, labels="random",
              cfg_interval_end=1.0, cfg_channels=3)  # fmt: skip
SAMPLE_PRESETS: dict[str, dict[str, Any]] = {
    "paper-64ep": dict(_PAPER, cfg_scale=10.0, cfg_interval_start=0.10),
    "paper-800ep": dict(_PAPER, cfg_scale=6.7, cfg_interval_start=0.125),
    "paper-ablation": dict(_PAPER, sampling_method="dopri5", cfg_scale=1.0, cfg_interval_start=0.0, timestep_shift=0.0),
}


@dataclass(frozen=True)
class DataConfig:
    """`data:` of a LightningDiT config."""

    data_path: str | None = None  # latent shards and latents_stats.pt
    valid_path: str | None = None  # latents that are not trained on, for the held-out loss of log.valid_every; null: none
    fid_reference_file: str | None = None  # for log.fid_every; `evaluate` takes --reference
    image_size: int = 256
    num_classes: int = 1000
    num_workers: int = 8  # the reference's loader processes; ours reads with threads and needs none
    latent_norm: bool = False  # (z - mean) / std per channel
    latent_multiplier: float = 0.18215
    # ours
    path: str | None = None  # images
    flip: bool = True  # take the mirrored latent half of the time, as the reference does
    latents_in: Literal["stream", "ram", "gpu"] = "stream"  # read ahead from disk, or every process holds all latents in memory

    def __post_init__(self):
        require(self.image_size > 0, "image_size", self.image_size, "above 0")
        require(self.num_classes > 0, "num_classes", self.num_classes, "above 0")
        require(self.latent_multiplier > 0, "latent_multiplier", self.latent_multiplier, "above 0")


@dataclass(frozen=True)
class VAEConfig:
    """`vae:` of a LightningDiT config: which tokenizer made the latents."""

    model_name: str = "vavae_f16d32"  # free text
    downsample_ratio: int = 16
    # ours
    ckpt_path: str | None = None  # .pt, .safetensors, a checkpoint folder or a run folder

    def __post_init__(self):
        require(self.downsample_ratio > 0, "downsample_ratio", self.downsample_ratio, "above 0")


@dataclass(frozen=True)
class ModelConfig:
    """`model:` of a LightningDiT config."""

    model_type: str = "LightningDiT-XL/1"
    use_qknorm: bool = False
    use_swiglu: bool = False
    use_rope: bool = False
    use_rmsnorm: bool = False
    wo_shift: bool = False
    in_chans: int = 4
    use_checkpoint: bool | Literal["selective"] = False  # true: recompute blocks in backward; selective: but not their products
    # ours
    learn_sigma: bool = False
    class_dropout_prob: float = 0.1
    hidden_size: int | None = None  # these four with model_type: custom
    depth: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None
    label_init_std: float = 0.02  # of the label embedding; small models on few classes learn their labels sooner with 0.5

    def __post_init__(self):
        if self.model_type not in MODEL_TYPES:
            raise BadInput(f"model_type: unknown {self.model_type!r}; known: {', '.join(MODEL_TYPES)}")
        for key in ("hidden_size", "depth", "num_heads", "patch_size"):
            value = getattr(self, key)
            require((value is not None) == (self.model_type == "custom"), key, value, "given with model_type: custom, and only then")
            require(value is None or value > 0, key, value, "above 0")
        if self.hidden_size:
            require(self.hidden_size % self.num_heads == 0, "hidden_size", self.hidden_size, f"a multiple of num_heads {self.num_heads}")
            head_dim = self.hidden_size // self.num_heads
            require(not self.use_rope or head_dim % 4 == 0, "hidden_size / num_heads", head_dim, "a multiple of 4 for 2-D RoPE")
        require(self.in_chans > 0, "in_chans", self.in_chans, "above 0")
        require(0 <= self.class_dropout_prob < 1, "class_dropout_prob", self.class_dropout_prob, "in [0, 1)")
        require(self.label_init_std > 0, "label_init_std", self.label_init_std, "above 0")

    @property
    def patch(self) -> int:
        return self.patch_size or int(self.model_type.rsplit("/", 1)[1])


@dataclass(frozen=True)
class TrainConfig:
    """`train:` of both kinds. A tokenizer takes steps and batch from `lightning.trainer` and `data.params` when null here."""

    max_steps: int | None = None
    global_batch_size: int | None = None  # = micro_batch_size x processes x accumulation, exactly
    global_seed: int = 0
    output_dir: str = "output"
    exp_name: str | None = None  # null: the config file's name
    ckpt: str | None = None
    weight_init: str | None = None  # start from these weights
    log_every: int = 100
    ckpt_every: int = 20000
    resume: bool | None = None  # false: refuse a run folder that holds checkpoints
    use_checkpoint: bool | None = None  # the reference prints this key and trains by model.use_checkpoint; so do we
    # ours
    micro_batch_size: int | None = None  # samples a process holds at once; null: its whole share
    deterministic: Literal["none", "elastic"] = "none"  # elastic: the same weights, bit for bit, by any number of processes that divides slots
    slots: int = 8  # with elastic: the micro-batches of a global batch, over all processes; a power of two
    audit_every: int | None = None  # steps between two audits: a step's gradients computed twice, replicas compared; null: none
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    fused: bool = False  # run the operators of vavae_kernels
    residual_dtype: Literal["fp32", "bf16"] = "fp32"  # LightningDiT's stream between blocks; fp32 is the reference's
    fp8: bool = False  # LightningDiT: linear layers of the blocks multiply in fp8, by torchao, on GPUs that can
    compile: Literal["auto", "none", "blocks", "model"] = "auto"  # auto: on a GPU LightningDiT's blocks, or the LPIPS of a fused tokenizer
    attention: str = "auto"  # LightningDiT's attention: a backend of vavae_kernels, see the table in README.md
    ema_decay: float = 0.9999
    ema_warmup: bool = False  # decay = min(ema_decay, (1 + step) / (10 + step)): for short runs
    shard: Literal["none", "full", "hybrid"] = "none"  # FSDP2 of LightningDiT: weights spread over all processes, or over those of a node
    keep_last: int | None = None  # checkpoints kept, beside the best on held-out loss and those with a file `pinned` in them; null: all
    keep_every: int | None = None  # and those whose step is a multiple of this
    max_skipped: int = 10  # non-finite steps in a row before the run stops
    max_rollbacks: int = 3  # times that a leap of the loss (a tokenizer's nll) sends the run back before it stops; 0: never
    max_faint: int = 200  # steps in a row with next to no gradient, and the loss where it was, before the run stops; 0: never
    hang_seconds: float = 300.0  # that a process may give no sign of life, or a step may take, before the run ends with all stacks; 0: for ever

    def __post_init__(self):
        for key in ("max_steps", "global_batch_size", "micro_batch_size", "log_every", "ckpt_every", "keep_every", "max_skipped", "audit_every"):
            value = getattr(self, key)
            require(value is None or value > 0, key, value, "above 0")
        for key in ("max_rollbacks", "max_faint", "hang_seconds"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        require(self.slots > 0 and self.slots & (self.slots - 1) == 0, "slots", self.slots, "a power of two")
        exact = self.deterministic == "elastic"
        require(not exact or self.micro_batch_size is None, "micro_batch_size", self.micro_batch_size, "null with deterministic: elastic; set slots")
        repeats = self.attention in ("auto", "sdpa", "math") or not (exact or self.audit_every)
        require(repeats, "attention", self.attention, "auto, sdpa or math with deterministic: elastic or audit_every; others add in any order")
        spread = self.shard != "none"
        require(not spread or self.compile != "model", "compile", self.compile, "blocks, auto or none with train.shard")
        narrow = self.residual_dtype == "bf16"
        require(not narrow or self.precision != "fp32", "residual_dtype", self.residual_dtype, "fp32 with precision fp32")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        require(self.keep_last is None or self.keep_last >= 2, "keep_last", self.keep_last, "2 or more, or null for all")
        require(self.global_seed >= 0, "global_seed", self.global_seed, "0 or more")
        require(self.ckpt is None, "ckpt", self.ckpt, "null (no code reads it); set train.weight_init to start from weights, ckpt_path to sample")


@dataclass(frozen=True)
class OptimizerConfig:
    """`optimizer:`. AdamW for LightningDiT, Adam for the tokenizer; the learning rate is never scaled by the batch."""

    lr: float = 2e-4
    beta2: float = 0.95  # beta1 is 0.9
    max_grad_norm: float | None = None  # L2 over all parameters; null: no clipping
    # ours
    weight_decay: float = 0.0
    warmup_steps: int = 0  # linear from 0 to lr
    decay_fraction: float = 0.0  # the last part of the run in which lr falls linearly to 0

    def __post_init__(self):
        require(self.lr > 0, "lr", self.lr, "above 0")
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "in [0, 1)")
        require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "above 0, or null")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        require(0 <= self.decay_fraction <= 1, "decay_fraction", self.decay_fraction, "in [0, 1]")


@dataclass(frozen=True)
class TransportConfig:
    """`transport:`: path, prediction and the distribution of t."""

    path_type: Literal["Linear", "GVP", "VP"] = "Linear"
    prediction: Literal["velocity", "score", "noise"] = "velocity"
    loss_weight: Literal["velocity", "likelihood"] | None = None
    sample_eps: float | None = None
    train_eps: float | None = None
    use_cosine_loss: bool = False
    use_lognorm: bool = False
    partitial_train: tuple[float, float] | None = None
    partial_ratio: float = 1.0
    shift_lg: bool = False
    # ours
    lognorm_until: int | None = None  # step from which t is uniform again (the 800-epoch recipe: 600,000)

    def __post_init__(self):
        if self.partitial_train:
            low, high = self.partitial_train
            require(0 <= low < high <= 1, "partitial_train", self.partitial_train, "an interval inside [0, 1]")
        require(0 <= self.partial_ratio <= 1, "partial_ratio", self.partial_ratio, "in [0, 1]")
        require(self.lognorm_until is None or self.lognorm_until > 0, "lognorm_until", self.lognorm_until, "above 0, or null")


@dataclass(frozen=True)
class SampleConfig:
    """`sample:`. `num_sampling_steps` counts grid points: N points are N - 1 Euler steps, as in the reference."""

    mode: Literal["ODE", "SDE"] = "ODE"
    sampling_method: str = "euler"
    atol: float = 1e-6
    rtol: float = 1e-3
    reverse: bool = False
    likelihood: bool = False
    num_sampling_steps: int = 250
    cfg_scale: float = 1.0  # 1: no guidance
    per_proc_batch_size: int = 4
    fid_num: int = 50000
    cfg_interval_start: float = 0.0  # guidance acts where start <= t <= end; t = 0 is noise
    timestep_shift: float = 0.0  # t' = s t / (1 + (s - 1) t); 0: none
    # ours
    cfg_interval_end: float = 1.0
    cfg_channels: int | Literal["all"] = 3  # 3: as released checkpoints were evaluated
    labels: Literal["random", "balanced"] = "random"
    precision: Literal["auto", "bf16", "fp8", "tf32", "fp32"] = "auto"  # auto: bf16 on a GPU; tf32: as published; fp8: scaled by the batch
    compile: Literal["auto", "none", "blocks", "model"] = "auto"  # torch.compile; auto: the blocks on a GPU
    cuda_graphs: bool = True  # on a GPU: the network is captured once for each batch size and replayed
    guide: str | None = None  # autoguidance: run folder or weights of a lesser model, whose prediction replaces the unconditional one
    error_norm: Literal["sample", "batch"] = "sample"  # dopri5's error: per image, or over the batch as torchdiffeq's
    diffusion_form: str = "SBDM"  # these four for mode SDE
    diffusion_norm: float = 1.0
    last_step: Literal["Mean", "Tweedie", "Euler"] | None = "Mean"
    last_step_size: float = 0.04

    def __post_init__(self):
        require(self.num_sampling_steps >= 2, "num_sampling_steps", self.num_sampling_steps, "2 or more")
        require(self.per_proc_batch_size > 0, "per_proc_batch_size", self.per_proc_batch_size, "above 0")
        require(self.fid_num > 0, "fid_num", self.fid_num, "above 0")
        require(self.cfg_scale >= 0, "cfg_scale", self.cfg_scale, "0 or more")
        require(self.timestep_shift >= 0, "timestep_shift", self.timestep_shift, "0 or more")
        require(self.atol > 0 and self.rtol > 0, "atol, rtol", (self.atol, self.rtol), "above 0")
        require(self.cfg_channels == "all" or self.cfg_channels > 0, "cfg_channels", self.cfg_channels, 'above 0, or "all"')
        require(not self.reverse and not self.likelihood, "reverse, likelihood", True, "false to sample images")
        interval = (self.cfg_interval_start, self.cfg_interval_end)
        require(0 <= interval[0] <= interval[1] <= 1, "cfg_interval", interval, "inside [0, 1]")


@dataclass(frozen=True)
class LogConfig:
    """`log:` of both kinds: where a run is shown, and what is looked at while it trains, at the last step too. None of it changes what is
    trained. metrics.jsonl, log.txt and report.html are always written."""

    to: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    valid_every: int = 1000  # steps from one held-out loss to the next, where data.valid_path is set; a tokenizer's PSNR, SSIM and more too
    valid_num: int = 2048  # latents or images of data.valid_path it is the mean over, evenly spread; all where there are fewer
    samples_every: int | None = None  # steps from one grid of samples (by the averaged weights, sample.*), or of reconstructions; null: none
    samples_num: int = 16  # images of a grid
    fid_every: int | None = None  # steps from one small FID, against data.fid_reference_file, or rFID, of data.valid_path; null: none
    fid_num: int = 2048  # its samples, or reconstructions
    fid_inception: str | None = None  # weights of the FID Inception network

    def __post_init__(self):
        for key in ("valid_every", "valid_num", "samples_every", "samples_num", "fid_every"):
            value = getattr(self, key)
            require(value is None or value > 0, key, value, "above 0")
        require(self.fid_num >= 2048, "fid_num", self.fid_num, "2048 or more, the number of features")


@dataclass(frozen=True)
class LightningDiTLogConfig(LogConfig):
    """`log:` of a LightningDiT config."""

    layers_every: int | None = 1000  # steps from one look at each layer's attention logits and residual stream to the next; null: none

    def __post_init__(self):
        super().__post_init__()
        require(self.layers_every is None or self.layers_every > 0, "layers_every", self.layers_every, "above 0")


@dataclass(frozen=True)
class LightningDiTConfig:
    """A LightningDiT run: the reference's YAML, unchanged."""

    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    log: LightningDiTLogConfig = field(default_factory=LightningDiTLogConfig)
    ckpt_path: str | None = None

    def __post_init__(self):
        unit = self.vae.downsample_ratio * self.model.patch
        if self.data.image_size % unit:
            raise BadInput(f"data.image_size {self.data.image_size} is not a multiple of vae.downsample_ratio x patch size = {unit}")

    @property
    def latent_size(self) -> int:
        """Height and width of a latent."""
        return self.data.image_size // self.vae.downsample_ratio
