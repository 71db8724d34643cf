"""How evenly latents fill their space (the paper's Table 6), how each channel is distributed, and which places of an image are alike."""

import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.config import LightningDiTConfig, load_config
from vavae_fast.errors import BadInput, require

EXAMPLE = "vavae-fast analyze --latents latents/train --repeats 10 --out analysis --json uniformity.json"
_NEEDED = {"sklearn": "scikit-learn", "scipy": "scipy"}  # by t-SNE and the density estimate


def arguments(parser: ArgumentParser) -> None:
    kinds = "folder of shards, .pt holding a tensor (N, D), or .safetensors with latents (N, D)"
    parser.add_argument("--latents", required=True, metavar="PATH", help=kinds)
    parser.add_argument("--tokens", type=int, default=10_000, metavar="N", help="tokens looked at, drawn by the seed (default 10,000, the paper's)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the first t-SNE (default 0)")
    parser.add_argument("--repeats", type=int, default=10, metavar="R", help="t-SNE runs, a seed each (default 10, the paper's); 0: no t-SNE")
    parser.add_argument("--out", type=Path, default=Path("analysis"), metavar="DIR", help="of pictures, analysis.json and .html (default: analysis)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--config", metavar="FILE", help="with --images: config of the tokenizer, for similarity maps")
    parser.add_argument("--images", metavar="DIR", help="with --config: images whose similarity maps are drawn")
    parser.add_argument("--checkpoint", metavar="CKPT", help="with --config: tokenizer weights; default: the config's")
    parser.add_argument("--token", metavar="ROW,COLUMN", help="with --config: the latent that maps compare with; default: the middle one")
    parser.add_argument("--map-num", type=int, default=8, metavar="N", help="with --config: images that are drawn (default 8)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="with --config: override config keys")


@dataclass(frozen=True)
class Maps:
    """What similarity maps are drawn of."""

    images: Any
    tokenizer: Any
    foundation: Any  # None: the config gives no weights of one
    token: tuple[int, int] | None
    count: int


@dataclass(frozen=True)
class AnalyzePlan:
    """Tokens to look at, and where what is seen goes."""

    tokens: Any  # analysis.Tokens
    seed: int
    repeats: int
    maps: Maps | None
    out: Path
    json: Path | None

    def describe(self) -> str:
        count, width = self.tokens.values.shape
        t_sne = f"t-SNE {self.repeats} times" if self.repeats else "no t-SNE"
        maps = f"; similarity maps of {self.maps.count} images" if self.maps else ""
        return f"{count:,} tokens of {width} channels from {self.tokens.facts['latents']}, {t_sne}{maps} -> {self.out}\nnothing was written"


def plan(config: None, args: Namespace) -> AnalyzePlan:
    """Numbers, packages, latents, then the tokenizer of the maps."""
    least_of = {"tokens": 1, "seed": 0, "repeats": 0, "map_num": 1}
    for name, least in least_of.items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        require(value >= least, flag, value, f"{least} or more")
    require(args.seed + args.repeats <= 1 << 32, "--seed", args.seed, "below 2**32 with all repeats")
    for package, name in _NEEDED.items():
        if args.repeats and find_spec(package) is None:
            cure = "pip install 'vavae-fast[analyze]', or leave t-SNE out with --repeats 0"
            raise BadInput(f"analyze: {name} is not installed, t-SNE needs it; {cure}")
    artifacts.require_writable(args.out)
    if args.json:
        artifacts.require_writable(args.json.parent)
    from vavae_fast.commands.analysis import read_tokens
    from vavae_fast.evaluation.uniformity import NEIGHBOUR, PERPLEXITY

    tokens = read_tokens(Path(args.latents), args.tokens, args.seed)
    least = PERPLEXITY if args.repeats else NEIGHBOUR
    if len(tokens.values) <= least:
        raise BadInput(f"{args.latents}: {len(tokens.values)} tokens are looked at, more than {least} are needed; give more, or raise --tokens")
    return AnalyzePlan(tokens, args.seed, args.repeats, _maps(args), args.out, args.json)


def _maps(args: Namespace) -> Maps | None:
    if not args.config and not args.images:
        for flag, value in (("--checkpoint", args.checkpoint), ("--token", args.token), ("key=value", args.overrides)):
            if value:
                raise BadInput(f"{flag}: only with --config and --images")
        return None
    for flag, value in (("--config", args.config), ("--images", args.images)):
        if not value:
            raise BadInput(f"{flag}: similarity maps need --config and --images")
    config = load_config(args.config, tuple(args.overrides))
    from vavae_fast.commands import build

    is_dit = isinstance(config, LightningDiTConfig)
    images = build.images(args.images, config.data.image_size if is_dit else config.image_size)
    tokenizer = build.tokenizer(config, args.checkpoint)
    has_foundation = not is_dit and config.model.params.use_vf and (config.foundation.weights or config.foundation.standin)
    side = images.size // tokenizer.downsample_ratio
    return Maps(images, tokenizer, build.foundation(config) if has_foundation else None, _token(args.token, side), min(args.map_num, len(images)))


def _token(text: str | None, side: int) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) < side for part in parts):
        raise BadInput(f"--token: must be ROW,COLUMN, each from 0 to {side - 1}, got {text!r}")
    return int(parts[0]), int(parts[1])


def run(plan: AnalyzePlan) -> dict[str, Any]:
    """Measure, draw, write; returns what stands in analysis.json."""
    from vavae_fast.commands.analysis import measure, similarity_sheet, write_page

    started = time.perf_counter()
    try:
        measured, embedding = measure(plan.tokens, plan.seed, plan.repeats, say=lambda line: print(f"analyze  {line}", flush=True))
    except ValueError as error:  # latents that are all the same
        raise BadInput(f"{plan.tokens.facts['latents']}: {error}") from None
    result = artifacts.manifest("analysis", **measured)
    artifacts.write_json(plan.out / "analysis.json", result)
    if plan.json:
        artifacts.write_json(plan.json, result)
    if plan.maps:
        similarity_sheet(plan.maps, plan.out / "similarity.png")
    write_page(plan.out, plan.tokens, measured, embedding, plan.maps is not None)
    for name, value in measured.items():
        if isinstance(value, float) and not name.endswith("_std"):
            spread = f" ± {measured[f'{name}_std']:.4f}" if f"{name}_std" in measured else ""
            print(f"{name:<24} {value:.4f}{spread}")
    print(f"analyze  {plan.out / 'analysis.html'}, {time.perf_counter() - started:.0f} s")
    return result
