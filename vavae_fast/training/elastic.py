"""The elastic exact mode (`train.deterministic: elastic`): any number of processes gives the same weights, bit for bit.

A step's global batch is cut into `train.slots` equal slots, a power of two. A slot is a micro-batch, so whoever computes it runs the same
kernels on the same shapes. Floating-point sums depend on their order alone, and here all have one that no number of processes changes:

    gradients, values   added pairwise by slot: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), each pair inside one process or between two
    gradient norm       fp64 squares, added by halves of a row, then by halves over all rows

So the number of processes is a power of two too, and divides that of slots. Without shards a process takes neighbouring slots and meets
the others once a step; FSDP adds in every backward pass, so there the processes of a node take turns. Optimizer and EMA are elementwise.
The price: gradients of log2(slots of a process) micro-batches are held, FSDP communicates with every micro-batch, and kernels are the
deterministic ones. One kind of device, one version of PyTorch: other kernels have other bits.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from vavae_fast.distributed import World
from vavae_fast.errors import BadInput, require
from vavae_fast.training.parallel import buckets, first_row, gathered, is_sharded, local_rows

WORKSPACES = (":4096:8", ":16:8")  # of cuBLAS, with which its products are the same every time


class ElasticReduction:
    """`Reduction` in an order of its own. `mesh`: the `process_mesh`, along whose dimension "shard" weights are spread; None: they are not.

    Running statistics (`buffers`) begin every slot as they were before the step, and end as their mean over the slots.
    """

    def __init__(self, world: World, slots: int, mesh: Any = None):
        self.parts = slots
        self.near, self.far = None, dist.group.WORLD if world.size > 1 else None
        self.leads = True  # among the processes that hold the same whole tensors and different rows
        if mesh is not None:
            self.near = mesh.get_group("shard")
            self.far = mesh.get_group("replicate") if "replicate" in mesh.mesh_dim_names else None
            self.leads = mesh.get_local_rank("shard") == 0

    def attach(self, model: nn.Module) -> None:
        """Have FSDP add the gradients of `model`'s sharded weights by `PairwiseReduceScatter`, with every micro-batch."""
        for module in model.modules():
            if hasattr(module, "set_custom_reduce_scatter"):
                module.set_custom_reduce_scatter(PairwiseReduceScatter())
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def begin(self, model: nn.Module, parameters: Iterable[nn.Parameter], micro_batches: int, buffers: Iterable[Tensor] = ()) -> None:
        self.parameters, self.micro_batches = list(parameters), micro_batches
        buffers = list(buffers)
        self.before = [(buffer, buffer.clone()) for buffer in buffers]
        self.buffers = [buffer for buffer in buffers if buffer.is_floating_point()]  # others count forward passes, the same in every slot
        self.sums: list[tuple[int, list[Tensor]]] = []  # (slots in it, tensors), the larger first: a binary counter

    def prepare(self) -> None:
        for buffer, before in self.before:
            buffer.copy_(before)

    def add(self, values: Mapping[str, Tensor]) -> None:
        self.keys, self.trained = list(values), [p for p in self.parameters if p.grad is not None]
        means = torch.stack([value.detach() for value in values.values()]) / self.parts
        tensors = [means, *(buffer / self.parts for buffer in self.buffers), *(p.grad for p in self.trained)]
        for p in self.trained:
            p.grad = None
        if self.near is not None:
            add_pairwise([t for t in tensors if not is_sharded(t)], self.near)
        slots = 1
        while self.sums and self.sums[-1][0] == slots:
            earlier = self.sums.pop()[1]
            torch._foreach_add_([local_rows(t) for t in earlier], [local_rows(t) for t in tensors])
            slots, tensors = 2 * slots, earlier
        self.sums.append((slots, tensors))

    def own(self) -> dict[str, Tensor]:
        ((slots, (means, *tensors)),) = self.sums
        assert slots == self.micro_batches, "a power of two"
        self.sums = []
        for target, mean in zip(self.buffers, tensors):
            target.copy_(mean)
        for p, gradient in zip(self.trained, tensors[len(self.buffers) :], strict=True):
            p.grad = gradient
        return dict(zip(self.keys, means.unbind()))

    def across(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.far is None:
            return values
        means = torch.stack(list(values.values()))
        add_pairwise([means, *self.buffers, *(local_rows(p.grad) for p in self.trained)], self.far)
        return dict(zip(values, means.unbind()))

    @torch.no_grad()
    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """A row lies on one process, whole; zeros stand for those of others, and adding zeros has no order."""
        squares = []
        for gradient in (p.grad for p in parameters if p.grad is not None):
            rows = torch.zeros(gradient.shape[0], dtype=torch.float64, device=gradient.device)
            if is_sharded(gradient) or self.leads:
                here = sum_of_rows(local_rows(gradient).double().square())
                first = first_row(gradient) if is_sharded(gradient) else 0
                rows[first : first + len(here)] = here
            squares.append(rows)
        squares = torch.cat(squares)
        if self.near is not None:
            dist.all_reduce(squares, group=self.near)
        return sum_of_rows(squares.unsqueeze(0))[0].sqrt().float()


def sum_of_rows(x: Tensor) -> Tensor:
    """(R, ...) -> (R,): each row's sum, by adding its second half to its first until one element is left. No bit of a row's depends on the
    others, or on how many there are, as it may in `torch.sum`."""
    x = x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)
    while (width := x.shape[1]) > 1:
        half = (width + 1) // 2
        x = torch.cat((x[:, : width - half] + x[:, half:], x[:, width - half : half]), dim=1) if width % 2 else x[:, :half] + x[:, half:]
    return x[:, 0]


def add_pairwise(tensors: Iterable[Tensor], group: Any) -> None:
    """Replace each tensor by its sum over the processes of `group`, a power of two: ((0 + 1) + (2 + 3)) + … by rank."""
    size = dist.get_world_size(group)
    for bucket in buckets(tensors):
        flat = _flatten_dense_tensors(bucket)
        part = _scattered_sum(F.pad(flat, (0, -flat.numel() % size)), size, group)
        whole = gathered(part, group).flatten()[: flat.numel()]
        for tensor, total in zip(bucket, _unflatten_dense_tensors(whole, bucket), strict=True):
            tensor.copy_(total)


def _scattered_sum(flat: Tensor, size: int, group: Any) -> Tensor:
    """(size n,) -> (n,): this process's part of the sum over the group."""
    received = torch.empty_like(flat)
    dist.all_to_all_single(received, flat, group=group)
    parts = list(received.chunk(size))
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]


class PairwiseReduceScatter:
    """What FSDP calls to add gradients (`set_custom_reduce_scatter`): pairwise by rank, whatever the operation asked for, which is a sum."""

    def allocate(self, size: Iterable[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:
        assert not async_op
        output_tensor.copy_(_scattered_sum(input_tensor, dist.get_world_size(group), group))


def require_workspace() -> None:
    """Ask cuBLAS, before its first use, for a workspace with which it is deterministic; `BadInput` where the user asks for another."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    given = os.environ.setdefault(name, WORKSPACES[0])
    require(given in WORKSPACES, name, given, f"{' or '.join(WORKSPACES)} with train.deterministic=elastic or train.audit_every; unset it")


@contextmanager
def deterministic_kernels(compiled: bool) -> Iterator[None]:
    """Inside, the same operation on the same tensors gives the same bits, every time; an operation that cannot is a RuntimeError naming it.

    compiled: torch.compile too chooses its kernels without timing them. What was compiled outside is compiled once more.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, benchmark = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    with ExitStack() as stack:
        if compiled:
            from torch._inductor import config

            stack.enter_context(config.patch(deterministic=True))
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = torch.backends.cudnn.benchmark = False
        try:
            yield
        except RuntimeError as error:
            if "does not have a deterministic implementation" not in str(error):
                raise
            what = str(error).split(" does not")[0]
            raise BadInput(f"PyTorch's {what} gives other bits every time; set train.deterministic=none and train.audit_every=null") from error
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark = filled, benchmark


@contextmanager
def exact(device: torch.device, compiled: bool) -> Iterator[None]:
    """`deterministic_kernels` for a whole elastic run; on a CPU a process computes in one thread, for products are cut by threads.

    There it takes as many processes as there are cores.
    """
    threads = torch.get_num_threads()
    with deterministic_kernels(compiled):
        if device.type == "cpu":
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
