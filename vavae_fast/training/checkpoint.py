"""Checkpoints: a folder a step, safetensors and JSON only, complete when, and only when, its manifest.json is there.

    checkpoints/step_00012000/{model,ema,optimizer,…}.safetensors, manifest.json

A sharded run's processes write their rows each, `model.rank00of08.safetensors` and so on; `load_checkpoint` puts them together.
Written by `saver.py`. The newest folder that verifies is the one to continue from. There is no random-number state to save: every
draw is a function of (seed, step or sample index).
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vavae_fast import artifacts
from vavae_fast.errors import BadInput
from vavae_fast.training.parallel import copy_whole

Groups = Mapping[str, Mapping[str, Tensor]]  # file name -> named tensors

ROWS = "rows"  # the key of a shard's metadata: JSON, tensor name -> [its first row here, all its rows]
_SHARD = re.compile(r"(\w+)\.rank(\d+)of(\d+)\.safetensors")


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """Every folder with a checkpoint's name, oldest first, whole or not."""
    return sorted(folder.glob("step_????????"))


def sweep(folder: Path) -> None:
    """Remove what killed writers and removers left in a folder of checkpoints. Only the process that holds the run's lock may."""
    for left in (*folder.glob("step_????????.tmp"), *folder.glob("step_????????.del")):
        left.unlink() if left.is_symlink() else shutil.rmtree(left)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that others may read; `BadInput` when the disk is full."""
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata)
    except SafetensorError as error:  # how its writer reports a full disk
        raise BadInput(f"{path}: cannot be written ({error}); make room, or choose another folder") from None
    path.chmod(0o644)


def latest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in `folder` that verifies; `say` is told of each newer one that does not."""
    for path in reversed(checkpoints(folder)):
        fault = checkpoint_fault(path)
        if fault is None:
            return path
        say(f"{path}: {fault}; trying an older checkpoint")
    return None


def checkpoint_fault(path: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint folder: missing manifest, missing file, wrong size, wrong hash; None when nothing is."""
    if not (path / "manifest.json").is_file():
        return "incomplete (no manifest.json)"
    try:
        manifest = artifacts.read_json(path / "manifest.json")
        files = manifest["files"]
        if not isinstance(manifest["step"], int) or any(Path(name).name != name for name in files) or not _shards_complete(files):
            return "manifest.json is damaged"
        return files_fault(path, files, hashes)
    except (BadInput, KeyError, TypeError, AttributeError, ValueError):
        return "manifest.json is damaged"


def files_fault(path: Path, files: Mapping[str, Any], hashes: bool = True) -> str | None:
    """The first of a manifest's files, name -> {"bytes", "sha256"}, that is missing from `path`, of another size or another hash."""
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            return f"lacks {name}"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes, its manifest says {facts['bytes']:,}"
    if hashes:
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            for name, digest in zip(files, pool.map(lambda name: _digest(path / name), files)):
                if digest is None:
                    return f"{name} cannot be read"
                if digest != files[name]["sha256"]:
                    return f"{name} is damaged (its hash is not the manifest's)"
    return None


def _digest(path: Path) -> str | None:
    """None where the disk does not give the file back."""
    try:
        return artifacts.sha256(path)
    except OSError:
        return None


def _shards_complete(files: Mapping[str, Any]) -> bool:
    """Whether each group is one whole file, or shards 0 to n - 1 of n."""
    for names in _by_group(files).values():
        numbers = [(int(m[2]), int(m[3])) for m in map(_SHARD.fullmatch, names) if m]
        if len(names) > 1 and len(numbers) < len(names) or sorted(numbers) != [(i, len(numbers)) for i in range(len(numbers))]:
            return False
    return True


def _by_group(files: Mapping[str, Any]) -> dict[str, list[str]]:
    """Group -> its files; a group's name ends at the first dot."""
    groups: dict[str, list[str]] = {}
    for name in sorted(files):
        groups.setdefault(name.split(".")[0], []).append(name)
    return groups


def holds(path: Path, group: str) -> bool:
    """Whether a checkpoint folder has files of `group`."""
    return any(path.glob(f"{group}.*safetensors"))


def group_digest(manifest: dict[str, Any], group: str) -> str:
    """What identifies the weights of a group: the sha256 of its file; of a sharded one those of all shards, joined."""
    return "+".join(manifest["files"][name]["sha256"] for name in _by_group(manifest["files"])[group])


def load_checkpoint(path: Path, *wanted: str, verify: bool = True) -> tuple[Groups, dict[str, Any]]:
    """The groups named in `wanted` (all when none) and the manifest of a checkpoint folder, verified first if `verify`."""
    fault = checkpoint_fault(path) if verify else None
    if fault is not None:
        raise BadInput(f"{path}: {fault}; choose another checkpoint")
    manifest = artifacts.read_json(path / "manifest.json")
    files = _by_group(manifest["files"])
    groups: dict[str, Mapping[str, Tensor]] = {}
    for name in wanted or files:
        if name not in files:
            raise BadInput(f"{path}: has no {name} weights; it holds {', '.join(files)}")
        try:
            sharded = _SHARD.fullmatch(files[name][0])
            groups[name] = _Merged([path / file for file in files[name]]) if sharded else load_file(path / files[name][0])
        except SafetensorError as error:
            raise BadInput(f"{path}: the {name} weights are not readable safetensors ({error}); choose another checkpoint") from None
    return groups, manifest


class _Merged(Mapping[str, Tensor]):
    """Tensors whose rows lie in several files, read and put together when they are asked for, one at a time."""

    def __init__(self, shards: list[Path]):
        self.folder = shards[0].parent
        self.files = [safe_open(path, "pt") for path in shards]
        self.pieces: dict[str, list[tuple[int, Any]]] = {}  # name -> (first row, file)
        self.rows: dict[str, int] = {}
        for path, file in zip(shards, self.files):
            try:
                rows = json.loads((file.metadata() or {})[ROWS])
                for name in file.keys():
                    first, self.rows[name] = rows.get(name, (0, -1))
                    self.pieces.setdefault(name, []).append((first, file))
            except (AttributeError, KeyError, TypeError, ValueError):
                raise BadInput(f"{path}: does not say which rows of its tensors it holds; choose another checkpoint") from None

    def __getitem__(self, name: str) -> Tensor:
        parts = [(first, file.get_tensor(name)) for first, file in sorted(self.pieces[name], key=lambda piece: piece[0])]
        if self.rows[name] < 0:
            return parts[0][1]
        begins = [first for first, _ in parts] + [self.rows[name]]
        if begins[0] != 0 or any(first + part.shape[0] != after for (first, part), after in zip(parts, begins[1:])):
            raise BadInput(f"{self.folder}: rows of {name} are in none of its shards; choose another checkpoint")
        return torch.cat([part for _, part in parts])

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


def load_tensors(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """targets = tensors, in place, sharded or not; `BadInput` names what is missing, unexpected or of another shape or dtype."""
    missing, unexpected = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
    kept = "the architecture of a run cannot change: take the config back, or choose another train.exp_name"
    for names, what in ((missing, "lacks"), (unexpected, "has, unlike the model,")):
        if names:
            raise BadInput(f"{source}: {what} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}; {kept}")
    for name, target in targets.items():
        value = tensors[name]
        if value.shape != target.shape or value.dtype != target.dtype:
            found, expected = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (value, target))
            raise BadInput(f"{source}: {name} is {found}, the model's is {expected}; {kept}")
        copy_whole(target, value)
