"""Whether a run still learns: its gradients may fade to next to nothing with nothing infinite and no leap, and days pass (REPA-E, issue 30).

A run that has converged must not be taken for a dead one. Its gradients stay: of noisy targets and small batches they are noise around the
optimum, and an L1 term's never shrink. Only where the loss itself goes to zero do they go with it, and then the loss, smooth at its
optimum, has fallen by the square of what they have. So what counts is a gradient of FAINT of the highest level that it has held in this
run, while the loss stands above FAINT of its own: a converging run's would be at FAINT squared. How far weights move says less: Adam divides
the gradient's size out, and a rate that decays to 0 stops them rightly.
"""

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from vavae_fast.errors import BadInput

LEAST = 5  # log lines that make a level
FAINT = 1e-4  # of a level: next to nothing


class Level:
    """The highest median of LEAST log lines so far: of a run's whole past, and no single line's."""

    def __init__(self) -> None:
        self.recent: list[float] = []
        self.highest = 0.0

    def add(self, value: float) -> None:
        self.recent = [*self.recent[1 - LEAST :], abs(value)]
        if len(self.recent) == LEAST:
            self.highest = max(self.highest, statistics.median(self.recent))

    def state(self) -> Tensor:
        return torch.tensor([self.highest, *self.recent], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        self.highest, *self.recent = state.tolist()


class Pulse:
    """Counts the steps in a row whose log lines show a faint gradient; a line with one live step among its steps is not faint."""

    def __init__(self, max_faint: int):
        """`max_faint`: so many steps in a row end the run; 0: none do."""
        self.max_faint, self.faint = max_faint, 0
        self.norm, self.loss = Level(), Level()

    def state_dict(self) -> dict[str, Tensor]:
        return {"faint": torch.tensor(self.faint), "norm_level": self.norm.state(), "loss_level": self.loss.state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.faint = int(state["faint"])
        self.norm.load(state["norm_level"])
        self.loss.load(state["loss_level"])

    def expect_another_loss(self) -> None:
        self.faint, self.norm, self.loss = 0, Level(), Level()

    def feel(self, step: int, steps: int, norm: float, loss: float) -> None:
        """Take a log line's mean gradient norm and loss, over the `steps` up to `step`. `BadInput` at `max_faint` faint steps.

        A line with a skipped step has no finite mean and says nothing. Before there is a level only a gradient of exactly 0 is faint.
        """
        if self.max_faint == 0 or not math.isfinite(norm) or not math.isfinite(loss):
            return
        if norm > FAINT * self.norm.highest or abs(loss) <= FAINT * self.loss.highest:
            self.faint = 0
            self.norm.add(norm)
            self.loss.add(loss)
            return
        self.faint += steps
        if self.faint >= self.max_faint:
            raise BadInput(
                f"the run no longer learns: its gradient norm was {norm:.2g} or so in the {self.faint} steps up to step {step}, of "
                f"{self.norm.highest:.2g} that it had, and the loss stands at {loss:.4g}. Continue from a checkpoint of before with a lower learning "
                "rate or clipped gradients (max_grad_norm), or set train.max_faint=0 to go on all the same"
            )
