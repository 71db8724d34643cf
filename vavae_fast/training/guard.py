"""The guard of a run. A step with a non-finite gradient changes nothing, is counted, and too many in a row end the run; a loss that
leaps up sends the run back to a checkpoint from before, and past the batches in between (Chowdhery et al. 2022, PaLM, section 5.1); one
whose gradients have faded stops (`pulse.py`)."""

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from vavae_fast.errors import BadInput
from vavae_fast.training.pulse import Pulse

WINDOW = 128  # log lines that a loss is compared with
LEAST = 20  # of them, before it is
SIGMAS = 6.0  # a spike stands out by so many standard deviations of the window
RISE = 0.1  # and by this part of its mean


class Guard:
    """Steps optimizers only where all gradient norms are finite, deciding on the device.

    The fused Adam and AdamW of `torch.optim`, and `AdamWEMA`, read two attributes: with `found_inf` 1 they leave weights, moments,
    step count and average as they were, and they divide gradients by `grad_scale`, which is how clipping costs no pass of its own.
    """

    def __init__(self, device: torch.device, max_skipped: int, max_rollbacks: int = 0, watches: str = "loss", max_faint: int = 0):
        """`watches`: the logged value whose leaps count. Not every loss is one: a weight that adapts makes it leap with nothing wrong."""
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.max_skipped, self.max_rollbacks, self.watches = max_skipped, max_rollbacks, watches
        self.losses: list[float] = []  # of the last log lines
        self.pulse = Pulse(max_faint)
        self.rollbacks, self.passed_over = 0, 0  # how often the run went back; how many steps' batches it left out

    def state_dict(self) -> dict[str, Tensor]:
        counts = dict(rollbacks=torch.tensor(self.rollbacks), passed_over=torch.tensor(self.passed_over))
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "losses": losses, **counts, **self.pulse.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave; earlier versions knew only the first two, then not the pulse."""
        self.skipped.copy_(state["skipped"])
        self.in_a_row.copy_(state["in_a_row"])
        if "losses" in state:
            self.losses = state["losses"].tolist()
            self.rollbacks, self.passed_over = int(state["rollbacks"]), int(state["passed_over"])
        if "faint" in state:
            self.pulse.load_state_dict(state)

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

    def spiked(self, loss: float) -> bool:
        """Whether the mean loss of a log line stands out from those before; one that does not joins them. Never with max_rollbacks 0."""
        if self.max_rollbacks == 0 or not math.isfinite(loss):
            return False
        if len(self.losses) >= LEAST:
            mean = statistics.fmean(self.losses)
            if loss > mean + max(SIGMAS * statistics.pstdev(self.losses), RISE * abs(mean)):
                return True
        self.losses = [*self.losses[1 - WINDOW :], loss]
        return False

    def expect_another_loss(self) -> None:
        """Forget the window: what follows is another distribution of t, or another objective."""
        self.losses = []
        self.pulse.expect_another_loss()

    def went_back(self, before: "Guard", steps: int) -> None:
        """Note that a run whose guard was `before` is `steps` back; this guard came from the checkpoint."""
        self.rollbacks, self.passed_over = before.rollbacks + 1, before.passed_over + steps

    def exhausted(self) -> bool:
        """Whether the last `max_skipped` steps or more were all skipped. One host sync: for log lines."""
        return int(self.in_a_row) >= self.max_skipped

    def verdict(self, step: int, global_batch: int, whose: str) -> BadInput:
        """The end of a run that is exhausted after step `step`; `whose` gradients were not finite is a sentence."""
        count, end = int(self.in_a_row), (step + self.passed_over) * global_batch
        return BadInput(
            f"the gradient was not finite in the last {count} steps up to step {step} (samples {end - count * global_batch:,} to {end - 1:,} "
            f"of the run's order); weights are those before them. {whose}. "
            "Lower the learning rate, clip gradients (max_grad_norm), for LightningDiT set model.use_qknorm=true, and check the data"
        )
