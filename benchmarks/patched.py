"""Other code bases before and after `patch()`: forward and backward of DiT, SiT, REPA and diffusers' transformers by examples/.

Four ways on the same weights: eager and with compiled blocks, each as it was and fused. VAVAE_DIT, VAVAE_SIT and VAVAE_REPA name
checkouts of the public repositories. On a CPU the operators are plain PyTorch: a rehearsal says that all of it runs, and nothing of speed.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.records import ROOT
from benchmarks.steps import Settings, Step
from vavae_kernels import patch


def example(name: str) -> ModuleType:
    """A file of examples/, which finds what it shares with the others beside it."""
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


@dataclass(frozen=True)
class Patched(Step):
    """A model of another code base: by a script of examples/, and a checkout that `variable` names where no package has it."""

    script: str = ""
    variable: str | None = None
    tiny: str = "tiny"  # the size of a rehearsal

    @property
    def needs(self) -> float:
        return 120

    def fitting(self, device: torch.device) -> int:
        return self.batch

    def lacking(self, device: torch.device, settings: Settings) -> str | None:
        packages = ("timm",) if self.variable else ("timm", "diffusers")
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        return f"{self.variable} names no checkout of its public repository" if self.variable and not os.environ.get(self.variable) else None

    def model(self, device: torch.device) -> nn.Module:
        """With random weights, none of them zero."""
        script = example(self.script)
        with torch.device(device):
            model = script.build(Path(os.environ[self.variable]), self.size) if self.variable else script.build(self.size)
            return example("before_after").with_weights(model, None)

    def makers(self, device: torch.device, settings: Settings) -> dict[str, Callable[[], Callable[[], Any]]]:
        script, shared = example(self.script), example("before_after")
        before = self.model(device)
        after = shared.twin(before)
        patch(after)
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in script.inputs(before, self.batch).items()}
        found = shared.ways(before, after, script.BLOCKS, inputs, torch.bfloat16, settings.backend)
        return {arm: found[arm] for arm in self.arms}

    def facts(self, seconds: dict[str, float]) -> dict[str, Any]:
        """`faster`: how many times, patched against the same way as it was."""
        pairs = {name: name.removeprefix("fused, ") if ", " in name else "eager" for name in seconds if name.startswith("fused")}
        return dict(
            images_per_second={name: round(self.batch / median, 2) for name, median in seconds.items()},
            faster={name: round(seconds[before] / seconds[name], 4) for name, before in pairs.items() if before in seconds},
        )


ARMS = ("eager", "fused", "compiled blocks", "fused, compiled blocks")
STEPS = (  # most valuable first
    Patched("patch facebookresearch/DiT", "DiT-XL/2", 64, ARMS, script="patch_dit", variable="VAVAE_DIT"),
    Patched("patch diffusers", "DiT-XL/2", 64, ARMS, script="patch_diffusers", tiny="DiT-tiny"),
    Patched("patch sihyun-yu/REPA", "SiT-XL/2", 64, ARMS, script="patch_repa", variable="VAVAE_REPA"),
    Patched("patch willisma/SiT", "SiT-XL/2", 64, ARMS, script="patch_sit", variable="VAVAE_SIT"),
    Patched("patch diffusers", "SD3-medium", 16, ARMS, script="patch_diffusers", tiny="SD3-tiny"),
    Patched("patch diffusers", "PixArt-XL/2", 64, ARMS, script="patch_diffusers", tiny="PixArt-tiny"),
)
REHEARSED = tuple(replace(step, size=step.tiny, batch=2) for step in STEPS[:3])  # one of each kind
