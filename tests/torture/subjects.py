"""A pipeline in miniature for campaigns of bad bytes, and what its readers make of each of its files."""

from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # which a model on the meta device imports, for seconds
from tiny import Tiny, prepare
from torture.boxed import command, in_a_child

from vavae_fast.artifacts import read_json
from vavae_fast.commands import export, report, sample, train, watch  # noqa: F401  imported before the fork
from vavae_fast.config import LightningDiTConfig, flatten, load_config, to_mapping
from vavae_fast.data import open_latents
from vavae_fast.data.latents import read_statistics
from vavae_fast.errors import BadInput
from vavae_fast.evaluation import read_samples
from vavae_fast.models.weights import read_state_dict
from vavae_fast.training import dit, loop  # noqa: F401  imported before the fork
from vavae_fast.training.checkpoint import latest_checkpoint, load_checkpoint, step_folder

STEP, BEFORE = 4, 2  # checkpoints of the runs


def pipeline(folder: Path) -> Tiny:
    """Images, a tokenizer's run, latents, a LightningDiT's run, exports of both, samples; and the parts of a draw that was interrupted.

    Made once in a folder; who changes a file changes a copy, or takes the change back.
    """
    torch.set_num_threads(1)
    tiny = Tiny(folder)
    if not folder.is_dir():
        prepare(folder)
        in_a_child(lambda: _make(tiny))
    return tiny


def _make(tiny: Tiny) -> None:
    command(["train-tokenizer", *tiny.tokenizer()])
    command(["extract", "--config", tiny.root / "tokenizer.yaml", "--checkpoint", tiny.tokenizer_run, "--images", tiny.images,
             "--out", tiny.latents, "--shard-size", "6", "--batch", "4"])  # fmt: skip
    command(["train", *tiny.dit()])
    for suffix in (".pt", ".safetensors"):
        command(["export", "--run", tiny.dit_run, "--out", tiny.root / f"dit{suffix}"])
        command(["export", "--run", tiny.tokenizer_run, "--out", tiny.root / f"vae{suffix}"])
    command(drawing(tiny, tiny.root / "samples"))
    assemble, sample._assemble = sample._assemble, lambda plan, world: None
    try:
        command(drawing(tiny, tiny.root / "draw"))
    finally:
        sample._assemble = assemble


def drawing(tiny: Tiny, out: Path) -> list[str]:
    """Words of a draw of ten images, three parts."""
    return ["sample", *tiny.dit(), "--checkpoint", str(tiny.dit_run), "--out", str(out)]


# -- readers: what a file gives, comparable by ==; BadInput when it is refused ------------------------------------------


def same(value) -> object:
    """Tensors and arrays as bytes with their kind, so that results compare by ==."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: same(item) for key, item in value.items()}
    return [same(item) for item in value] if isinstance(value, list | tuple) else value


def newest_checkpoint(run: Path) -> object:
    """The checkpoint of the last step, or BadInput with what was said when the run falls back to the one before, and that one is whole."""
    said: list[str] = []
    found = latest_checkpoint(run / "checkpoints", said.append)
    if found == step_folder(run / "checkpoints", STEP):
        groups, manifest = load_checkpoint(found, verify=False)
        return same({name: dict(tensors) for name, tensors in groups.items()}), manifest
    if found != step_folder(run / "checkpoints", BEFORE):
        raise AssertionError(f"fell back to {found}")
    load_checkpoint(found)
    raise BadInput("; ".join(said))


def whole_latents(folder: Path) -> object:
    """All that training and `extract --stats-only` read of a folder of shards, and what an interrupted extraction would go on with."""
    latents = open_latents(folder)
    rows = np.arange(len(latents))
    shards = [(shard.path.name, shard.ours) for shard in latents._store.shards]
    return same([latents.read(rows), latents.read(rows, True), latents.labels, latents.mean, latents.std]), shards, latents.manifest


def statistics(path: Path) -> object:
    return same(read_statistics(path, 4))


def weights(path: Path) -> object:
    return same(read_state_dict(path))


def samples(path: Path) -> object:
    return same(read_samples(path))


def manifest(path: Path) -> object:
    return read_json(path)


def resolved(path: Path) -> object:
    """A user's config, every key; the hints of the schema make each value what it must be."""
    return flatten(to_mapping(load_config(path, kind=LightningDiTConfig)))
