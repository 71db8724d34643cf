"""What is known of a run that ends because its gradients are not finite: whose they are, and how large the others."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from vavae_fast import artifacts
from vavae_fast.training.log import RunLog
from vavae_fast.training.reduction import Reduction

FILE = "gradients.json"  # in the run folder


class Dissected(Protocol):
    """A state whose gradients can be looked at one by one."""

    reduction: Reduction

    def replicated(self) -> dict[str, Tensor]:
        """Everything that is trained, by name, in the model's order."""


def dissect(state: Dissected, values: dict[str, Tensor], facts: dict[str, Any], log: RunLog) -> str:
    """A sentence on the gradients in p.grad, this process's, of the last step once more: it changed nothing, and dropped its own.

    Called on every process; the main one writes `facts`, `values` and each parameter's gradient norm to gradients.json, text where not finite.
    """
    values = state.reduction.across(values)
    trained = {name: p for name, p in state.replicated().items() if p.grad is not None}
    norms = dict(zip(trained, torch.stack([state.reduction.norm([p]) for p in trained.values()]).tolist()))
    for p in trained.values():
        p.grad = None
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    whole = {"values": {name: value.item() for name, value in values.items()}, "gradient_norms": norms}
    if log.folder is not None:
        with log.sparing(FILE):
            artifacts.write_json(log.folder / FILE, facts | {key: _in_json(numbers) for key, numbers in whole.items()})
    if not bad:
        largest = max(norms, key=norms.__getitem__)
        return f"Computed again each is finite, the largest, {norms[largest]:.3g}, that of {largest} ({FILE})"
    between = bad[0] if len(bad) == 1 else f"{bad[0]} to {bad[-1]}"
    return f"It is that of {len(bad)} of {len(norms)} parameters, {between} ({FILE})"


def _in_json(numbers: dict[str, float]) -> dict[str, float | str]:
    return {name: number if math.isfinite(number) else str(number) for name, number in numbers.items()}
