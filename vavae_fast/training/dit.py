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
from vavae_fast.training.optimizer import (
    gradient_norm,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_ema_decay,
    set_learning_rate,
    trainable,
)  # fmt: skip
from vavae_fast.training.parallel import average_gradients, reduce_gradients
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


def dit_step(state: DiTState, step: int, micro_batches: list[LatentBatch]) -> dict[str, Tensor]:
    """One optimizer step of LightningDiT on this process's micro-batches. No host sync: values are () tensors on the device.

    A non-finite gradient leaves weights, moments and EMA as they were and counts in `guard.skipped`.
    """
    if state.transport_late is not None and step == state.late_from:
        state.guard.expect_another_loss()
    set_learning_rate(state.optimizer, state.learning_rate(step))
    set_ema_decay(state.optimizer, state.ema_decay, step, state.ema_warmup)
    means: dict[str, Tensor] = {}
    for number, batch in enumerate(micro_batches, 1):
        reduce_gradients(state.model, last=number == len(micro_batches))
        terms = flow_terms(state, step, batch)
        (terms["loss"] / len(micro_batches)).backward()
        for key, value in terms.items():
            means[key] = means.get(key, 0) + value.detach() / len(micro_batches)
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    average_gradients(parameters, state.world)
    grad_norm = gradient_norm(parameters)
    state.guard.step({state.optimizer: grad_norm}, state.settings.max_grad_norm)
    state.optimizer.zero_grad(set_to_none=True)
    return means | {"grad_norm": grad_norm}


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
