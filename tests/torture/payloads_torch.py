"""PyTorch files and checkpoint folders that would run code, take all memory, or reach outside."""

import argparse
import functools
import io
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tiny import copy
from torture.arena import Arena
from torture.boxed import Wrong

from vavae_fast import artifacts
from vavae_fast.data.latents import read_statistics
from vavae_fast.evaluation import load_inception
from vavae_fast.models.standins import load_standin
from vavae_fast.training.checkpoint import latest_checkpoint, load_checkpoint, step_folder


class Runs:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _touch(arena: Arena) -> str:
    return f"touch '{arena.marker}'"


PICKLES: dict[str, Callable[[Arena], object]] = {
    "os.system": lambda arena: Runs(os.system, _touch(arena)),
    "builtins.eval": lambda arena: Runs(eval, f"open({str(arena.marker)!r}, 'w')"),
    "builtins.exec": lambda arena: Runs(exec, f"open({str(arena.marker)!r}, 'w')"),
    "builtins.open": lambda arena: Runs(open, str(arena.marker), "w"),
    "__import__ and getattr": lambda arena: Runs(getattr, Runs(__import__, "os"), "system"),
    "functools.partial": lambda arena: functools.partial(os.system, _touch(arena)),
    "argparse.Namespace around os.system": lambda arena: argparse.Namespace(lr=Runs(os.system, _touch(arena))),
    "an object array of NumPy": lambda arena: np.array([Runs(os.system, _touch(arena))], dtype=object),
    "torch.load of another file": lambda arena: Runs(torch.load, str(arena.box / "second.pt")),
    "torch.hub.load": lambda arena: Runs(torch.hub.load, str(arena.box), "x"),
    "a state that is set by code": lambda arena: _Stateful(Runs(os.system, _touch(arena))),
}


class _Stateful:
    """Its state is unpickled with it."""

    def __init__(self, state: object):
        self.state = state

    def __reduce__(self):
        return argparse.Namespace, (), {"x": self.state}


def _everywhere(arena: Arena, path: Path) -> None:
    """Given to every reader of such a file."""
    tiny = arena.tiny
    arena.refused("sample", *tiny.dit(), "--checkpoint", path, "--out", "samples")
    arena.refused("sample", *tiny.dit(), "--checkpoint", tiny.dit_run, "--out", "samples", f"vae.ckpt_path={path}")
    arena.refused("train", *tiny.dit(arena.box / "runs"), f"train.weight_init={path}")
    arena.refused("train-tokenizer", *tiny.tokenizer(arena.box / "runs"), f"weight_init={path}")
    arena.refused("analyze", "--latents", path, "--repeats", "0", "--out", "analysis")
    arena.refuses(lambda: load_inception(path))
    arena.refuses(lambda: read_statistics(path, 4))


def pickles() -> dict[str, Callable[[Arena], None]]:
    """Each in the form of torch.save, in its form before 1.6, and bare, of both ends of the protocol."""
    found = {}
    for name, make in PICKLES.items():
        for form, write in _FORMS.items():
            found[f"{name}, as {form}"] = functools.partial(_pickled, make, write)
    return found | {"a TorchScript archive": _torchscript, "a tar of PyTorch 0.1": _ancient}


def _pickled(make: Callable[[Arena], object], write: Callable[[object, Path], None], arena: Arena) -> None:
    _zipped(Runs(os.system, _touch(arena)), arena.box / "second.pt")
    write({"model": make(arena)}, arena.box / "evil.pt")
    _everywhere(arena, arena.box / "evil.pt")


def _zipped(content: object, path: Path) -> None:
    torch.save(content, path)


def _legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _bare(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def _oldest(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=0))


_FORMS = {"torch.save": _zipped, "torch.save before 1.6": _legacy, "a bare pickle": _bare, "a pickle of protocol 0": _oldest}


def _torchscript(arena: Arena) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(arena.box / "evil.pt"))
    _everywhere(arena, arena.box / "evil.pt")


def _ancient(arena: Arena) -> None:
    """The layout that torch.load unpacks into a temporary folder."""
    with tarfile.open(arena.box / "evil.pt", "w") as archive:
        for name in ("storages", "tensors", "pickle", "../it ran"):
            data = pickle.dumps(Runs(os.system, _touch(arena)))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    _everywhere(arena, arena.box / "evil.pt")


# -- claims ---------------------------------------------------------------------------------------------------------------


def _terabytes(arena: Arena) -> None:
    torch.save({"model": {"a": torch.ones(1).expand(1 << 40)}}, arena.box / "evil.pt")
    _everywhere(arena, arena.box / "evil.pt")
    torch.save(torch.ones(1, 1).expand(1 << 36, 16), arena.box / "rows.pt")
    arena.refused("analyze", "--latents", arena.box / "rows.pt", "--repeats", "0", "--out", "analysis")


def _legacy_terabytes(arena: Arena) -> None:
    """The size of a storage before 1.6 is a number in the pickle."""
    _legacy({"model": {"a": torch.ones(1 << 20)}}, arena.box / "evil.pt")
    data = (arena.box / "evil.pt").read_bytes()
    (arena.box / "evil.pt").write_bytes(data.replace(struct.pack("<i", 1 << 20), struct.pack("<i", (1 << 31) - 1)))
    _everywhere(arena, arena.box / "evil.pt")


def _compressed(arena: Arena) -> None:
    """A gigabyte of zeros, compressed to one megabyte, in the layout of torch.save."""
    torch.save({"model": {"a": torch.zeros(1 << 20)}}, arena.box / "plain.pt")
    with zipfile.ZipFile(arena.box / "plain.pt") as plain, zipfile.ZipFile(arena.box / "evil.pt", "w", 8, compresslevel=1) as evil:
        for name in plain.namelist():
            with evil.open(name, "w", force_zip64=True) as member:
                for _ in range(512 if name.endswith("data/0") else 0):
                    member.write(bytes(1 << 21))
                if not name.endswith("data/0"):
                    member.write(plain.read(name))
    _everywhere(arena, arena.box / "evil.pt")


def _laughs(arena: Arena) -> None:
    """Lists of lists of the same lists: ten to the 24th entries in a kilobyte."""
    nested: object = [torch.ones(1)]
    for _ in range(6):
        nested = [nested] * 10_000
    torch.save({"model": nested}, arena.box / "evil.pt")
    _everywhere(arena, arena.box / "evil.pt")


def _sparse(arena: Arena) -> None:
    huge = torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (1 << 30, 1 << 30))
    torch.save({"model": {"a": huge}}, arena.box / "evil.pt")
    _everywhere(arena, arena.box / "evil.pt")


def _meta(arena: Arena) -> None:
    torch.save({"model": {"a": torch.empty(1 << 40, device="meta")}}, arena.box / "evil.pt")
    _everywhere(arena, arena.box / "evil.pt")


def _standin_of_terabytes(arena: Arena) -> None:
    for arguments in ('{"dim": 1000000000000, "heads": 1}', '{"depth": 1000000000}', '{"nothing": 1}', "[1]", "{"):
        save_file({"mean": torch.zeros(1)}, arena.box / "standin.safetensors", {"kind": "StandInEncoder", "arguments": arguments})
        arena.refuses(lambda: load_standin(arena.box / "standin.safetensors"))


CLAIMS = {
    "a stride of 0 that claims terabytes": _terabytes, "a storage before 1.6 that claims gigabytes": _legacy_terabytes,
    "a compressed zip as .pt": _compressed, "a list of lists of the same lists": _laughs, "a sparse tensor of exabytes": _sparse,
    "a tensor without values": _meta, "a stand-in whose metadata claim terabytes": _standin_of_terabytes,
}  # fmt: skip


# -- checkpoint folders ---------------------------------------------------------------------------------------------------


def _checkpoint(arena: Arena) -> tuple[Path, Path]:
    """A run's copy and its newest checkpoint."""
    run = copy(arena.tiny.dit_run, arena.box / "dit")
    return run, step_folder(run / "checkpoints", 4)


def _dcp_metadata(arena: Arena) -> None:
    """A `.metadata` of torch.distributed.checkpoint is a pickle; here it is no part of anything."""
    run, folder = _checkpoint(arena)
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(os.system, _touch(arena))))
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Runs(os.system, _touch(arena))))
    load_checkpoint(folder)
    (folder / "manifest.json").unlink()
    arena.refused("sample", *arena.tiny.dit(), "--checkpoint", folder, "--out", "samples")
    shutil.rmtree(folder.with_name("step_00000002"))
    arena.refused("sample", *arena.tiny.dit(), "--checkpoint", run, "--out", "samples")


def _named(name: str, arena: Arena) -> None:
    """A manifest, with the right seal, that names a file elsewhere, which is there and has the right hash."""
    _, folder = _checkpoint(arena)
    target = arena.box / "dit" / "checkpoints" / "secret.safetensors"
    save_file({"x": torch.ones(1)}, target)
    manifest = artifacts.read_json(folder / "manifest.json")
    manifest["files"][str(target) if name.startswith("/") else name] = {"bytes": target.stat().st_size, "sha256": artifacts.sha256(target)}
    artifacts.write_json(folder / "manifest.json", manifest)
    arena.refused("sample", *arena.tiny.dit(), "--checkpoint", folder, "--out", "samples")


def _linked_shard(arena: Arena) -> None:
    """A shard that is a link to a file elsewhere is that file, and has another hash."""
    _, folder = _checkpoint(arena)
    (folder / "ema.safetensors").unlink()
    (folder / "ema.safetensors").symlink_to(arena.outside / "secret")
    arena.refused("sample", *arena.tiny.dit(), "--checkpoint", folder, "--out", "samples")


def _pipe_and_device(arena: Arena) -> None:
    """Neither is waited for, nor read without end."""
    for place in ("pipe", "device"):
        run = copy(arena.tiny.dit_run, arena.box / place)
        folder = step_folder(run / "checkpoints", 4)
        (folder / "ema.safetensors").unlink()
        os.mkfifo(folder / "ema.safetensors") if place == "pipe" else (folder / "ema.safetensors").symlink_to("/dev/zero")
        arena.refused("sample", *arena.tiny.dit(), "--checkpoint", folder, "--out", "samples")


def _linked_rubbish(arena: Arena) -> None:
    """What a sweep would remove is a link to a folder outside: the link goes, the folder stays."""
    run, _ = _checkpoint(arena)
    for name in ("step_00000009.tmp", "step_00000008.del"):
        (run / "checkpoints" / name).symlink_to(arena.outside / "precious")
    arena.done("train", *arena.tiny.dit(arena.box, "dit", "train.max_steps=5"))
    if not (arena.outside / "precious" / "file").is_file():
        raise Wrong("a sweep removed what a link points to")


def _manifests(arena: Arena) -> None:
    """JSON that is deep, or not what it should be: the checkpoint before it is taken, and named."""
    run, folder = _checkpoint(arena)
    for text in ("[" * 100_000, '{"a":' * 50_000, "[]", "null", "3", '{"files": 3, "step": 4}', '{"files": {"model.safetensors": 5}, "step": 4}',
                 '{"files": {"a": {"bytes": "x", "sha256": 1}}, "step": 4}', '{"files": {"\\u0000": {}}, "step": 1e999}', '"' + "9" * 100_000 + '"',
                 "9" * 100_000):  # fmt: skip
        (folder / "manifest.json").write_text(text)
        said: list[str] = []
        if latest_checkpoint(run / "checkpoints", said.append) != step_folder(run / "checkpoints", 2) or len(said) != 1 or "\n" in said[0]:
            raise Wrong(f"{text[:40]}: {said}")


def _architecture(arena: Arena) -> None:
    """A tokenizer's checkpoint, with the right seal, whose manifest claims an architecture of terabytes."""
    run = copy(arena.tiny.tokenizer_run, arena.box / "tokenizer")
    folder = step_folder(run / "checkpoints", 4)
    manifest = artifacts.read_json(folder / "manifest.json")
    known = manifest["architecture"]
    for changed in ({"ch": 1 << 20}, {"num_res_blocks": 1 << 30}, {"nothing": 1}, {"embed_dim": "x"}, {"resolution": -5}, {"dropout": "x"}, 3):
        claimed = known | changed if isinstance(changed, dict) else changed
        artifacts.write_json(folder / "manifest.json", manifest | {"architecture": claimed})
        arena.refused("sample", *arena.tiny.dit(), "--checkpoint", arena.tiny.dit_run, "--out", "samples", f"vae.ckpt_path={folder}")


CHECKPOINTS: dict[str, Callable[[Arena], None]] = {
    "a .metadata of torch.distributed.checkpoint": _dcp_metadata,
    "a manifest that names ../": functools.partial(_named, "../secret.safetensors"),
    "a manifest that names an absolute path": functools.partial(_named, "/secret.safetensors"),
    "a shard that is a link to a file elsewhere": _linked_shard,
    "a shard that is a pipe, or /dev/zero": _pipe_and_device,
    "rubbish to sweep that links elsewhere": _linked_rubbish,
    "manifests that are deep, or of other kinds": _manifests,
    "a manifest that claims an architecture of terabytes": _architecture,
}
