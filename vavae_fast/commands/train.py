"""Train LightningDiT on latent shards. One process needs no launcher; torchrun train.py starts several."""

from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.commands import preflight
from vavae_fast.commands.run_lock import locked
from vavae_fast.commands.runs import check_run_folder, check_same_data, kernels, resume_arguments, run_steps, start_run
from vavae_fast.config import LightningDiTConfig, accumulation, given_path, run_folder, slots_of_process, to_mapping, to_yaml, world_size
from vavae_fast.errors import BadInput, require

EXAMPLE = "vavae-fast train --config configs/lightningdit_xl_64ep.yaml data.data_path=latents/train --fused"
CONFIG = LightningDiTConfig


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--fused", action="store_true", help="run the fused operators (= train.fused=true)")
    resume_arguments(parser)


@dataclass(frozen=True)
class TrainPlan:
    """A checked training run."""

    config: LightningDiTConfig
    folder: Path
    micro_batch: int
    accumulation: int
    processes: int
    resumes: bool
    latents: Any  # None: still the template's placeholder, in a dry run
    watch: Any  # what is looked at meanwhile, see watch.py

    def describe(self) -> str:
        c, f = self.config, predict(self.config, self.micro_batch, self.accumulation, self.processes)
        data = f"{len(self.latents):,} latents {self.latents.shape}" if self.latents is not None else f"not set: {c.data.data_path}"
        epochs = f" = {c.train.max_steps * c.train.global_batch_size / len(self.latents):.1f} epochs" if self.latents is not None else ""
        return (
            f"{to_yaml(c)}\n"
            f"model      {c.model.model_type}: {f['parameters'] / 1e6:.2f} M parameters; "
            f"{f['flops'] / 1e9:.1f} GFLOP an image forward, {3 * f['flops'] / 1e9:.1f} GFLOP a training image\n"
            f"data       {data}\n"
            f"batch      {c.train.global_batch_size} = {self.processes} processes x {self.micro_batch} x {self.accumulation} accumulated\n"
            f"steps      {c.train.max_steps:,}{epochs}, lr {c.optimizer.lr:g} (not scaled)\n"
            f"memory     {preflight.memory_line(f['memory'], f['precision'])}\n"
            f"disk       {preflight.plan_disk(self.folder, f['checkpoint_bytes'], c.train, c.train.max_steps).line}\n"
            f"watched    {self.watch.describe(c)}\n"
            f"run        {self.folder} ({'continues' if self.resumes else 'new'})\n"
            "nothing was written"
        )


def plan(config: LightningDiTConfig, args: Namespace) -> TrainPlan:
    """Check everything. What needs no torch comes first."""
    if args.fused:
        config = replace(config, train=replace(config.train, fused=True))
    require(args.world_size is None or args.dry_run, "--world-size", args.world_size, "used with --dry-run; torchrun sets it otherwise")
    for key in ("max_steps", "global_batch_size"):
        require(getattr(config.train, key) is not None, f"train.{key}", None, "set")
    processes = args.world_size or world_size()
    if config.train.deterministic == "elastic":
        micro, accumulated = slots_of_process(config.train.global_batch_size, config.train.slots, processes)
    else:
        micro, accumulated = accumulation(config.train.global_batch_size, config.train.micro_batch_size, processes)
    folder = run_folder(config, args.config)
    resumes = check_run_folder(folder, config, args.resume, args.override)
    placeholder = args.dry_run and (not config.data.data_path or "path/to/" in config.data.data_path)
    path = None if placeholder else given_path(config.data.data_path, "data.data_path", "the folder of latents that vavae-fast extract wrote")
    import torch

    from vavae_fast.commands import build
    from vavae_fast.commands.watch import plan_watch
    from vavae_fast.models.fp8 import require_fp8

    latents, model = _latents(config, path), _on_meta(config)
    if resumes and latents is not None:
        check_same_data(folder, _data_identity(latents), args.override)
    build.transport(config.transport, config.train.fused)
    watch = plan_watch(config, latents)
    if not args.dry_run:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        narrow = config.train.residual_dtype == "bf16" and not build.bf16(config.train.precision, device)
        if config.train.fp8:
            require_fp8(device, "train.fp8", "train.fp8=false")
        require(not narrow, "train.residual_dtype", "bf16", "fp32 on a CPU, unless train.precision=bf16")
        artifacts.require_space(folder, int(artifacts.SPARE * 16 * sum(p.numel() for p in model.parameters())))
        _require_memory(config, model, micro, processes, device)
    if config.train.weight_init and not resumes:
        given_path(config.train.weight_init, "train.weight_init", "the weights to start from")
        _start_weights(config, model)
    return TrainPlan(config, folder, micro, accumulated, processes, resumes, latents, watch)


def _require_memory(config: LightningDiTConfig, model: Any, micro: int, processes: int, device: Any) -> None:
    """`BadInput` unless a step fits in memory."""
    from vavae_fast.commands import build

    if not preflight.predicts(device, sum(p.numel() for p in model.parameters())):
        return
    precision = "bf16" if build.bf16(config.train.precision, device) else "fp32"
    config = replace(config, train=replace(config.train, precision=precision))
    share = config.train.global_batch_size // processes
    preflight.require_memory(lambda size: predict(config, size, share // size, processes)["memory"], micro, share, device)


def _latents(config: LightningDiTConfig, path: Path | None) -> Any:
    """The opened latents, checked against the model; None without a path."""
    if path is None:
        return None
    from vavae_fast.data import open_latents

    latents = open_latents(path)
    (channels, height, width), size = latents.shape, config.latent_size
    if channels != config.model.in_chans:
        hint = " (moments: mean and log-variance, not latents?)" if channels == 2 * config.model.in_chans else ""
        raise BadInput(
            f"{path}: latents have {channels} channels{hint}, model.in_chans is {config.model.in_chans}; "
            f"set model.in_chans={channels}, or extract with a {config.model.in_chans}-channel tokenizer"
        )
    if (height, width) != (size, size):
        raise BadInput(f"{path}: latents are {height} x {width}, data.image_size / vae.downsample_ratio is {size}; set data.image_size to fit")
    highest = int(latents.labels.max())
    if highest >= config.data.num_classes:
        raise BadInput(f"{path}: label {highest} found, data.num_classes is {config.data.num_classes}; set data.num_classes={highest + 1}")
    return latents


def predict(config: LightningDiTConfig, micro: int, accumulated: int, processes: int) -> dict[str, Any]:
    """Parameters, FLOPs an image (forward), bytes of memory and of a checkpoint, from the model on the meta device."""
    from vavae_fast.models.lightningdit_cost import flops_per_image, parameter_count, training_bytes

    model = _on_meta(config)
    parameters = parameter_count(model)
    precision = "fp32" if config.train.precision == "fp32" else "bf16"  # what auto is on a GPU
    shards = processes if config.train.shard == "full" else 1  # hybrid shards within a node, whose size is not known here
    memory = training_bytes(model, micro, accumulated > 1, precision, config.model.use_checkpoint, shards)
    if config.train.deterministic == "elastic":
        memory += (accumulated.bit_length() - 1) * 4 * parameters // shards  # gradients of slots that wait for their other half
    bytes_of = dict(memory=memory, checkpoint_bytes=16 * parameters)
    return dict(parameters=parameters, flops=flops_per_image(model), precision=precision, **bytes_of)


def _on_meta(config: LightningDiTConfig) -> Any:
    """The model without memory for its weights."""
    import torch

    from vavae_fast.commands import build

    with torch.device("meta"):
        return build.lightningdit(config, build.residual_dtype(config))


def _start_weights(config: LightningDiTConfig, model: Any) -> str:
    """Load train.weight_init into `model`; one on the meta device only checks that it fits. Returns where they came from.

    Weights trained without QK-norm fit a model with it.
    """
    from vavae_fast.commands import build
    from vavae_fast.models.diagnostics import with_qk_norm
    from vavae_fast.models.weights import load_strict

    weights, identity = build.dit_weights(Path(config.train.weight_init), "model")
    weights, layers = with_qk_norm(weights, model)
    load_strict(model, weights, identity["path"])
    return f"{identity['path']}, QK-norm added to its {layers} layers" if layers else identity["path"]


def run(plan: TrainPlan) -> Path:
    """Train to `train.max_steps`, or to a signal; returns the run folder."""
    from vavae_fast.distributed import open_world

    with open_world() as world, locked(plan.folder) if world.main else nullcontext(), kernels(plan.config, world.device):
        return _run(plan, world)


def _run(plan: TrainPlan, world) -> Path:
    from vavae_fast.commands import build
    from vavae_fast.commands.watch import observers, peak_images_per_second
    from vavae_fast.data.streams import LatentStream, Share
    from vavae_fast.models.lightningdit_cost import parameter_count
    from vavae_fast.training.audit import audited
    from vavae_fast.training.dit import dit_gradients, dit_step
    from vavae_fast.training.log import RunLog
    from vavae_fast.training.loop import LoopSettings, resume
    from vavae_fast.training.saver import Retention

    config = plan.config
    c = config.train
    log = RunLog(plan.folder if world.main else None, plan.folder.name, tuple(config.log.to), to_mapping(config))
    state = _state(plan, world, log)
    parameters = parameter_count(state.model)
    start = resume(state, plan.folder / "checkpoints", world, log)
    log.forget_after(start)
    facts = dict(stage="LightningDiT", seed=c.global_seed, data=_data_identity(plan.latents), parameters=parameters, processes=world.size)
    if world.main:
        start_run(plan.folder, config, facts | dict(device=str(world.device)))
    log.say(f"{config.model.model_type}, {parameters / 1e6:.2f} M parameters, {len(plan.latents):,} latents, "
            f"batch {c.global_batch_size} = {world.size} x {plan.micro_batch} x {plan.accumulation}, {world.device}")  # fmt: skip
    disk = preflight.plan_disk(plan.folder, 16 * parameters, c, c.max_steps)
    if disk.short:
        log.say(disk.line)
    peak = peak_images_per_second(state.model, world, log)
    share = Share(c.global_batch_size, world.rank, world.size, plan.micro_batch, in_turn=state.shards if c.deterministic == "elastic" else 1)
    d = config.data
    resident = {"stream": None, "ram": "cpu", "gpu": world.device}[d.latents_in]
    stream = LatentStream(plan.latents, c.global_seed, share, d.latent_norm, d.latent_multiplier, d.flip, world.device, resident=resident)
    settings = LoopSettings(plan.folder, c.max_steps, c.global_batch_size, c.log_every, c.ckpt_every, Retention(c.keep_last, c.keep_every),
                            facts | dict(config=to_mapping(config)), peak, share=share, hang_seconds=c.hang_seconds)  # fmt: skip
    looks = observers(config, plan.watch, plan.latents, state, plan.micro_batch, log)
    step = dit_step
    if c.audit_every is not None:
        compiled = build.compiled_regions(c.compile, world.device) != "none"
        step = audited(dit_step, dit_gradients, c.audit_every, compiled, state.shards)
    return run_steps(state, step, dit_gradients, stream, plan.accumulation, settings, world, log, start, looks)


def _state(plan: TrainPlan, world, log):
    import torch

    from vavae_fast.commands import build
    from vavae_fast.models.compilation import compile_forward
    from vavae_fast.models.fp8 import convert_to_fp8
    from vavae_fast.training.dit import DiTState
    from vavae_fast.training.elastic import ElasticReduction
    from vavae_fast.training.guard import Guard
    from vavae_fast.training.optimizer import trainable
    from vavae_fast.training.parallel import process_mesh, shard
    from vavae_kernels import AdamWEMA

    config = plan.config
    torch.manual_seed(config.train.global_seed)
    model = build.lightningdit(config, build.residual_dtype(config))
    if config.train.weight_init and not plan.resumes:
        log.say(f"starts from the weights of {_start_weights(config, model)}")
    model.to(world.device).train()
    if config.train.fp8:
        log.say(f"{convert_to_fp8(model)} linear layers multiply in fp8")
    compile_forward(model, build.compiled_regions(config.train.compile, world.device))
    o, t = config.optimizer, config.transport
    adam = dict(lr=o.lr, betas=(0.9, o.beta2), weight_decay=o.weight_decay, impl="auto" if config.train.fused else "torch")
    bf16 = build.bf16(config.train.precision, world.device)
    mesh, elastic = process_mesh(world, config.train.shard), config.train.deterministic == "elastic"
    shard(model, mesh["shard"] if mesh is not None and elastic else mesh, bf16)  # elastic: it adds over nodes itself
    reduction = None
    if elastic:
        reduction = ElasticReduction(world, config.train.slots, mesh)
        reduction.attach(model)
    optimizer = AdamWEMA(trainable(model).items(), ema_decay=config.train.ema_decay, **adam)
    late = build.transport(t, config.train.fused, use_lognorm=False) if t.lognorm_until else None
    return DiTState(
        model=model, optimizer=optimizer, ema_decay=config.train.ema_decay, ema_warmup=config.train.ema_warmup,
        transport=build.transport(t, config.train.fused), world=world,
        guard=Guard(world.device, config.train.max_skipped, config.train.max_rollbacks, max_faint=config.train.max_faint),
        seed=config.train.global_seed, settings=o, max_steps=config.train.max_steps,
        bf16=bf16, transport_late=late, late_from=t.lognorm_until or 0, reduction=reduction,
    )  # fmt: skip


def _data_identity(latents) -> dict[str, Any]:
    """What tells one set of latents from another."""
    made_by = latents.manifest or {}
    return dict(folder=str(latents.folder), count=len(latents), shape=list(latents.shape), tokenizer=made_by.get("facts", {}).get("tokenizer"))
