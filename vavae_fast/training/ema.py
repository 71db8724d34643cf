"""Exponential moving average of weights: shadow <- decay * shadow + (1 - decay) * weight."""

import torch
from torch import Tensor, nn


class EMA:
    """The average of a module's trainable parameters in float32; frozen parameters and buffers follow the module.

    `decay` is the reference's 0.9999. With `warmup` the decay of step n is min(decay, (1 + n) / (10 + n)), so that the
    first steps of a short run are forgotten.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = False):
        self.module, self.decay, self.warmup = module, decay, warmup
        self.shadow = {name: p.detach().clone().float() for name, p in module.named_parameters() if p.requires_grad}

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int, ok: Tensor) -> None:
        """Move towards the module's weights; where `ok`, a () bool tensor, is false, stay. No host sync."""
        shadow = list(self.shadow.values())
        weights = [p for p in self.module.parameters() if p.requires_grad]
        difference = torch._foreach_sub(weights, shadow)
        torch._foreach_mul_(difference, ok.to(torch.float32) * (1 - self.decay_at(step)))
        torch._foreach_add_(shadow, difference)

    def state_dict(self) -> dict[str, Tensor]:
        """A full state dict of the module with the averaged weights in place of its own."""
        return {**self.module.state_dict(), **self.shadow}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.shadow.items():
            value.copy_(state[name])
