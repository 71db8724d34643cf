"""Data parallelism: whole weights on every process (`none`), or FSDP2: each weight's rows spread over processes (`full`, `hybrid`).

Zhao et al. 2023 (FSDP). Spread are the weights and biases of linear layers and convolutions, nearly all that LightningDiT has. Autocast
rounds exactly these to bf16 where they are used, so they travel in bf16 and the result is the same bits; master weights, the sums of
gradients over micro-batches and processes, moments and EMA are fp32. Norm weights, embeddings and positions enter in fp32: they stay
whole on every process, and their gradients are averaged as without FSDP.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from vavae_fast.distributed import World
from vavae_fast.errors import require

BUCKET_BYTES = 256 << 20


def process_mesh(world: World, mode: str) -> Any:
    """The DeviceMesh over whose dimension "shard" weights are spread: all processes (`full`), or those of a node, nodes along the dimension
    "replicate" (`hybrid`). None where nothing is to be spread: mode `none`, or one process."""
    if mode == "none" or world.size == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    if mode == "full":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    require(world.size % world.local_size == 0, "train.shard", mode, f"full: {world.size} processes are not nodes of {world.local_size} each")
    shape = (world.size // world.local_size, world.local_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: Any, bf16: bool) -> nn.Module:
    """Spread the weights of `model` (its `blocks` one by one, then the rest), already on the mesh's device, in place; mesh None: leave them.

    bf16: linear layers compute in bf16 under autocast, so their weights are gathered in bf16.
    """
    if mesh is None:
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtypes = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else {}
    spread = {p for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) for p in m.parameters(recurse=False)}
    settings = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False), ignored_params=set(model.parameters()) - spread)
    # The model's output may be a view, of which FSDP warns on every process: nothing here writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for block in model.blocks:
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace each gradient by its mean over all processes; FSDP has averaged those of sharded parameters."""
    if world.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
    for bucket in buckets(gradients):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat)
        flat /= world.size
        for gradient, mean in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            gradient.copy_(mean)


def gathered(part: Tensor, group: Any = None) -> Tensor:
    """(n,) of each process of `group` -> (size, n), by rank, on all."""
    whole = part.new_empty(dist.get_world_size(group) * len(part))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before PyTorch 2.13
    gather(whole, part, group=group)
    return whole.view(-1, len(part))


def buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """`tensors` in runs of one dtype and of about BUCKET_BYTES."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and bucket[0].dtype != tensor.dtype:
            yield bucket
            bucket = []
        bucket.append(tensor)
        if sum(t.nbytes for t in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


# -- the rows of a sharded tensor that lie here -----------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor; told without importing that module, which takes seconds."""
    return type(tensor).__name__ == "DTensor"


def local_rows(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this process holds, sharing their memory; a whole tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shard_place(tensor: Tensor) -> tuple[int, int, int]:
    """(shard, shards, replica) of this process: which rows of the sharded `tensor` it holds, and which copy of them."""
    mesh = tensor.device_mesh
    shards = mesh.size(mesh.mesh_dim_names.index("shard"))
    return mesh.get_local_rank("shard"), shards, dist.get_rank() // shards


def first_row(tensor: Tensor) -> int:
    """Where the local rows of a sharded tensor begin in the whole one. FSDP cuts as torch.chunk does: equal parts, the last ones shorter."""
    index, count, _ = shard_place(tensor)
    rows = -(-tensor.shape[0] // count)
    return min(index * rows, tensor.shape[0])


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """target = value, of which a sharded target takes its own rows."""
    if is_sharded(target):
        here, start = local_rows(target), first_row(target)
        here.copy_(value[start : start + here.shape[0]])
    else:
        target.copy_(value)
