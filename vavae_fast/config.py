"""Configs: a YAML file and `key.path=value` overrides in, a checked, frozen dataclass out. Imports no torch."""

import os
from pathlib import Path
from typing import Any

from vavae_fast.errors import BadInput
from vavae_fast.launched import world_size
from vavae_fast.parsing import apply_overrides, flatten, read_yaml, to_dataclass, to_mapping, to_yaml
from vavae_fast.schema import SAMPLE_PRESETS, LightningDiTConfig, SampleConfig
from vavae_fast.tokenizer_schema import TokenizerConfig

__all__ = [
    "SAMPLE_PRESETS", "Config", "LightningDiTConfig", "SampleConfig", "TokenizerConfig", "accumulation", "flatten",
    "given_images", "given_path", "load_config", "run_folder", "to_mapping", "to_yaml", "world_size",
]  # fmt: skip

Config = LightningDiTConfig | TokenizerConfig


def load_config(path: Path | str, overrides: tuple[str, ...] = (), kind: type | None = None) -> Config:
    """The config in a YAML file with `key.path=value` overrides, of the kind its keys show; `kind`: which one is needed."""
    mapping = apply_overrides(read_yaml(path), overrides)
    schema = TokenizerConfig if is_tokenizer(mapping) else LightningDiTConfig
    if kind is not None and schema is not kind:
        wanted = "tokenizer" if kind is TokenizerConfig else "LightningDiT"
        raise BadInput(f"{path}: this command needs a {wanted} config; see configs/")
    return to_dataclass(schema, mapping)


def is_tokenizer(mapping: dict[str, Any]) -> bool:
    model = mapping.get("model")
    return "lightning" in mapping or (isinstance(model, dict) and bool({"params", "target", "base_learning_rate"} & model.keys()))


def run_folder(config: Config, config_path: Path | str | None) -> Path:
    """<output_dir>/<exp_name>; without exp_name the config file's stem."""
    name = config.train.exp_name or (Path(config_path).stem if config_path else "run")
    if os.sep in name or name in ("", ".", ".."):
        raise BadInput(f"train.exp_name: must be one folder name, got {name!r}")
    return Path(config.train.output_dir) / name


def given_path(value: str | None, key: str, what: str) -> Path:
    """The path a config key holds; `BadInput` when it is unset, the template's placeholder, or absent."""
    if not value:
        raise BadInput(f"{key}: not set; give {what}: {key}=PATH")
    if "path/to/" in value:
        raise BadInput(f'{key} is still "{value}"; give {what}: {key}=PATH')
    if not Path(value).exists():
        raise BadInput(f"{key}: {value} does not exist; give {what}: {key}=PATH")
    return Path(value)


def given_images(value: str | None, key: str, what: str) -> str:
    """The images a config key holds. As `given_path`, but builtin ones and patterns of shards are for `open_images` to check."""
    if value and (value.startswith("builtin:") or "*" in Path(value).name or "{" in Path(value).name):
        return value
    return str(given_path(value, key, what))


def accumulation(global_batch: int, micro_batch: int | None, processes: int) -> tuple[int, int]:
    """(micro batch, micro batches a step) of each process, so that their product over all processes is `global_batch`.

    A share smaller than `micro_batch` is one micro-batch.
    """
    whole = micro_batch is None or global_batch <= processes * micro_batch  # one micro-batch a step
    unit = processes if whole else processes * micro_batch
    if global_batch % unit:
        near = ", ".join(str(b) for b in (global_batch // unit * unit, (global_batch // unit + 1) * unit) if b > 0)
        over = f"{processes} processes" + ("" if whole else f" x train.micro_batch_size {micro_batch}")
        cure = "" if whole else _nearest_micro_batches(global_batch, micro_batch, processes)
        raise BadInput(f"train.global_batch_size {global_batch} does not divide over {over}; nearest: {near}{cure}")
    share = global_batch // processes
    micro = share if whole else micro_batch
    return micro, share // micro


def slots_of_process(global_batch: int, slots: int, processes: int) -> tuple[int, int]:
    """`accumulation` with `train.deterministic: elastic`: (samples of a slot, slots of each process)."""
    if global_batch % slots:
        near = ", ".join(str(b) for b in (global_batch // slots * slots, (global_batch // slots + 1) * slots) if b > 0)
        raise BadInput(f"train.global_batch_size {global_batch} does not divide into train.slots {slots}; nearest: {near}")
    if slots % processes:
        fitting = ", ".join(str(1 << n) for n in range(slots.bit_length()))
        raise BadInput(f"train.slots {slots} does not divide over {processes} processes; start {fitting} of them, or set train.deterministic=none")
    return global_batch // slots, slots // processes


def _nearest_micro_batches(global_batch: int, micro_batch: int, processes: int) -> str:
    """The sizes around `micro_batch` by which the processes' shares divide, as a further cure; "" when there is no whole share."""
    if global_batch % processes:
        return ""
    share = global_batch // processes
    fitting = [size for size in range(1, share + 1) if share % size == 0]
    near = [max(size for size in fitting if size < micro_batch), min(size for size in fitting if size > micro_batch)]
    return f"; or train.micro_batch_size {near[0]} or {near[1]}"
