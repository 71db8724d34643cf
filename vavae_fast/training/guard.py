"""The guard against non-finite gradients: such a step changes nothing, is counted, and too many in a row end the run."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vavae_fast.errors import BadInput


class Guard:
    """Steps optimizers only where all gradient norms are finite, deciding on the device.

    The fused Adam and AdamW of `torch.optim`, and `AdamWEMA`, read two attributes: with `found_inf` 1 they leave weights, moments,
    step count and average as they were, and they divide gradients by `grad_scale`, which is how clipping costs no pass of its own.
    """

    def __init__(self, device: torch.device, max_skipped: int):
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.max_skipped = max_skipped

    def step(self, norms: Mapping[torch.optim.Optimizer, Tensor], max_norm: float | None = None) -> Tensor:
        """Step every optimizer if the L2 norms of their gradients, () tensors, are all finite; the gradients of each are scaled
        down to `max_norm` where its norm is larger. Returns whether, a () bool tensor on the device."""
        ok = torch.isfinite(torch.stack(list(norms.values())).sum())
        for optimizer, norm in norms.items():
            optimizer.found_inf = (~ok).to(torch.float32)
            optimizer.grad_scale = None if max_norm is None else (norm / max_norm).clamp(min=1.0)
            optimizer.step()
        self.skipped += ~ok
        self.in_a_row = torch.where(ok, 0, self.in_a_row + 1)
        return ok

    def check(self, step: int) -> None:
        """Called at log lines: `BadInput` when the last `max_skipped` steps or more were all skipped."""
        count = int(self.in_a_row)
        if count >= self.max_skipped:
            raise BadInput(
                f"the gradient was not finite in the last {count} steps up to step {step}; weights are those before them. "
                "Lower the learning rate, clip gradients (max_grad_norm), for LightningDiT set model.use_qknorm=true, and check the data"
            )
