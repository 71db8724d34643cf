"""What a tokenizer's training step costs before there is a GPU: the step itself on fake tensors, its operations and allocations counted.

Nothing is modelled, so what changes the step changes its prediction. Allocations are counted as on a CPU, without what libraries take for
themselves, and of a fused operator what its kernels are given.
"""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vavae_fast.data.images import ImageBatch
from vavae_fast.training.guard import Guard
from vavae_fast.training.tokenizer import TokenizerState, as_if_stepped, tokenizer_step
from vavae_kernels.testing.traffic import kernels_recorded


@dataclass(frozen=True)
class StepCost:
    """With the GAN at work: floating-point operations of a micro-batch (2 for a multiply-add), and bytes at a step's fullest moment."""

    flops: int
    peak_bytes: int


def step_cost(state: TokenizerState, size: int, micro_batch: int, accumulating: bool) -> StepCost:
    """The cost of a step whose micro-batches are of size x size images, several of them when `accumulating`.

    `state` was made for this alone: its tensors become fake. Its frozen networks may be on the meta device. Optimizers are counted with
    their moments.
    """
    stage = state.stage
    iteration = max(1, -(-stage.weights.disc_start // 2))
    state.stages = (replace(stage, begin=0, end=iteration + 1),)
    with FakeTensorMode(allow_non_fake_inputs=True), kernels_recorded():
        _make_fake(state)
        trained = [p for network in (state.autoencoder, state.projection, state.discriminator) if network is not None for p in network.parameters()]
        for p in trained if accumulating else ():
            p.grad = torch.empty_like(p)  # of the micro-batches before
        images = ImageBatch(torch.empty(micro_batch, 3, size, size, dtype=torch.uint8), torch.zeros(micro_batch), torch.arange(micro_batch))
        held = _held_bytes(state) + sum(p.grad.nbytes for p in trained if p.grad is not None)
        with _Counter() as count:
            tokenizer_step(state, iteration, [images])
        return StepCost(count.flops, held + count.peak_bytes)


def _networks(state: TokenizerState) -> list[nn.Module]:
    every = (state.autoencoder, state.projection, state.discriminator, state.perceptual, state.foundation, getattr(state.foundation, "model", None))
    return [network for network in every if isinstance(network, nn.Module)]


def _make_fake(state: TokenizerState) -> None:
    """Put an empty tensor of the CPU in place of every parameter and buffer: called where those are fake."""
    fakes: dict[Tensor, Tensor] = {}
    for module in (module for network in _networks(state) for module in network.modules()):
        for name, p in module._parameters.items():
            if p is not None:
                fakes[p] = module._parameters[name] = nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for optimizer in (state.optimizer, state.optimizer_disc):
        for group in optimizer.param_groups:
            group["params"] = [fakes[p] for p in group["params"]]
        optimizer.state.clear()
        as_if_stepped(optimizer, 1)
    state.guard = Guard(torch.device("cpu"), state.guard.max_skipped)


def _held_bytes(state: TokenizerState) -> int:
    """What a state holds between two steps."""
    tensors = [t for network in _networks(state) for t in (*network.parameters(), *network.buffers())]
    tensors += [t for optimizer in (state.optimizer, state.optimizer_disc) for slots in optimizer.state.values() for t in slots.values()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


class _Counter(TorchDispatchMode):
    """Operations, and the bytes of storages that came to be while it is on and have not gone."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.peak_bytes = self._bytes = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given | self._alive:
                self._begins(tensor.untyped_storage())
        return out

    def _begins(self, storage: torch.UntypedStorage) -> None:
        self._alive.add(storage._cdata)
        self._bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._ends, storage._cdata, storage.nbytes())

    def _ends(self, storage: int, size: int) -> None:
        self._alive.discard(storage)
        self._bytes -= size
