"""What a call really moves and allocates: every launch and every PyTorch operation inside it, counted at real shapes on fake tensors.

    with counted() as traffic:
        function(**inputs)
    traffic.bytes, traffic.allocated, traffic.launches, traffic.operations

A launch counts each tensor that it is given once (`Launch.bytes`), a PyTorch operation its inputs and outputs. Views and
allocations move nothing. Nothing is computed: the tensors inside are fake, so the size of a real batch costs no memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._compat import TRITON_VERSION
from .._launch import Launch, watched
from .._registry import LAUNCHERS, NAMESPACE, auto_means
from .numerics import outputs
from .spec import DTYPES, Spec

_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_MOVE_NOTHING = (*_ALLOCATIONS, "detach", "alias", "_unsafe_view", "view", "_reshape_alias", "lift_fresh")


class Traffic(TorchDispatchMode):
    """Counts while it is on the stack of modes; use `counted`. Bytes, and the names of launches and operations in order."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.allocated = 0
        self.launches: list[Launch] = []
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == NAMESPACE:
            with self:  # what the launcher does inside its operator counts too
                return LAUNCHERS[func._schema.name.split("::")[1]](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        produced = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        storages = {id(t.untyped_storage()) for t in given}
        self.allocated += sum(t.untyped_storage().nbytes() for t in produced if id(t.untyped_storage()) not in storages)
        if func.namespace != "prim" and not func.is_view and name not in _MOVE_NOTHING:  # prim::device only asks
            self.bytes += sum(t.numel() * t.element_size() for t in (*given, *produced))
            self.operations.append(name)
        return result

    def _launched(self, launch: Launch) -> None:
        self.bytes += launch.bytes()
        self.launches.append(launch)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Fake tensors inside; launches are recorded instead of run."""
    traffic = Traffic()
    with FakeTensorMode(allow_non_fake_inputs=True), watched(traffic._launched, run=False), traffic:
        yield traffic


@contextmanager
def kernels_recorded() -> Iterator[None]:
    """Operators left at "auto" take their kernels, whose launches are recorded instead of run: for whole models of fake tensors.

    Without Triton they take their references, as they would in earnest.
    """
    with auto_means("triton" if TRITON_VERSION is not None else "auto"), watched(lambda launch: None, run=False):
        yield


def forward_and_backward(spec: Spec, shape: str, dtypes: str, variant: str) -> tuple[Traffic, Traffic]:
    """Traffic of one forward and one backward of `spec` at a real shape."""
    with FakeTensorMode():
        inputs = spec.inputs(spec.real[shape], DTYPES[dtypes], variant, torch.device("cpu"))
        forward, backward = Traffic(), Traffic()
        with watched(forward._launched, run=False), forward:
            results = outputs(spec.function(**inputs, impl="triton"))
        wanted = [inputs[name] for name in spec.gradients if isinstance(inputs.get(name), Tensor)]
        cotangents = [torch.empty_like(result) for result in results]
        if wanted:
            with watched(backward._launched, run=False), backward:
                torch.autograd.grad(results, wanted, cotangents)
    return forward, backward
