"""Run folders: made, compared with the config that made them, continued."""

import hashlib
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.config import Config, LightningDiTConfig, flatten, to_mapping, to_yaml
from vavae_fast.errors import BadInput, Interrupted
from vavae_fast.parsing import read_yaml

# Keys that may change between two starts of one run: they say how it is run and watched, not what it computes.
_FREE = ("ckpt_path", "sample.", "log.", "vae.", "data.fid_reference_file", "data.valid_path", "data.num_workers", "data.latents_in",
         "data.params.num_workers", "data.max_corrupt", "train.ckpt", "train.log_every", "train.ckpt_every", "train.keep_", "train.micro_batch_size",
         "train.fused", "train.attention", "train.compile", "train.resume", "train.output_dir", "train.max_skipped", "train.max_rollbacks",
         "train.max_faint", "train.hang_seconds", "train.audit_every", "train.use_checkpoint", "model.use_checkpoint", "train.max_steps",
         "lightning.trainer.max_epochs", "lightning.trainer.strategy", "lightning.trainer.accelerator", "lightning.trainer.gpus",
         "lightning.trainer.benchmark", "lightning.callbacks", "lightning.modelcheckpoint", "train.shard")  # fmt: skip

_NOT_FREE_OF_A_TOKENIZER = ("train.micro_batch_size",)  # BatchNorm and the adaptive weights look at one micro-batch


def resume_arguments(parser: ArgumentParser) -> None:
    """The flags of a stage that trains."""
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="auto: continue this run from its newest complete checkpoint")
    parser.add_argument("--override", action="append", default=[], metavar="KEY", help="continue although this config key has changed (repeatable)")
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: plan for N processes")


def check_run_folder(folder: Path, config: Config, resume: str, allowed: Iterable[str]) -> bool:
    """Whether `folder` holds a run to continue. `BadInput` when its config differs in a key that is not `allowed` to."""
    artifacts.require_writable(folder)
    held = any((path / "manifest.json").is_file() for path in (folder / "checkpoints").glob("step_????????"))
    if held and (resume == "never" or config.train.resume is False):
        raise BadInput(f"{folder}: holds checkpoints of an earlier run; continue it with --resume auto, or choose another train.exp_name")
    if (folder / "config.yaml").is_file() and held:
        defaults, now = flatten(to_mapping(type(config)())), flatten(to_mapping(config))
        known = {key: value for key, value in defaults.items() if key in now}  # a key that came later meant its default
        before = known | flatten(run_config(folder))
        free = _FREE if isinstance(config, LightningDiTConfig) else tuple(key for key in _FREE if key not in _NOT_FREE_OF_A_TOKENIZER)
        changed = [k for k in {**before, **now} if before.get(k) != now.get(k) and not k.startswith(free) and k not in set(allowed)]
        if changed:
            differences = ", ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in changed[:5])
            cure = f"take it back, add {' '.join(f'--override {key}' for key in changed[:5])}, or choose another train.exp_name"
            raise BadInput(f"{folder}: started with another config: {differences}; {cure}")
    return held


_CONFIG_HASH = "# sha256 of what follows: "  # the first line of a run's config.yaml


def run_config(folder: Path) -> dict[str, Any]:
    """What a run's config.yaml says; `BadInput` when it is not what the run wrote. One without the hash, an earlier version's, is taken as it is."""
    path = folder / "config.yaml"
    first, _, text = path.read_bytes().partition(b"\n")
    if first.startswith(_CONFIG_HASH.encode()) and first != f"{_CONFIG_HASH}{_sha256(text)}".encode():
        raise BadInput(f"{path}: damaged, or edited: its hash is not that of its lines; take it from a copy, or remove its first line")
    return read_yaml(path)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_same_data(folder: Path, data: dict[str, Any], allowed: Iterable[str]) -> None:
    """`BadInput` unless the run in `folder` was trained on `data`: with other samples their order, and so the run, would be another.

    What the data are called (`folder`) may change.
    """
    held = artifacts.read_json(folder / "manifest.json").get("data") if (folder / "manifest.json").is_file() else None
    if not isinstance(held, dict) or "data" in allowed:
        return
    changed = [key for key in data if key in held and key != "folder" and held[key] != data[key]]
    if changed:
        differences = ", ".join(f"{key} was {held[key]}, is {data[key]}" for key in changed)
        raise BadInput(f"{folder}: was trained on other data: {differences}; give the same, add --override data, or choose another train.exp_name")


def start_run(folder: Path, config: Config, facts: dict[str, Any]) -> None:
    """Write config.yaml and manifest.json of a run; a continued run's are replaced by the present ones."""
    text = to_yaml(config)
    artifacts.write_text(folder / "config.yaml", f"{_CONFIG_HASH}{_sha256(text.encode())}\n{text}")
    artifacts.write_json(folder / "manifest.json", artifacts.manifest("run", **facts))


def kernels(config: Config, device: Any) -> AbstractContextManager:
    """The kernels of a whole run: exact ones with train.deterministic=elastic. Call it before the device is first used."""
    from vavae_fast.commands import build
    from vavae_fast.training.elastic import exact, require_workspace

    elastic = config.train.deterministic == "elastic"
    if elastic or config.train.audit_every is not None:
        require_workspace()
    return exact(device, compiled=build.compiled_regions(config.train.compile, device) != "none") if elastic else nullcontext()


def run_steps(
    state: Any, step: Any, gradients: Any, stream: Any, accumulation: int, settings: Any, world: Any, log: Any, start: int, observers: Any = ()
) -> Path:
    """Train from step `start` on a stream's batches, `accumulation` a step; the run folder, or `Interrupted` after a signal.

    After every save the run's report.html is written anew.
    """
    from vavae_fast.training.loop import train

    def batches(first: int) -> Iterator[list[Any]]:
        with closing(stream.batches(first)) as each:
            while micro_batches := list(islice(each, accumulation)):
                yield micro_batches

    done = train(state, step, batches, settings, world, log, start, gradients, observers, lambda: _rewrite_report(log))
    log.say(f"step {done} of {settings.max_steps}: {settings.folder}")
    log.close()
    if done < settings.max_steps:
        raise Interrupted(f"{settings.folder}: stopped at step {done} of {settings.max_steps}")
    return settings.folder


def _rewrite_report(log: Any) -> None:
    """By the main process; a report that cannot be written is said and is no reason to stop."""
    from vavae_fast.commands import report

    if log.folder is None:
        return
    try:
        report.write(report.read_run(log.folder))
    except (BadInput, OSError) as error:
        log.say(f"report.html was not written: {error}")
