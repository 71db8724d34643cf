"""What a pipeline is made of, and how it is put together from a run of ours or from the reference's released files."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vavae_fast.commands import build
from vavae_fast.config import SAMPLE_PRESETS, LightningDiTConfig, to_mapping
from vavae_fast.data.latents import extraction_facts, read_statistics
from vavae_fast.data.shards import STATISTICS
from vavae_fast.errors import BadInput, require
from vavae_fast.models.autoencoder import AutoencoderKL
from vavae_fast.models.lightningdit import LightningDiT
from vavae_fast.models.lightningdit_weights import lightningdit_architecture
from vavae_fast.models.weights import read_state_dict
from vavae_fast.parsing import to_dataclass
from vavae_fast.schema import DataConfig, ModelConfig, SampleConfig, VAEConfig
from vavae_fast.training.checkpoint import holds, load_checkpoint

# The files that hustvl/LightningDiT links to, and the settings their FID was published with.
RELEASED = {"lightningdit-xl-imagenet256-64ep.pt": "paper-64ep", "lightningdit-xl-imagenet256-800ep.pt": "paper-800ep"}
RELEASED_TOKENIZER = "vavae-imagenet256-f16d32-dinov2.pt"
RELEASED_TOKENIZER_REPOSITORY = "hustvl/vavae-imagenet256-f16d32-dinov2"  # holds the statistics of its latents too

GROUPS = ("data", "vae", "model", "transport", "sample")  # of a config: what sampling depends on
_BATCH = 64  # images at once, where no config says


@dataclass(frozen=True)
class Parts:
    """Networks in eval mode on the CPU, float32; mean and std (1, C, 1, 1) of the latents that were trained on, 0 and 1 where they were
    not normalised; names of the classes in order where they are known; what the manifest tells of the weights' origin."""

    config: LightningDiTConfig
    lightningdit: LightningDiT
    tokenizer: AutoencoderKL
    mean: Tensor
    std: Tensor
    class_names: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)


def sampling_config(mapping: Mapping[str, Any], fused: bool) -> LightningDiTConfig:
    """The part of a config's mapping that sampling depends on, without paths of the machine that trained; the rest is default."""
    config = to_dataclass(LightningDiTConfig, {group: mapping.get(group) or {} for group in GROUPS})
    data = replace(config.data, data_path=None, valid_path=None, fid_reference_file=None, path=None)
    model, sample = replace(config.model, use_checkpoint=False), replace(config.sample, guide=None)
    train = replace(config.train, fused=fused)
    return replace(config, data=data, model=model, vae=replace(config.vae, ckpt_path=None), train=train, sample=sample)


def with_preset(parts: Parts, preset: str | None) -> Parts:
    """`parts` with published sampler settings in place of their own."""
    if preset is None:
        return parts
    require(preset in SAMPLE_PRESETS, "preset", preset, f"one of {', '.join(SAMPLE_PRESETS)}")
    return replace(parts, config=replace(parts.config, sample=replace(parts.config.sample, **SAMPLE_PRESETS[preset])))


def is_run(path: Path) -> bool:
    """A run folder, or a checkpoint folder of one."""
    return (path / "checkpoints").is_dir() or path.is_dir() and path.name.startswith("step_")


def from_run(path: Path, tokenizer: Path | None, statistics: Path | None, weights: str | None, fused: bool) -> Parts:
    """The newest complete checkpoint of a LightningDiT run, or a given one, with the tokenizer and statistics its config names.

    `tokenizer` and `statistics` stand in for those that lie elsewhere now. weights: "ema" (the default where there is one) or "model".
    """
    folder = build.checkpoint_folder(path)
    weights = weights or ("ema" if holds(folder, "ema") else "model")
    _, manifest = load_checkpoint(folder, weights, verify=False)  # verified below, when they are read
    trained = manifest.get("config")
    if manifest.get("stage") != "LightningDiT" or not isinstance(trained, dict):
        raise BadInput(f"{folder}: a checkpoint of {manifest.get('stage', 'another stage')}; give a LightningDiT's run, its tokenizer by tokenizer=")
    config = sampling_config(trained, fused)
    if trained["sample"].get("guide"):
        print(f"{path}: sample.guide is left out, a pipeline holds one model", file=sys.stderr)
    model, identity = build.trained_lightningdit(config, str(folder), weights)
    latents = Path(trained["data"]["data_path"])
    vae = tokenizer or _still_there(trained["vae"].get("ckpt_path"), path, "tokenizer", "the tokenizer that made its latents")
    autoencoder = build.tokenizer(config, str(vae))
    build.tokenizer_digest(autoencoder, vae, {"this run": identity["tokenizer"]})
    mean_std = unnormalised(config)
    if config.data.latent_norm:
        stats = statistics or _still_there(str(latents / STATISTICS), path, "latents_stats", f"{STATISTICS} of its latents")
        mean_std = read_statistics(stats, config.model.in_chans)
    run = folder.resolve().parents[1].name
    origin = dict(weights=weights, step=manifest["step"], sha256=identity["sha256"], run=run, training=_training(manifest))
    return Parts(config, model, autoencoder, *mean_std, _class_names(latents, config.data.num_classes), origin)


def _still_there(value: str | None, run: Path, argument: str, what: str) -> Path:
    if not value or not Path(value).exists():
        fault = f"its config names {value}, which is not here" if value else "its config does not name one"
        raise BadInput(f"{argument}: missing for {run} ({fault}); give {argument}=PATH, {what}")
    return Path(value)


def unnormalised(config: LightningDiTConfig) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, config.model.in_chans, 1, 1), torch.ones(1, config.model.in_chans, 1, 1)


def _training(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the model card wants to know, without paths."""
    train, optimizer = manifest["config"]["train"], manifest["config"]["optimizer"]
    data = manifest.get("data", {})
    facts = dict(
        steps=manifest["step"], batch=train["global_batch_size"], seed=train["global_seed"], lr=optimizer["lr"], beta2=optimizer["beta2"],
        max_grad_norm=optimizer["max_grad_norm"], ema_decay=train["ema_decay"], latents=data.get("count"),
        tokenizer_sha256=data.get("tokenizer"), versions=manifest.get("versions"),
    )  # fmt: skip
    if data.get("count"):
        facts["epochs"] = round(facts["steps"] * facts["batch"] / data["count"], 2)
    return facts


def _class_names(latents: Path, num_classes: int) -> tuple[str, ...]:
    """Those of the images that the latents were made of, where the latents lie here and are ours."""
    names = extraction_facts(latents).get("classes")
    known = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) <= num_classes
    return tuple(names) if known else ()


# -- the reference's released files -----------------------------------------------------------------------------------


def released_file(path: Path) -> Path | None:
    """The LightningDiT that a folder of downloaded files holds; None where it holds none, `BadInput` where several."""
    if path.is_file():
        return path
    found = sorted(file for file in path.glob("lightningdit*") if file.suffix in (".pt", ".safetensors"))
    if len(found) > 1:
        raise BadInput(f"{path}: holds {', '.join(file.name for file in found)}; give the path of one of them")
    return found[0] if found else None


def from_release(
    path: Path, tokenizer: Path | None, statistics: Path | None, weights: str | None, preset: str | None, fused: bool
) -> Parts:
    """A LightningDiT in the reference's layout; its architecture is read off the weights, its sampler's settings go by its name.

    weights: which to take of a checkpoint that has both, "ema" by default. Tokenizer and `latents_stats.pt` lie beside it, or are
    given; the statistics may lie beside the tokenizer too.
    """
    preset = preset or RELEASED.get(path.name)
    if preset is None:
        known = ", ".join(SAMPLE_PRESETS)
        raise BadInput(f"{path}: not a released file's name, which would tell the sampler's settings; give preset=, one of {known}")
    tokenizer = tokenizer or path.parent / RELEASED_TOKENIZER
    if not tokenizer.exists():
        raise BadInput(f"{tokenizer}: missing; give the tokenizer by tokenizer=, or fetch it from {RELEASED_TOKENIZER_REPOSITORY} of the hub")
    places = [statistics] if statistics else [path.parent / STATISTICS, tokenizer.parent / STATISTICS]
    statistics = next((place for place in places if place.is_file()), None)
    if statistics is None:
        raise BadInput(f"{places[0]}: missing; give it by latents_stats=, or fetch it from {RELEASED_TOKENIZER_REPOSITORY} of the hub")
    config = _released_config(path, fused)
    autoencoder = build.tokenizer(config, str(tokenizer))
    model, identity = build.trained_lightningdit(config, str(path), weights or "ema")
    origin = dict(sha256=identity["sha256"], file=path.name)
    parts = Parts(config, model, autoencoder, *read_statistics(statistics, config.model.in_chans), origin=origin)
    return with_preset(parts, preset)


def _released_config(path: Path, fused: bool) -> LightningDiTConfig:
    """Of a model trained as the reference's YAMLs train: normalised latents of a 16-fold tokenizer, velocity on the linear path."""
    found = lightningdit_architecture(read_state_dict(path, prefer="ema"), path)
    ours = dict(model_type=found["name"], in_chans=found["in_channels"])
    model = ModelConfig(**ours, **{f.name: found[f.name] for f in fields(ModelConfig) if f.name in found})
    vae = VAEConfig()
    size = found["input_size"] * vae.downsample_ratio
    data = DataConfig(image_size=size, num_classes=found["num_classes"], latent_norm=True, latent_multiplier=1.0)
    config = LightningDiTConfig(data=data, vae=vae, model=model, sample=SampleConfig(per_proc_batch_size=_BATCH))
    return sampling_config(to_mapping(config), fused)
