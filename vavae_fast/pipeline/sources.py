"""Where a pipeline is read from: a path here, or else a repository of the hub."""

import re
from pathlib import Path

from vavae_fast.errors import BadInput, require
from vavae_fast.pipeline import folder, hub, parts
from vavae_fast.pipeline.parts import Parts

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def find(
    path: str | Path,
    fused: bool,
    preset: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    tokenizer: str | Path | None = None,
    statistics: str | Path | None = None,
    weights: str | None = None,
) -> Parts:
    """The parts of what lies at `path`; the arguments are those of `VAVAEPipeline.from_pretrained`."""
    require(weights in (None, "ema", "model"), "weights", weights, "'ema' or 'model'")
    here = path != "" and Path(path).exists()
    require(here is False or revision is None, "revision", revision, "left out for a path")
    local = Path(path) if here else _fetched(path, revision, local_files_only)
    vae = None if tokenizer is None else _tokenizer(tokenizer, local_files_only)
    if statistics is not None and not Path(statistics).is_file():
        raise BadInput(f"latents_stats: {statistics} is no file; give latents_stats.pt of the latents that were trained on")
    stats = None if statistics is None else Path(statistics)
    if folder.is_pipeline(local):
        given = [name for name, value in dict(tokenizer=tokenizer, latents_stats=statistics, weights=weights).items() if value is not None]
        if given:
            raise BadInput(f"{path}: a saved pipeline has its own {', '.join(given)}; leave that out")
        found = folder.read(local, fused)
    elif parts.is_run(local):
        found = parts.from_run(local, vae, stats, weights, fused)
    else:
        released = parts.released_file(local)
        if released is None:
            raise BadInput(f"{path}: no saved pipeline, no run (checkpoints/) and no released lightningdit-*.pt in it; give the folder of one")
        if not here and vae is None and not (released.parent / parts.RELEASED_TOKENIZER).is_file():
            vae = _tokenizer(parts.RELEASED_TOKENIZER_REPOSITORY, local_files_only)
        return parts.from_release(released, vae, stats, weights, preset, fused)
    return parts.with_preset(found, preset)


def _fetched(path: str | Path, revision: str | None, local_files_only: bool) -> Path:
    if not isinstance(path, str) or not _REPOSITORY.fullmatch(path):
        raise BadInput(f"{path}: no such file or folder; check the path, or give owner/name of the Hugging Face hub")
    return hub.fetch(path, revision, local_files_only)


def _tokenizer(path: str | Path, local_files_only: bool) -> Path:
    """A file or run folder of a tokenizer's weights, or the one that a repository holds."""
    if Path(path).exists():
        return Path(path)
    fetched = _fetched(path, None, local_files_only)
    found = sorted(file for pattern in ("vavae*.pt", folder.TOKENIZER) for file in fetched.glob(pattern))
    if len(found) != 1:
        raise BadInput(f"{path}: holds {', '.join(file.name for file in found) or 'no vavae*.pt'}; fetch the tokenizer, and give its path")
    return found[0]
