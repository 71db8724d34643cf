"""The VA-VAE step: paper section 3; reference vavae/ldm/models/autoencoder.py, contperceptual.py."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vavae_fast import rng
from vavae_fast.data.images import ImageBatch
from vavae_fast.distributed import World
from vavae_fast.losses import Alignment, Judges, LastLayers, LossWeights, discriminator_objective, generator_objective, vjp
from vavae_fast.models.autoencoder import AutoencoderKL, DiagonalGaussian
from vavae_fast.pixels import to_unit
from vavae_fast.training.checkpoint import Groups, load_tensors
from vavae_fast.training.guard import Guard
from vavae_fast.training.optimizer import learning_rate, load_optimizer_tensors, optimizer_tensors, set_learning_rate, trainable
from vavae_fast.training.reduction import Reduction

Gradients = dict[nn.Parameter, Tensor]


@dataclass(frozen=True)
class Stage:
    """Steps `begin` up to `end`, which is the next one's, and what is theirs. `StageConfig` says how one begins; a run without stages is one."""

    begin: int
    end: int
    weights: LossWeights
    base_lr: float
    decay_fraction: float = 0.0
    train_projection: bool = True


@dataclass
class TokenizerState:
    """What a tokenizer run trains: autoencoder, projection to the features, discriminator; and what it looks at, frozen.

    `projection` is the 1x1 convolution between z and the features of `foundation`; both are None without alignment. `optimizer` holds it in
    every stage: without a gradient it stays. `gradients` is how a step differentiates: `plain_gradients` below, or `one_pass_gradients`
    with fewer passes.
    """

    autoencoder: AutoencoderKL
    projection: nn.Conv2d | None
    discriminator: nn.Module
    foundation: Callable[[Tensor], Tensor] | None
    perceptual: Callable[[Tensor, Tensor], Tensor] | None
    optimizer: torch.optim.Optimizer
    optimizer_disc: torch.optim.Optimizer
    stages: tuple[Stage, ...]
    guard: Guard
    world: World
    seed: int
    bf16: bool
    reverse_proj: bool
    gradients: "Callable[[TokenizerState, int, ImageBatch], tuple[dict[str, Tensor], Gradients]]"
    max_grad_norm: float | None = None
    foundation_stream: torch.cuda.Stream | None = None  # on which the one-pass step runs `foundation`; None: on that of everything else
    reduction: Reduction | None = None  # how gradients are summed; None: in the order of their coming
    stage: Stage = field(init=False)  # that of the step at hand

    def __post_init__(self):
        self.stage = self.stages[0]
        self.reduction = self.reduction or Reduction(self.world)

    def stage_at(self, step: int) -> Stage:
        return next(stage for stage in self.stages if step < stage.end)

    def enter(self, step: int) -> int:
        """Make the stage of `step` the present one, with fresh optimizers at its beginning; returns the steps since. A function of the step
        alone, so a run continues anywhere."""
        self.stage = self.stage_at(step)
        iteration = step - self.stage.begin
        if self.projection is not None:
            self.projection.requires_grad_(self.stage.train_projection)
        if iteration == 0:
            self.optimizer.state.clear()
            self.optimizer_disc.state.clear()
        if iteration == 0 or self.weights.generator_factor(iteration) != self.weights.generator_factor(iteration - 1):
            self.guard.expect_another_loss()
        return iteration

    @property
    def weights(self) -> LossWeights:
        return self.stage.weights

    def learning_rate(self, step: int) -> float:
        stage = self.stage_at(step)
        return learning_rate(stage.base_lr, step - stage.begin, stage.end - stage.begin, decay_fraction=stage.decay_fraction)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that the first optimizer moves in this stage, by name."""
        return {name: p for name, p in self._parameters().items() if p.requires_grad}

    def _parameters(self) -> dict[str, nn.Parameter]:
        projection = {} if self.projection is None else {f"linear_proj.{name}": p for name, p in self.projection.named_parameters()}
        return dict(self.autoencoder.named_parameters()) | projection

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16)

    def images(self, batch: ImageBatch) -> Tensor:
        """(B, 3, H, W) in [-1, 1] on the device, in the dtype of the autoencoder's weights and in its memory format."""
        layout = torch.channels_last if self.autoencoder.fused else torch.preserve_format
        pixels = batch.pixels.to(self.world.device).to(memory_format=layout)  # converted once, as bytes
        return to_unit(pixels).to(self.autoencoder.last_encoder_weight.dtype)

    def sample(self, posterior: DiagonalGaussian, batch: ImageBatch) -> Tensor:
        """z (B, C, h, w), with noise that is a function of the seed and of each image's place in the run."""
        index = batch.index.to(self.world.device)
        return posterior.sample(noise=rng.normal(self.seed, index, like=posterior.mean, stream=rng.Stream.POSTERIOR))

    def features(self, images: Tensor) -> Tensor | None:
        """(B, F, h, w) of the foundation model; None without alignment."""
        return None if self.foundation is None else self.foundation(images)

    def alignment(self, z: Tensor, features: Tensor) -> Alignment:
        if self.reverse_proj:
            return Alignment(z, features, self.projection.weight[:, :, 0, 0])
        return Alignment(z, self.projection(features))

    def _model(self) -> dict[str, Tensor]:
        projection = {} if self.projection is None else self.projection.state_dict(prefix="linear_proj.")
        return self.autoencoder.state_dict() | projection

    def groups(self) -> Groups:
        return {
            "model": self._model(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self._parameters()),
            "optimizer_disc": optimizer_tensors(self.optimizer_disc, trainable(self.discriminator)),
            "guard": self.guard.state_dict(),
        }

    def load_groups(self, groups: Groups, source: str) -> None:
        load_tensors(self._model(), groups["model"], source)
        load_tensors(self.discriminator.state_dict(), groups["discriminator"], source)
        self.optimizer.state.clear()  # what a run that goes back has come to know since, the discriminator's moments perhaps
        self.optimizer_disc.state.clear()
        load_optimizer_tensors(self.optimizer, self._parameters(), groups["optimizer"], source)
        load_optimizer_tensors(self.optimizer_disc, trainable(self.discriminator), groups["optimizer_disc"], source)
        self.guard.load_state_dict(groups["guard"])

    def replicated(self) -> dict[str, Tensor]:
        """Everything that each replica trains for itself, by name: weights and moments."""
        judging = trainable(("discriminator", self.discriminator))
        return self._parameters() | judging | optimizer_tensors(self.optimizer, self._parameters()) | optimizer_tensors(self.optimizer_disc, judging)


def tokenizer_step(state: TokenizerState, step: int, micro_batches: list[ImageBatch]) -> dict[str, Tensor]:
    """One step of both networks on this process's micro-batches, which are on the device. No host sync: values are () tensors there.

    Both losses look at the same reconstructions, made before either network moves. A non-finite gradient of either
    leaves both as they were, running statistics of the discriminator too.
    """
    iteration = state.enter(step)
    rate = state.learning_rate(step)
    set_learning_rate(state.optimizer, rate)
    set_learning_rate(state.optimizer_disc, rate)
    statistics = [buffer.clone() for buffer in state.discriminator.buffers()]
    means = state.reduction.across(_gradients(state, step, iteration, micro_batches))
    norms = {state.optimizer: state.reduction.norm(state.trained().values())}
    if state.weights.discriminator_factor(iteration) > 0:
        norms[as_if_stepped(state.optimizer_disc, iteration)] = state.reduction.norm(state.discriminator.parameters())
    ok = state.guard.step(norms, state.max_grad_norm)
    for now, before in zip(state.discriminator.buffers(), statistics):
        now.copy_(torch.where(ok, now, before))
    for optimizer in norms:
        optimizer.zero_grad(set_to_none=True)
    return means | _per_value(means, state.autoencoder, micro_batches[0]) | {"grad_norm": norms[state.optimizer]}


def tokenizer_gradients(state: TokenizerState, step: int, micro_batches: list[ImageBatch]) -> dict[str, Tensor]:
    """Means of the terms over this process's micro-batches; p.grad is the gradient of its losses. Leaves running statistics as they were."""
    statistics = [buffer.clone() for buffer in state.discriminator.buffers()]
    means = _gradients(state, step, state.enter(step), micro_batches)
    for now, before in zip(state.discriminator.buffers(), statistics):
        now.copy_(before)
    return means


def _gradients(state: TokenizerState, step: int, iteration: int, micro_batches: list[ImageBatch]) -> dict[str, Tensor]:
    reduction, networks = state.reduction, (*state.trained().values(), *state.discriminator.parameters())
    reduction.begin(state.autoencoder, networks, len(micro_batches), state.discriminator.buffers())
    with state.autocast():  # around all micro-batches: it rounds each weight once, and keeps that until it ends
        for number, batch in enumerate(micro_batches):
            reduction.prepare()
            if state.autoencoder.dropout > 0:
                _seed_dropout(state, (step * state.world.size + state.world.rank) * len(micro_batches) + number)
            terms, gradients = state.gradients(state, iteration, batch)
            accumulate(gradients, reduction.parts)
            reduction.add(terms)
            del terms, gradients  # before the next ones come to be
    return reduction.own()


def _seed_dropout(state: TokenizerState, number: int) -> None:
    """PyTorch's generators by the run's seed and a micro-batch's number in the run: a run that continues has the masks that it would have had."""
    torch.manual_seed(int(rng.integers(state.seed, torch.tensor([number]), 1 << 31, rng.Stream.DROPOUT)))


def _per_value(means: dict[str, Tensor], autoencoder: AutoencoderKL, batch: ImageBatch) -> dict[str, Tensor]:
    """The sums over an image once more as means: loss and nll over its 3 H W values, kl over those of its latent."""
    pixels = batch.pixels[0].numel()
    height, width = batch.pixels.shape[-2:]
    latent = autoencoder.embed_dim * (height // autoencoder.downsample_ratio) * (width // autoencoder.downsample_ratio)
    return {f"{name}_per_pixel": means[name] / pixels for name in ("loss", "nll")} | {"kl_per_latent": means["kl"] / latent}


def plain_gradients(state: TokenizerState, step: int, batch: ImageBatch) -> tuple[dict[str, Tensor], Gradients]:
    """The terms of one micro-batch, () tensors, and the gradient of each trained parameter, as the two objectives are written.

    The discriminator's are there once it trains.
    """
    images = state.images(batch)
    with state.autocast():
        features = state.features(images)
        posterior = state.autoencoder.encode(images)
        z = state.sample(posterior, batch)
        reconstructions = state.autoencoder.decode(z)
        terms = generator_objective(
            images, reconstructions, posterior, step, state.weights, Judges(state.perceptual, state.discriminator),
            LastLayers(state.autoencoder.last_encoder_weight, state.autoencoder.last_decoder_weight),
            None if features is None else state.alignment(z, features),
        )  # fmt: skip
    trained = list(state.trained().values())
    gradients = dict(zip(trained, vjp(terms["loss"], trained)))
    if state.weights.discriminator_factor(step) > 0:
        with state.autocast():
            critic = discriminator_objective(images, reconstructions, step, state.weights, state.discriminator)
        judging = list(state.discriminator.parameters())
        terms, gradients = terms | critic, gradients | dict(zip(judging, vjp(critic["d_loss"], judging)))
    return terms, gradients


def accumulate(gradients: Gradients, parts: int) -> None:
    """p.grad += gradient / parts, in the memory layout of p, which the fused Adam asks for."""
    for p, gradient in gradients.items():
        if p.grad is not None:
            p.grad.add_(gradient, alpha=1 / parts)
        elif parts == 1 and gradient.stride() == p.stride():
            p.grad = gradient
        else:
            p.grad = torch.empty_like(p).copy_(gradient).div_(parts)


def as_if_stepped(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.Optimizer:
    """Give an Adam that was never stepped the state that `steps` zero gradients would have left.

    The reference steps the discriminator from the first iteration, with a loss of 0 before its start; only the step
    count, which removes the bias correction, is left of that. Steps one to `steps` are saved.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                count = torch.full((), float(steps), device=p.device)  # not torch.tensor, which would copy it there and wait
                optimizer.state[p].update(step=count, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return optimizer
