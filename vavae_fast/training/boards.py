"""Where a run's values and pictures go beside its own folder: TensorBoard, Weights & Biases. Imported only when asked for."""

import importlib
import os
from pathlib import Path
from typing import Any, Protocol

from vavae_fast.errors import BadInput

_INSTALL = {"tensorboard": "pip install 'vavae-fast[log]'", "wandb": "pip install wandb, then wandb login"}
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class Board(Protocol):
    """What RunLog writes to."""

    def forget_after(self, step: int) -> None:
        """Values of steps beyond `step` will come again."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def image(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


def require_boards(names: tuple[str, ...]) -> None:
    """`BadInput` unless the package of every board in `names` can be imported."""
    for name in names:
        _module(name)


def open_boards(names: tuple[str, ...], folder: Path, title: str, config: dict[str, Any]) -> list[Board]:
    """The boards in `names` for the run in `folder`; a continued run continues its own."""
    kinds = {"tensorboard": lambda: TensorBoard(folder / "tensorboard"), "wandb": lambda: WandB(folder, title, config)}
    return [kinds[name]() for name in names]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError:
        raise BadInput(f"log.to=[{name}]: {name} is not installed; {_INSTALL[name]}, or remove it from log.to") from None


class TensorBoard:
    """Event files in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.open = folder, _module("tensorboard").SummaryWriter
        self.writer = self.open(str(folder))

    def forget_after(self, step: int) -> None:
        self.writer.close()
        self.writer = self.open(str(self.folder), purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def image(self, step: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(path.parent.name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of the project that `WANDB_PROJECT` names, or vavae-fast; its id lies in the run folder, so that a continued run is one.

    Values are drawn over `step`, which may go back: W&B's own counter may not.
    """

    def __init__(self, folder: Path, title: str, config: dict[str, Any]):
        self.wandb = _module("wandb")
        held = folder / "wandb_id.txt"
        known = held.read_text(encoding="utf-8").strip() if held.is_file() else None
        project = os.environ.get("WANDB_PROJECT", "vavae-fast")
        try:
            self.run = self.wandb.init(project=project, name=title, dir=str(folder), config=config, id=known, resume="allow")
        except self.wandb.Error as error:  # no account, no network
            raise BadInput(f"log.to=[wandb]: {str(error).rstrip('.')}; run wandb login, set WANDB_MODE=offline, or remove it from log.to") from None
        held.write_text(self.run.id, encoding="utf-8")
        self.run.define_metric("*", step_metric="step")

    def forget_after(self, step: int) -> None:
        pass  # a point logged again is drawn over the old one

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({**values, "step": step})

    def image(self, step: int, path: Path) -> None:
        self.run.log({path.parent.name: self.wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        self.run.finish()
