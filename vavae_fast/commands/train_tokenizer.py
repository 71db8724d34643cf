"""Train a VA-VAE on images: reconstruction, GAN and alignment with a vision foundation model."""

from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.commands import preflight
from vavae_fast.commands.foundation_choice import check_same_module, foundation_argument, with_foundation
from vavae_fast.commands.run_lock import locked
from vavae_fast.commands.runs import check_run_folder, check_same_data, kernels, resume_arguments, run_steps, start_run
from vavae_fast.commands.tokenizer_stages import PlannedStage, plan_stages, run_length
from vavae_fast.config import TokenizerConfig, accumulation, given_images, given_path, run_folder, slots_of_process, to_mapping, to_yaml, world_size
from vavae_fast.errors import BadInput, require
from vavae_fast.models.foundation_models import USER_MODEL
from vavae_fast.training.boards import require_boards

EXAMPLE = "vavae-fast train-tokenizer --config configs/tokenizer_f16d32.yaml data.path=imagenet/train foundation.weights=dinov2_l.safetensors"
CONFIG = TokenizerConfig


def arguments(parser: ArgumentParser) -> None:
    foundation_argument(parser)
    resume_arguments(parser)


@dataclass(frozen=True)
class TokenizerPlan:
    """A checked tokenizer run."""

    config: TokenizerConfig
    folder: Path
    micro_batch: int
    accumulation: int
    processes: int
    stages: tuple[PlannedStage, ...]
    resumes: bool
    images: Any
    foundation: Any  # frozen networks, None where the objective needs none; a dry run does not load them
    perceptual: Any
    watch: Any

    @property
    def max_steps(self) -> int | None:
        """None: a dry run without images."""
        return run_length(self.config, self.stages)

    def describe(self) -> str:
        c, f = self.config, predict(self)
        p, counts = c.model.params, f["parameters"]
        steps = "\n           ".join(stage.describe() for stage in self.stages)
        data = f"{len(self.images):,} images, {len(self.images.classes)} classes" if self.images is not None else f"not set: {c.image_path}"
        return (
            f"{to_yaml(c)}\n"
            f"model      f{c.downsample_ratio}d{p.embed_dim}: {counts.pop('autoencoder') / 1e6:.2f} M parameters; "
            f"{', '.join(f'{name} {count / 1e6:.2f} M' for name, count in counts.items())}; foundation model {p.use_vf or 'none'}\n"
            f"           {f['flops'] / 1e9:.4g} GFLOP a training image, all networks, with the GAN\n"
            f"data       {data}\n"
            f"batch      {c.global_batch_size} = {self.processes} processes x {self.micro_batch} x {self.accumulation} accumulated\n"
            f"stages     {steps}\n"
            f"memory     {preflight.memory_line(f['memory'], f['precision'])}\n"
            f"watched    {self.watch.describe(c)}\n"
            f"disk       {preflight.plan_disk(self.folder, f['checkpoint_bytes'], c.train, self.max_steps, len(self.stages) - 1).line}\n"
            f"run        {self.folder} ({'continues' if self.resumes else 'new'})\n"
            "nothing was written"
        )


def plan(config: TokenizerConfig, args: Namespace) -> TokenizerPlan:
    """Check everything. What needs no torch comes first."""
    config = with_foundation(config, args.foundation)
    require(args.world_size is None or args.dry_run, "--world-size", args.world_size, "used with --dry-run; torchrun sets it otherwise")
    require(config.train.shard == "none", "train.shard", config.train.shard, "none: a tokenizer's weights are not sharded")
    compiles = config.train.fused or config.train.compile in ("auto", "none")
    require(compiles, "train.compile", config.train.compile, "auto or none without train.fused=true: the plain tokenizer is not compiled")
    processes = args.world_size or world_size()
    if config.train.deterministic == "elastic":
        micro, accumulated = slots_of_process(config.global_batch_size, config.train.slots, processes)
    else:
        micro, accumulated = accumulation(config.global_batch_size, config.train.micro_batch_size or config.data.params.batch_size, processes)
    folder = run_folder(config, args.config)
    check_same_module(folder, args.foundation, args.override)
    resumes = check_run_folder(folder, config, args.resume, args.override)
    placeholder = args.dry_run and (not config.image_path or "path/to" in config.image_path)
    path = None if placeholder else given_images(config.image_path, "data.path", "the folder of training images")
    if config.start_weights and not resumes:
        given_path(config.start_weights, "weight_init", "the weights to start from")
    _precision(config)
    require_boards(tuple(config.log.to))
    if not args.dry_run:
        _frozen_weights_given(config)
    images = None
    if not placeholder:
        from vavae_fast.commands import build

        images = build.images(path, config.image_size, config.data.crop, config.data.backend, config.data.max_corrupt)
        if resumes:
            check_same_data(folder, _data_identity(images), args.override)
    from vavae_fast.commands.watch_tokenizer import plan_watch

    watch = plan_watch(config, images)
    stages = plan_stages(config, images)
    run_length(config, stages)
    foundation, perceptual = _check_networks(config, folder, resumes, args.dry_run, args.foundation)
    checked = TokenizerPlan(config, folder, micro, accumulated, processes, stages, resumes, images, foundation, perceptual, watch)
    if not args.dry_run and args.foundation is None:  # what a module of the user's needs is not known
        _require_memory(checked)
    return checked


def _require_memory(plan: TokenizerPlan) -> None:
    """`BadInput` unless a step fits in memory."""
    import torch

    from vavae_fast.commands import build

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build.autoencoder(plan.config).parameters())
    if not preflight.predicts(device, parameters):
        return
    precision = "bf16" if build.bf16(_precision(plan.config), device) else "fp32"
    config = replace(plan.config, train=replace(plan.config.train, precision=precision))
    plan = replace(plan, config=config, foundation=None)  # predictions are made with networks of their own
    share = config.global_batch_size // plan.processes

    def need(size: int) -> int:
        return predict(replace(plan, micro_batch=size, accumulation=share // size))["memory"]

    preflight.require_memory(need, plan.micro_batch, share, device)


def _data_identity(images) -> dict[str, Any]:
    """What tells one set of images from another."""
    return dict(folder=images.path, count=len(images), fingerprint=images.fingerprint())


def _frozen_weights_given(config: TokenizerConfig) -> None:
    """The frozen networks' files, before any network is built."""
    loss, vf = config.model.params.lossconfig.params, config.model.params.use_vf
    if loss.perceptual_weight > 0 and config.perceptual.standin is None:
        given_path(config.perceptual.vgg_weights, "perceptual.vgg_weights", "torchvision's VGG16 weights (vgg16-397923af.pth)")
        given_path(config.perceptual.linear_weights, "perceptual.linear_weights", "LPIPS v0.1's linear weights for VGG (vgg.pth)")
    if vf == "standin":
        given_path(config.foundation.standin, "foundation.standin", "the stand-in's file")
    elif vf not in (None, USER_MODEL) and config.foundation.weights != "hub":
        given_path(config.foundation.weights, "foundation.weights", f"the weights of {vf}, or hub to let timm download them")


def _check_networks(config: TokenizerConfig, folder: Path, resumes: bool, dry_run: bool, import_path: str | None) -> tuple[Any, Any]:
    """The frozen networks, loaded unless this is a dry run (a model of --foundation is); and whether those to be trained can be built and started."""
    import torch

    from vavae_fast.commands import build
    from vavae_fast.models.perceptual import SMALLEST_IMAGE

    build.loss_weights(config)
    if config.model.params.lossconfig.params.perceptual_weight > 0 and config.perceptual.standin is None and config.image_size < SMALLEST_IMAGE:
        needs = f"LPIPS needs {SMALLEST_IMAGE} pixels, data.image_size is {config.image_size}"
        raise BadInput(f"model.params.lossconfig.params.perceptual_weight: {needs}; set perceptual_weight=0, or a perceptual.standin")
    foundation = build.foundation(config, import_path) if import_path or not dry_run else None
    perceptual = None if dry_run else build.perceptual(config)
    with torch.device("meta"):
        networks = build.autoencoder(config), build.projection(config, foundation), build.discriminator(config)
    if config.image_size < networks[2].smallest_image:
        found = f"data.image_size {config.image_size} leaves no patch for a discriminator of {networks[2].n_layers} layers"
        raise BadInput(f"model.params.lossconfig.params.disc_num_layers: {found}, which needs {networks[2].smallest_image} pixels; lower it")
    if not dry_run:
        size = 12 * sum(p.numel() for network in (networks[0], networks[2]) for p in network.parameters())
        artifacts.require_space(folder, int(artifacts.SPARE * size))
    if config.start_weights and not resumes:
        build.start_tokenizer(Path(config.start_weights), *networks)
    return foundation, perceptual


def predict(plan: TokenizerPlan) -> dict[str, Any]:
    """Parameters of each network, FLOPs of a training image and bytes of memory with the GAN at work, bytes of a checkpoint."""
    import torch

    from vavae_fast.commands import build
    from vavae_fast.distributed import World
    from vavae_fast.training.tokenizer_cost import step_cost

    precision = "fp32" if _precision(plan.config) == "fp32" else "bf16"  # what auto is on a GPU
    config = replace(plan.config, train=replace(plan.config.train, precision=precision))
    foundation = plan.foundation or build.untrained_foundation(config)
    pretended = replace(plan, config=config, foundation=foundation, perceptual=build.untrained_perceptual(config), resumes=True)
    state = _state(pretended, World(0, 1, torch.device("cpu")), None)
    _prepare(state, config, None)
    frozen = (getattr(state.foundation, "model", None), state.perceptual)
    networks = dict(zip(("autoencoder", "discriminator", "foundation", "perceptual"), (state.autoencoder, state.discriminator, *frozen)))
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items() if network is not None}
    cost = step_cost(state, config.image_size, plan.micro_batch, plan.accumulation > 1)
    checkpoint_bytes = 12 * (counts["autoencoder"] + counts["discriminator"])
    costs = dict(flops=cost.flops / plan.micro_batch, memory=cost.peak_bytes, checkpoint_bytes=checkpoint_bytes)
    return dict(parameters=counts, precision=precision, **costs)


def run(plan: TokenizerPlan) -> Path:
    """Train to the last step, or to a signal; returns the run folder."""
    from vavae_fast.distributed import open_world

    with open_world() as world, locked(plan.folder) if world.main else nullcontext(), kernels(plan.config, world.device):
        return _run(plan, world)


def _run(plan: TokenizerPlan, world) -> Path:
    from vavae_fast.commands import build
    from vavae_fast.commands.watch_tokenizer import observers
    from vavae_fast.data.streams import ImageStream, Share
    from vavae_fast.training.audit import audited
    from vavae_fast.training.log import RunLog
    from vavae_fast.training.loop import LoopSettings, resume
    from vavae_fast.training.saver import Retention
    from vavae_fast.training.tokenizer import tokenizer_gradients, tokenizer_step

    config = plan.config
    c = config.train
    log = RunLog(plan.folder if world.main else None, plan.folder.name, tuple(config.log.to), to_mapping(config))
    state = _state(plan, world, log)
    _prepare(state, config, world.device)
    start = resume(state, plan.folder / "checkpoints", world, log)
    log.forget_after(start)
    facts = dict(stage="tokenizer", seed=c.global_seed, architecture=build.architecture(config), data=_data_identity(plan.images),
                 image_size=config.image_size, foundation=plan.foundation and plan.foundation.name, processes=world.size)  # fmt: skip
    if world.main:
        start_run(plan.folder, config, facts | dict(device=str(world.device)))
    parameters = sum(p.numel() for p in state.autoencoder.parameters())
    model = f"f{config.downsample_ratio}d{config.model.params.embed_dim}, {parameters / 1e6:.2f} M parameters"
    log.say(f"{model}, {len(plan.images):,} images ({plan.images.backend}), "
            f"batch {config.global_batch_size} = {world.size} x {plan.micro_batch} x {plan.accumulation}, {world.device}")  # fmt: skip
    parameters += sum(p.numel() for p in state.discriminator.parameters())
    disk = preflight.plan_disk(plan.folder, 12 * parameters, c, plan.max_steps, len(plan.stages) - 1)
    if disk.short:
        log.say(disk.line)
    plan.images.device = world.device
    plan.images.threads = max(1, plan.images.threads // world.local_size)  # of the node's cores
    share = Share(config.global_batch_size, world.rank, world.size, plan.micro_batch)
    said = log.say if world.main else print  # a process that writes no log names the images that it alone met
    stream = ImageStream(plan.images, c.global_seed, share, config.data.flip, config.data.max_corrupt, said)
    ends = {stage.name: stage.end for stage in plan.stages if stage.name is not None}
    keep = Retention(c.keep_last, c.keep_every, frozenset(ends.values()))
    settings = LoopSettings(plan.folder, plan.max_steps, config.global_batch_size, c.log_every, c.ckpt_every, keep,
                            facts | dict(stages=ends, config=to_mapping(config)), stages=ends, share=share, hang_seconds=c.hang_seconds)  # fmt: skip
    looks = observers(config, plan.watch, state, plan.micro_batch, log)
    step = tokenizer_step
    if c.audit_every is not None:
        compiled = build.compiled_regions(c.compile, world.device) != "none"
        step = audited(tokenizer_step, tokenizer_gradients, c.audit_every, compiled)
    return run_steps(state, step, tokenizer_gradients, stream, plan.accumulation, settings, world, log, start, looks)


def _state(plan: TokenizerPlan, world, log):
    import torch

    from vavae_fast.commands import build
    from vavae_fast.training.elastic import ElasticReduction
    from vavae_fast.training.guard import Guard
    from vavae_fast.training.one_pass import one_pass_gradients
    from vavae_fast.training.tokenizer import TokenizerState, plain_gradients

    config = plan.config
    torch.manual_seed(config.train.global_seed)
    autoencoder, discriminator = build.autoencoder(config), build.discriminator(config)
    foundation, perceptual = plan.foundation, plan.perceptual
    projection = build.projection(config, foundation)
    if config.start_weights and not plan.resumes:
        log.say(build.start_tokenizer(Path(config.start_weights), autoencoder, projection, discriminator))
    trained = [*autoencoder.parameters(), *(() if projection is None else projection.parameters())]
    adam = dict(lr=config.model.base_learning_rate, betas=(0.5, 0.9), fused=True)
    return TokenizerState(
        autoencoder=autoencoder.train(), projection=projection, discriminator=discriminator.train(), foundation=foundation,
        perceptual=perceptual, optimizer=torch.optim.Adam(trained, **adam), optimizer_disc=torch.optim.Adam(discriminator.parameters(), **adam),
        stages=tuple(map(_stage, plan.stages)),
        guard=Guard(world.device, config.train.max_skipped, config.train.max_rollbacks, watches="nll", max_faint=config.train.max_faint),
        world=world, seed=config.train.global_seed, bf16=build.bf16(_precision(config), world.device), reverse_proj=config.model.params.reverse_proj,
        gradients=one_pass_gradients if config.train.fused else plain_gradients, max_grad_norm=config.max_grad_norm,
        foundation_stream=torch.cuda.Stream(world.device) if config.train.fused and world.device.type == "cuda" else None,
        reduction=ElasticReduction(world, config.train.slots) if config.train.deterministic == "elastic" else None,
    )  # fmt: skip


def _prepare(state, config: TokenizerConfig, device) -> None:
    """Bring a state's networks to `device`, in the layout they run in, rounded and compiled. None: they stay, to predict a GPU's step."""
    import torch

    from vavae_fast.commands import build
    from vavae_fast.models.compilation import compile_in_training
    from vavae_fast.models.inference import round_weights

    if state.foundation is not None and state.bf16 and (device is None or device.type == "cuda"):
        state.foundation.round_weights(torch.bfloat16)
    layout = torch.channels_last if config.train.fused else torch.preserve_format
    for network in (state.autoencoder, state.projection, state.discriminator, state.foundation, state.perceptual):
        if network is not None:
            network.to(device, memory_format=layout)
    if state.perceptual is not None and config.train.fused:
        if state.bf16:
            round_weights(getattr(state.perceptual, "net", state.perceptual))  # of VGG alone: LPIPS weighs channels in fp32
        if device is not None and build.compiled_regions(config.train.compile, device) != "none":
            compile_in_training(state.perceptual)


def _stage(planned: PlannedStage):
    from vavae_fast.commands import build
    from vavae_fast.training.tokenizer import Stage

    model, weights = planned.config.model, build.loss_weights(planned.config)
    return Stage(planned.begin, planned.end, weights, model.base_learning_rate, planned.config.decay_fraction, not model.params.proj_fix)


def _precision(config: TokenizerConfig) -> str:
    """train.precision, unless it is auto: then the reference's lightning.trainer.precision."""
    stated = str(config.lightning.trainer.precision)
    if config.train.precision != "auto":
        return config.train.precision
    if stated in ("32", "32-true"):
        return "fp32"
    if stated in ("bf16", "bf16-mixed"):
        return "bf16"
    raise BadInput(f"lightning.trainer.precision: must be 32 or bf16, got {stated}; or set train.precision")
