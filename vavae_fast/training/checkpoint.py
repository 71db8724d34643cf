"""Checkpoints: a folder a step, safetensors and JSON only, complete when, and only when, its manifest.json is there.

    checkpoints/step_00012000/{model,ema,optimizer,…}.safetensors, manifest.json

Written under a temporary name, hashed, synced, renamed. The newest folder that verifies is the one to continue from.
There is no random-number state to save: every draw is a function of (seed, step or sample index).
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vavae_fast import artifacts
from vavae_fast.errors import BadInput

Groups = dict[str, dict[str, Tensor]]


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def save_checkpoint(folder: Path, step: int, groups: Groups, facts: dict[str, Any], keep_last: int | None = None) -> Path:
    """Write `groups` (file name -> named tensors) as the checkpoint of `step`; afterwards keep the last `keep_last` whole ones.

    A damaged folder of that step, which the run went back behind, is kept beside it as `*.damaged`; a whole one is `BadInput`.
    """
    size = sum(t.nbytes for tensors in groups.values() for t in tensors.values())
    artifacts.require_space(folder, int(1.05 * size) + (1 << 20))
    final = step_folder(folder, step)
    _make_way(final)
    with artifacts.replacing_folder(final) as temporary:
        files = {}
        for group, tensors in groups.items():
            path = temporary / f"{group}.safetensors"
            write_tensors(path, tensors)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": artifacts.sha256(path)}
        artifacts.write_json(temporary / "manifest.json", artifacts.manifest("checkpoint", step=step, files=files, **facts))
    if keep_last is not None:
        whole = [path for path in checkpoints(folder) if checkpoint_fault(path, hashes=False) is None]
        for old in whole[:-keep_last]:
            shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Every folder with a checkpoint's name, oldest first, whole or not."""
    return sorted(folder.glob("step_????????"))


def _make_way(final: Path) -> None:
    if not final.exists():
        return
    if checkpoint_fault(final) is None:
        raise BadInput(f"{final}: is there already, and whole; a checkpoint is never written over")
    aside = final.with_name(final.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    final.rename(aside)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
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
        if not isinstance(manifest["step"], int) or any(Path(name).name != name for name in manifest["files"]):
            return "manifest.json is damaged"
        for name, facts in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"lacks {name}"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes, its manifest says {facts['bytes']:,}"
            if hashes and artifacts.sha256(file) != facts["sha256"]:
                return f"{name} is damaged (its hash is not the manifest's)"
    except (BadInput, KeyError, TypeError, AttributeError, ValueError):
        return "manifest.json is damaged"
    return None


def load_checkpoint(path: Path, *wanted: str, verify: bool = True) -> tuple[Groups, dict[str, Any]]:
    """The groups named in `wanted` (all when none) and the manifest of a checkpoint folder, verified first if `verify`."""
    fault = checkpoint_fault(path) if verify else None
    if fault is not None:
        raise BadInput(f"{path}: {fault}; choose another checkpoint")
    manifest = artifacts.read_json(path / "manifest.json")
    groups: Groups = {}
    for name in wanted or [Path(file).stem for file in manifest["files"]]:
        file = path / f"{name}.safetensors"
        if file.name not in manifest["files"]:
            raise BadInput(f"{path}: has no {name} weights; it holds {', '.join(Path(f).stem for f in manifest['files'])}")
        try:
            groups[name] = load_file(file)
        except SafetensorError as error:
            raise BadInput(f"{file}: not a readable safetensors file ({error}); choose another checkpoint") from None
    return groups, manifest
