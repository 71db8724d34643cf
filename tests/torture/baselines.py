"""What one would use instead of our checkpoints, under the same kills, power cuts and flipped bits: what the protocol is worth."""

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torture.saves import Scheme, equal, in_memory
from torture.tally import Effort, Tally

State = dict[str, torch.Tensor]


def state(value: int) -> State:
    """A megabyte, in as many tensors as a small model and its optimizer have."""
    generator = torch.Generator().manual_seed(value)
    return {f"block.{i}.weight": torch.randn(64, 64, generator=generator) for i in range(64)}


@dataclass(frozen=True)
class Baseline:
    """A way to save in which a reader looks for one thing: the newest."""

    name: str
    write: Callable[[Path, State, int], None]  # folder, what, which step
    read: Callable[[Path], State]


def _dcp_write(folder: Path, tensors: State, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, checkpoint_id=folder / name, no_dist=True)


def _dcp_read(folder: Path) -> State:
    target = {name: torch.zeros_like(tensor) for name, tensor in state(1).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(target, checkpoint_id=folder, no_dist=True)
    return target


def _newest(folder: Path) -> Path:
    """The newest that says it is complete."""
    return max(path.parent for path in folder.glob("step_*/.metadata"))


BASELINES = (
    Baseline(
        "torch.distributed.checkpoint over the same folder",
        lambda folder, tensors, step: _dcp_write(folder, tensors, "step"),
        lambda folder: _dcp_read(folder / "step"),
    ),
    Baseline(
        "torch.distributed.checkpoint into a new folder",
        lambda folder, tensors, step: _dcp_write(folder, tensors, f"step_{step}"),
        lambda folder: _dcp_read(_newest(folder)),
    ),
    Baseline(
        "torch.save over the same name",
        lambda folder, tensors, step: torch.save(tensors, folder / "state.pt"),
        lambda folder: torch.load(folder / "state.pt", weights_only=True),
    ),
    Baseline(
        "safetensors save_file over the same name",
        lambda folder, tensors, step: save_file(tensors, folder / "state.safetensors"),
        lambda folder: load_file(folder / "state.safetensors"),
    ),
)


def scheme(baseline: Baseline) -> Scheme:
    """The first save is there, the second is killed; either is what may be found."""
    return Scheme(
        baseline.name,
        lambda folder: baseline.write(folder, state(1), 1),
        lambda folder: baseline.write(folder, state(2), 2),
        lambda folder, ended: _verdict(baseline, folder),
    )


def _verdict(baseline: Baseline, folder: Path) -> tuple[str, str] | None:
    found = _read(baseline, folder)
    if isinstance(found, str):
        return "lost", found
    known = any(equal(found, state(value)) for value in (1, 2))
    return None if known else ("wrong", "loads, and is neither what was saved before nor now")


def _read(baseline: Baseline, folder: Path) -> State | str:
    """What it reads, or what it says."""
    try:
        return baseline.read(folder)
    except (Exception, CheckpointException) as error:  # noqa: B902  whatever it raises is its answer; the last is no Exception
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]


def flipped_bits(baseline: Baseline, effort: Effort, tally: Tally) -> None:
    """One bit at a time in what holds the state, wherever it lies in the files."""
    draw, expected, counts = effort.draw(tally.fault), state(1), dict(silent=0, caught=0, harmless=0)
    with in_memory(effort.folder) as folder:
        (folder / "whole").mkdir()
        baseline.write(folder / "whole", expected, 1)
        files = {path.relative_to(folder / "whole"): path.read_bytes() for path in sorted((folder / "whole").rglob("*")) if path.is_file()}
        for _ in range(effort.count(300)):
            spoilt = folder / "spoilt"
            shutil.copytree(folder / "whole", spoilt)
            name = draw.choices(list(files), [len(data) for data in files.values()])[0]
            data, bit = bytearray(files[name]), draw.randrange(8 * len(files[name]))
            data[bit // 8] ^= 1 << bit % 8
            (spoilt / name).write_bytes(data)
            found = _read(baseline, spoilt)
            tally.tried += 1
            outcome = "caught" if isinstance(found, str) else "harmless" if equal(found, expected) else "silent"
            counts[outcome] += 1
            if outcome == "silent":
                tally.fail("wrong", f"bit {bit} of {name}: other numbers are loaded, and nothing is said")
            shutil.rmtree(spoilt)
    tally.remark = f"wrong: loads other numbers in silence; {counts['caught']} are caught, {counts['harmless']} change nothing"
