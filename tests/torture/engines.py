"""Both engines as their commands build them, and a fault put into one of their steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import processes
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vavae_fast.commands import invoke, train, train_tokenizer
from vavae_fast.config import load_config
from vavae_fast.data.streams import ImageStream, LatentStream, Share
from vavae_fast.distributed import World
from vavae_fast.training.dit import dit_step
from vavae_fast.training.log import RunLog
from vavae_fast.training.parallel import local_rows
from vavae_fast.training.tokenizer import tokenizer_step

BATCH = 4


@dataclass
class Engine:
    """A state in training, its step, and the micro-batches of each step."""

    state: Any
    step: Callable[[Any, int, list[Any]], dict[str, Tensor]]
    stream: Any
    accumulation: int

    def micro_batches(self, number: int) -> list[Any]:
        batches = self.stream.batches(number)
        try:
            return list(islice(batches, self.accumulation))
        finally:
            batches.close()

    def train(self, number: int, micro_batches: list[Any] | None = None) -> dict[str, Tensor]:
        return self.step(self.state, number, micro_batches or self.micro_batches(number))

    def tensors(self) -> dict[str, Tensor]:
        """Weights, moments, averages, running statistics: what a step moves, of sharded ones the rows here. The guard's counts are not among them."""
        groups = self.state.groups()
        return {f"{group}/{name}": local_rows(t).detach() for group in groups if group != "guard" for name, t in groups[group].items()}

    def bits(self) -> dict[str, bytes]:
        return {name: t.numpy().tobytes() for name, t in self.tensors().items()}

    def trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters that have gradients, by network and name: of a tokenizer both networks'."""
        state = self.state
        if hasattr(state, "discriminator"):
            judging = [(f"discriminator.{name}", p) for name, p in state.discriminator.named_parameters()]
            return [*state.trained().items(), *judging]
        return [(name, p) for name, p in state.model.named_parameters() if p.requires_grad]


def prepare(folder: Path) -> None:
    """Latents, images, stand-ins and configs."""
    processes.prepare(folder)
    tiny.prepare(folder / "pipeline")


def dit(folder: Path, world: World, *overrides: str) -> Engine:
    plan = _plan(train, processes.words(folder, "dit", *overrides)[1:])
    state = train._state(plan, world, RunLog(None, "dit"))
    share = Share(plan.config.train.global_batch_size, world.rank, world.size, plan.micro_batch)
    stream = LatentStream(plan.latents, 0, share, threads=1)
    return Engine(state, dit_step, stream, plan.accumulation)


def tokenizer(folder: Path, world: World, *overrides: str) -> Engine:
    words = tiny.Tiny(folder / "pipeline").tokenizer(folder, "tokenizer", "model.params.lossconfig.params.disc_start=0", *overrides)
    plan = _plan(train_tokenizer, words)
    state = train_tokenizer._state(plan, world, RunLog(None, "tokenizer"))
    train_tokenizer._prepare(state, plan.config, world.device)
    share = Share(plan.config.global_batch_size, world.rank, world.size, plan.micro_batch)
    return Engine(state, tokenizer_step, ImageStream(plan.images, 0, share), plan.accumulation)


ENGINES: dict[str, Callable[..., Engine]] = {"LightningDiT": dit, "tokenizer": tokenizer}


def _plan(command: Any, words: list[str]) -> Any:
    args = invoke.parse(command, command.__name__.rpartition(".")[2], words)
    return command.plan(load_config(args.config, tuple(args.overrides), kind=command.CONFIG), args)


@contextmanager
def gradient(engine: Engine, plant: Callable[[], None]) -> Iterator[None]:
    """Call `plant` once, when this process's gradients are made and before they meet the others'."""
    reduction, across = engine.state.reduction, engine.state.reduction.across

    def planted(values: dict[str, Tensor]) -> dict[str, Tensor]:
        plant()
        return across(values)

    reduction.across = planted
    try:
        yield
    finally:
        del reduction.across


def put(tensor: Tensor, place: int, value: float) -> None:
    """tensor[place] = value, counted over its elements in order; of a sharded one, over the rows here."""
    with torch.no_grad():
        rows = local_rows(tensor)
        if rows.numel():
            rows[tuple(map(int, np.unravel_index(place % rows.numel(), rows.shape)))] = value


class NoHostSync(TorchDispatchMode):
    """Raises where a value is asked of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            raise HostSync(func.name())
        return func(*args, **(kwargs or {}))


class HostSync(AssertionError):
    """A step waited for the device."""
