"""The LightningDiT step: paper section 4; reference train.py."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vavae_fast import rng
from vavae_fast.data.streams import LatentBatch
from vavae_fast.distributed import World
from vavae_fast.flow.transport import Transport
from vavae_fast.schema import OptimizerConfig
from vavae_fast.training.checkpoint import Groups, load_tensors
from vavae_fast.training.guard import Guard
from vavae_fast.training.optimizer import learning_rate, load_optimizer_tensors, optimizer_tensors, set_ema_decay, set_learning_rate, trainable
from vavae_fast.training.parallel import is_sharded, shard_place
from vavae_fast.training.reduction import Reduction
from vavae_kernels import AdamWEMA


@dataclass
class DiTState:
    """What a LightningDiT run trains. `transport_late` takes over from step `late_from` (uniform t after logit-normal)."""

    model: nn.Module
    optimizer: AdamWEMA
    transport: Transport
    guard: Guard
    world: World
    seed: int
    settings: OptimizerConfig
    max_steps: int
    bf16: bool
    ema_decay: float
    ema_warmup: bool = False
    transport_late: Transport | None = None
    late_from: int = 0
    reduction: Reduction | None = None  # how gradients are summed; None: in the order of their coming

    def __post_init__(self):
        self.reduction = self.reduction or Reduction(self.world)

    @property
    def shards(self) -> int:
        """Over how many processes, neighbours, the weights are spread; 1: every process has all."""
        return next((shard_place(p)[1] for p in self.model.parameters() if is_sharded(p)), 1)

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.settings.lr, step, self.max_steps, self.settings.warmup_steps, self.settings.decay_fraction)

    def ema(self) -> dict[str, Tensor]:
        """A full state dict of the model with the averaged weights, float32, in place of its own."""
        return {**self.model.state_dict(), **self.optimizer.ema_state_dict()}

    def groups(self) -> Groups:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema(),
            "optimizer": optimizer_tensors(self.optimizer, trainable(self.model)),
            "guard": self.guard.state_dict(),
        }

    def load_groups(self, groups: Groups, source: str) -> None:
        named = trainable(self.model)
        load_tensors(self.model.state_dict(), groups["model"], source)
        load_optimizer_tensors(self.optimizer, named, groups["optimizer"], source)
        load_optimizer_tensors(self.optimizer, named, {f"ema.{name}": groups["ema"][name] for name in named}, source)
        self.guard.load_state_dict(groups["guard"])

    def replicated(self) -> dict[str, Tensor]:
        """Everything that each replica trains for itself, by name: weights, average, moments."""
        named = trainable(self.model)
        averages = {f"ema.{name}": value for name, value in self.optimizer.ema_state_dict().items()}
        return named | averages | optimizer_tensors(self.optimizer, named)


def dit_step(state: DiTState, step: int, micro_batches: list[LatentBatch]) -> dict[str, Tensor]:
    """One optimizer step of LightningDiT on this process's micro-batches. No host sync: values are () tensors on the device.

    A non-finite gradient leaves weights, moments and EMA as they were and counts in `guard.skipped`.
    """
    if state.transport_late is not None and step == state.late_from:
        state.guard.expect_another_loss()
    set_learning_rate(state.optimizer, state.learning_rate(step))
    set_ema_decay(state.optimizer, state.ema_decay, step, state.ema_warmup)
    means = state.reduction.across(dit_gradients(state, step, micro_batches))
    grad_norm = state.reduction.norm(trainable(state.model).values())
    state.guard.step({state.optimizer: grad_norm}, state.settings.max_grad_norm)
    state.optimizer.zero_grad(set_to_none=True)
    return means | {"grad_norm": grad_norm}


def dit_gradients(state: DiTState, step: int, micro_batches: list[LatentBatch]) -> dict[str, Tensor]:
    """Means over this process's micro-batches of loss, mse and cos; p.grad is the gradient of its loss. Changes nothing else."""
    state.reduction.begin(state.model, trainable(state.model).values(), len(micro_batches))
    for batch in micro_batches:
        state.reduction.prepare()
        terms = flow_terms(state, step, batch)
        (terms["loss"] / state.reduction.parts).backward()
        state.reduction.add(terms)
    return state.reduction.own()


def flow_terms(state: DiTState, step: int, batch: LatentBatch) -> dict[str, Tensor]:
    """loss = mse + cos of one micro-batch; noise, t and dropped labels are functions of (seed, position in the run)."""
    late = state.transport_late is not None and step >= state.late_from
    transport = state.transport_late if late else state.transport
    x0 = rng.normal(state.seed, batch.index, like=batch.latents)
    t = transport.times_from(time_draw(state.seed, batch.index, transport.use_lognorm))
    dropped = _dropped_labels(state.seed, batch.index, state.model.y_embedder.dropout_prob)
    with torch.autocast(batch.latents.device.type, torch.bfloat16, enabled=state.bf16):
        terms = transport.training_losses(state.model, batch.latents, dict(y=batch.labels, drop_labels=dropped), x0=x0, t=t)
    mse = terms["loss"].mean()
    if "cos_loss" not in terms:
        return {"loss": mse, "mse": mse}
    cos = terms["cos_loss"].mean()
    return {"loss": mse + cos, "mse": mse, "cos": cos}


def _dropped_labels(seed: int, index: Tensor, probability: float) -> Tensor | None:
    """(B,) bool, which labels become the null class; None for a model that has none."""
    return rng.uniform(seed, index, rng.Stream.LABEL_DROP) < probability if probability > 0 else None


def time_draw(seed: int, index: Tensor, lognorm: bool) -> Tensor:
    """(B,) standard normal (logit-normal t) or uniform draws."""
    if not lognorm:
        return rng.uniform(seed, index, rng.Stream.TIME)
    return rng.normal(seed, index, torch.empty(index.shape[0], 1, device=index.device), rng.Stream.TIME)[:, 0]
