"""From the gradients of micro-batches to that of the global batch."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from vavae_fast.distributed import World
from vavae_fast.training.optimizer import gradient_norm
from vavae_fast.training.parallel import average_gradients


class Reduction:
    """How the gradients and values of a step's micro-batches, on all processes, become those of its global batch: their means.

    As a step uses it; `training/elastic.py` has another of the same methods:

        reduction.begin(model, parameters, len(micro_batches))
        for batch in micro_batches:
            reduction.prepare()
            (loss / reduction.parts).backward()
            reduction.add(values)
        values = reduction.own()          # p.grad: this process's; of sharded weights all processes' already
        values = reduction.across(values)     # p.grad: all processes'
    """

    def __init__(self, world: World):
        self.world = world

    def begin(self, model: nn.Module, parameters: Iterable[nn.Parameter], micro_batches: int, buffers: Iterable[Tensor] = ()) -> None:
        """A step of so many micro-batches begins. `buffers` are what the model's forward pass moves (running statistics)."""
        self.model, self.parameters, self.parts, self.left = model, list(parameters), micro_batches, micro_batches
        self.values: dict[str, Tensor] = {}

    def prepare(self) -> None:
        """Before a micro-batch's forward pass. A sharded model averages its gradients in the backward pass of the last one."""
        self.left -= 1
        if hasattr(self.model, "set_requires_gradient_sync"):
            self.model.set_requires_gradient_sync(self.left == 0)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """After its backward pass, with the values, () tensors, of its forward pass."""
        for key, value in values.items():
            self.values[key] = self.values.get(key, 0) + value.detach() / self.parts

    def own(self) -> dict[str, Tensor]:
        """After the last micro-batch: this process's values; its gradients are in p.grad."""
        return self.values

    def across(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Average p.grad over all processes. Values stay this process's: log lines average them when they are read."""
        average_gradients(self.parameters, self.world)
        return values

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The L2 norm of the averaged gradients of `parameters`, ()."""
        return gradient_norm(parameters)
