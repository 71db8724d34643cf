"""timm, past a torchvision whose compiled half does not fit the installed torch.

The ordinary torchvision wheel is built for CUDA; beside a CPU build of torch its library does not load, and its Python
half then fails to import because nobody declared `torchvision::nms` and `torchvision::qnms`. No encoder calls either
(they suppress boxes of detectors), so declaring them, without an implementation, is enough.
"""

import importlib
import sys
from types import ModuleType

import torch

from vavae_fast.errors import BadInput
from vavae_kernels._versions import torchvision_misfit

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # a Library forgets its operators when it is collected


def import_timm() -> ModuleType:
    """The timm package; `BadInput` with the cure when it, or torchvision under it, is not installed."""
    try:
        _import_torchvision()
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise BadInput(f"frozen encoders need timm, and {error.name} is not installed; pip install 'vavae-fast[encoders]'") from None


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            reason = str(error).strip().splitlines()[0][:160]
            cure = torchvision_misfit() or f"install the build that fits torch {torch.__version__}"
            raise BadInput(f"torchvision does not import ({reason}); {cure}") from None
        _declare("nms", "qnms")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")


def _declare(*names: str) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in names:
        library.define(name + _SCHEMA)
    _declared.append(library)
