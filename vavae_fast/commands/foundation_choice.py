"""Which foundation model a tokenizer run is aligned with: `use_vf`, or `--foundation package.module:factory`. Imports no torch."""

from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

from vavae_fast import artifacts
from vavae_fast.config import TokenizerConfig
from vavae_fast.errors import BadInput
from vavae_fast.models.foundation_models import USER_MODEL, foundation_entry
from vavae_fast.tokenizer_schema import FoundationConfig

_KEY = "model.params.use_vf"


def foundation_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--foundation", metavar="MODULE:FACTORY",
                        help="align with your own model in place of use_vf: FACTORY() returns a torch.nn.Module with .feature_dim and "
                             "forward(images (B, 3, H, W) in [-1, 1]) -> (B, F, h, w); give it again to continue a run")  # fmt: skip


def with_foundation(config: TokenizerConfig, import_path: str | None) -> TokenizerConfig:
    """`config` with a use_vf that can be built; with an import path it is `module`, as the run's config.yaml will say."""
    name = config.model.params.use_vf
    if import_path is None:
        if name == USER_MODEL:
            raise BadInput(f"{_KEY}: {USER_MODEL} is the model of --foundation package.module:factory; give that flag too")
        if name not in (None, "standin"):
            foundation_entry(name)
        return config
    for key in fields(FoundationConfig):
        if getattr(config.foundation, key.name) != key.default:
            cure = f"its factory loads and its forward prepares by itself; leave foundation.{key.name} out"
            raise BadInput(f"foundation.{key.name}: not used with --foundation {import_path}: {cure}")
    return replace(config, model=replace(config.model, params=replace(config.model.params, use_vf=USER_MODEL)))


def check_same_module(folder: Path, import_path: str | None, allowed: Iterable[str]) -> None:
    """`BadInput` when the run in `folder` was aligned with a user's model and this is to be another, unless use_vf is `allowed` to change."""
    path = folder / "manifest.json"
    if _KEY in set(allowed) or not path.is_file() or not any((folder / "checkpoints").glob("step_*/manifest.json")):
        return
    before = artifacts.read_json(path).get("foundation") or ""
    if ":" in before and not before.startswith("timm:") and before != import_path:
        cure = f"give it again, or add --override {_KEY}, or choose another train.exp_name"
        raise BadInput(f"{folder}: started with --foundation {before}{f', not {import_path}' if import_path else ''}; {cure}")
