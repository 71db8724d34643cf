"""The guard against non-finite gradients: such a step changes nothing, is counted, and too many in a row end the run."""

import torch
from torch import Tensor

from vavae_fast.errors import BadInput


class Guard:
    """Steps optimizers only where the gradient norm is finite, deciding on the device.

    `torch.optim`'s fused Adam and AdamW read `found_inf`: with 1 they leave weights, moments and step count as they were.
    """

    def __init__(self, device: torch.device, max_skipped: int):
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.max_skipped = max_skipped

    def step(self, grad_norm: Tensor, *optimizers: torch.optim.Optimizer) -> Tensor:
        """Take the steps if `grad_norm`, a () tensor, is finite. Returns that, a () bool tensor on the device."""
        ok = torch.isfinite(grad_norm)
        for optimizer in optimizers:
            optimizer.grad_scale, optimizer.found_inf = None, (~ok).to(torch.float32)
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
