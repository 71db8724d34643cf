"""A pipeline as a folder: two safetensors files, statistics, a config, a model card, and the manifest with everybody's hash.

    lightningdit.safetensors   tokenizer.safetensors   latents_stats.pt (where latents are normalised)
    config.json     what sampling depends on, the tokenizer's architecture, class names
    README.md       the model card; people edit it, so its hash is not kept
    manifest.json   written last: a folder without it is incomplete
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.commands import build
from vavae_fast.config import to_mapping
from vavae_fast.data.latents import read_statistics, write_statistics
from vavae_fast.data.shards import STATISTICS
from vavae_fast.errors import BadInput, is_number, require
from vavae_fast.models.lightningdit_cost import parameter_count
from vavae_fast.models.weights import autoencoder_architecture, load_autoencoder, read_state_dict
from vavae_fast.pipeline import card
from vavae_fast.pipeline.parts import GROUPS, Parts, sampling_config, unnormalised
from vavae_fast.training.checkpoint import files_fault, write_tensors

KIND = "pipeline"  # in manifest.json
CONFIG, MANIFEST, CARD = "config.json", "manifest.json", "README.md"
LIGHTNINGDIT, TOKENIZER = "lightningdit.safetensors", "tokenizer.safetensors"
_LOADED = (CONFIG, LIGHTNINGDIT, TOKENIZER)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def is_pipeline(path: Path) -> bool:
    """A folder of ours, complete or not."""
    return (path / LIGHTNINGDIT).is_file() and any((path / name).is_file() for name in (TOKENIZER, CONFIG, MANIFEST))


def check_writable(path: Path, license: str | None, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The metrics as they are shared; `BadInput` for them, for a license that the hub cannot take, and unless `path` can become a
    pipeline's folder: absent, empty, or one already. Hidden files may lie there (a clone has some)."""
    artifacts.require_writable(path)
    if path.is_dir() and not is_pipeline(path) and any(not file.name.startswith(".") for file in path.iterdir()):
        raise BadInput(f"{path}: holds other files; choose an empty folder")
    require(license is None or _LICENSE.fullmatch(license), "license", license, "a name of the hub's list, as apache-2.0")
    return [_shared(m) for m in metrics]


def write(parts: Parts, path: Path, name: str, license: str | None, metrics: Sequence[Mapping[str, Any]]) -> None:
    """The whole folder. `name`: by which others load it, in the card. metrics: what `evaluate --json` wrote, read."""
    shared = check_writable(path, license, metrics)
    tokenizer = parts.tokenizer.state_dict()
    networks = {LIGHTNINGDIT: parts.lightningdit.state_dict(), TOKENIZER: tokenizer}
    artifacts.require_space(path, sum(t.nbytes for state in networks.values() for t in state.values()))
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)
    for file, state in networks.items():
        with artifacts.replacing(path / file) as temporary:
            write_tensors(temporary, state, {"format": "pt"})
    kept = [*networks, CONFIG]
    if parts.config.data.latent_norm:
        write_statistics(path, {"mean": parts.mean, "std": parts.std})
        kept.append(STATISTICS)
    config = {group: values for group, values in to_mapping(parts.config).items() if group in GROUPS}
    architecture = autoencoder_architecture(tokenizer)
    artifacts.write_json(path / CONFIG, dict(config, tokenizer=architecture, class_names=list(parts.class_names)))
    files = {file: {"bytes": (path / file).stat().st_size, "sha256": artifacts.sha256(path / file)} for file in kept}
    manifest = artifacts.manifest(
        KIND, files=files, origin=dict(parts.origin), sampler=asdict(parts.config.sample), metrics=shared,
        license=license, parameters=parameter_count(parts.lightningdit),
    )  # fmt: skip
    del manifest["command"]  # it names paths of this machine
    artifacts.write_text(path / CARD, card.render(name, parts.config, manifest, bool(parts.class_names)))
    artifacts.write_json(path / MANIFEST, manifest)


def _shared(metrics: Any) -> dict[str, Any]:
    """A metrics file as others may read it: its scores and their protocol, of paths the last word."""
    content = metrics if isinstance(metrics, Mapping) else {}
    scores = {key: value for key, value in content.items() if is_number(value) and key != "format"}
    protocol = content.get("protocol", {})
    if not scores or not isinstance(protocol, Mapping):
        raise BadInput("metrics: no scores in them; give what vavae-fast evaluate --json wrote")
    last = lambda value: Path(value).name if isinstance(value, str) and "/" in value else value
    return dict(scores, protocol={key: last(value) for key, value in protocol.items()})


def read(path: Path, fused: bool) -> Parts:
    """A folder that `write` wrote; `BadInput` names the file that is missing or is not what was written."""
    if not (path / MANIFEST).is_file():
        raise BadInput(f"{path}: incomplete (no {MANIFEST}); save or fetch it again")
    manifest = artifacts.read_json(path / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) and manifest.get("kind") == KIND else None
    known = isinstance(files, dict) and all(isinstance(entry, dict) and entry.keys() >= {"bytes", "sha256"} for entry in files.values())
    if not known or not files.keys() >= set(_LOADED):
        raise BadInput(f"{path / MANIFEST}: not a pipeline's manifest, or damaged; fetch it again")
    fault = files_fault(path, files)
    if fault is not None:
        raise BadInput(f"{path}: {fault}; fetch it again")
    content = artifacts.read_json(path / CONFIG)
    try:
        config = sampling_config(content, fused)
    except BadInput as error:
        raise BadInput(f"{path / CONFIG}: {error}; it was written by vavae-fast {manifest['versions']['vavae_fast']}") from None
    model = build.lightningdit_of(config, read_state_dict(path / LIGHTNINGDIT), path / LIGHTNINGDIT)
    tokenizer = load_autoencoder(path / TOKENIZER, content["tokenizer"], fused)
    mean_std = read_statistics(path / STATISTICS, config.model.in_chans) if config.data.latent_norm else unnormalised(config)
    return Parts(config, model, tokenizer.requires_grad_(False), *mean_std, tuple(content["class_names"]), manifest["origin"])
