"""Products of a block's linear layers in fp8, through torchao: weights, gradients and state dict stay what they are.

Each product scales both operands to the range of float8_e4m3fn (gradients too) by their largest magnitude, one scale a tensor
(Micikevicius et al. 2022; torchao's dynamic recipe). Modulation, embeddings and the final layer stay in bf16.
"""

from importlib.util import find_spec

import torch
from torch import nn

from vavae_fast.errors import BadInput
from vavae_fast.models.lightningdit import LightningDiT

CAPABILITY = (8, 9)  # the first GPUs with fp8 products
_MULTIPLE = 16  # of both sides of a weight


def require_fp8(device: torch.device, key: str, off: str) -> None:
    """`BadInput`, naming the config's `key` and how it is turned `off`, unless torchao is installed and `device` multiplies in fp8."""
    if find_spec("torchao") is None:
        raise BadInput(f"{key} needs torchao: pip install torchao, or set {off}")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        found = "a CPU" if device.type != "cuda" else "{}.{}".format(*torch.cuda.get_device_capability(device))
        raise BadInput(f"{key} needs a GPU of compute capability 8.9 or more, this is {found}; set {off}")


def convert_to_fp8(model: LightningDiT, emulate: bool = False) -> int:
    """Make the linear layers of attention and feed-forward multiply in fp8, in place; returns how many did.

    A layer whose sides are no multiples of 16 stays. emulate computes the same roundings without the hardware, slowly.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen = []

    def takes(module: nn.Module, name: str) -> bool:
        fits = isinstance(module, nn.Linear) and module.in_features % _MULTIPLE == module.out_features % _MULTIPLE == 0
        if fits and name.startswith("blocks.") and "adaLN_modulation" not in name:
            chosen.append(name)
            return True
        return False

    convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=takes)
    return len(chosen)
