"""Recompute activations in the backward pass instead of keeping them.  Chen et al. 2016.

    True          a block keeps its inputs, and runs again as a whole: a third more arithmetic
    "selective"   it also keeps what matrix products and attention gave; norms, gates and rotations run again
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = bool | Literal["selective"]

_PRODUCTS = {"mm", "addmm", "bmm", "convolution"}
_ATTENTION_PACKAGES = {"flash_attn", "flash_attn_3", "xformers", "xformers_flash", "xformers_flash3"}  # namespaces of their operators


def checkpointed(function: Callable[..., Any], mode: Checkpointing, *inputs: Any) -> Any:
    """function(*inputs), keeping for backward what `mode` says; False keeps everything."""
    if not mode or not torch.is_grad_enabled():
        return function(*inputs)
    if mode == "selective":
        return checkpoint(function, *inputs, use_reentrant=False, context_fn=_contexts, preserve_rng_state=False)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def is_kept(operator: torch._ops.OpOverload) -> bool:
    """Whether selective checkpointing keeps the outputs of an operator."""
    name = operator._schema.name.split("::")[1]
    return name in _PRODUCTS or name.startswith("_scaled_dot_product") or operator.namespace in _ATTENTION_PACKAGES


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: torch._ops.OpOverload, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(operator) else CheckpointPolicy.PREFER_RECOMPUTE
