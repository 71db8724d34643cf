"""What `analyze` reads, measures and draws."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vavae_fast import artifacts, rng
from vavae_fast.commands import _html
from vavae_fast.commands._pictures import density_scatter, histograms, similarity_rows
from vavae_fast.data.latents import open_latents
from vavae_fast.errors import BadInput
from vavae_fast.evaluation.uniformity import (
    NEIGHBOUR,
    PERPLEXITY,
    Embedding,
    density_statistics,
    embeddings,
    neighbour_distance_cv,
    summary,
)
from vavae_fast.pixels import image_grid, to_unit
from vavae_fast.torch_files import read_torch
from vavae_fast.training.heldout import spread_rows
from vavae_fast.training.log import readable_time
from vavae_fast.training.previews import write_grid

_ROWS = 256  # latents read at a time
_BINS, _REACH = 33, 4.0  # of a channel's histogram, over standard deviations
_MAPS_BATCH = 8


@dataclass(frozen=True)
class Tokens:
    """values (N, D) float32, as they are measured; mean and std (D,) of each channel before any normalisation; where they are from."""

    values: Tensor
    mean: Tensor
    std: Tensor
    facts: dict[str, Any]


def read_tokens(path: Path, count: int, seed: int) -> Tokens:
    """At most `count` tokens of a folder of shards, or of a file with a tensor (N, D).

    Of shards: drawn without repetition from all places of all latents, mirrored half of the time, normalised by latents_stats.pt, as the
    reference's latent_vis.py does it, which draws images and one place of each. Of a file: as they are, in their order.
    """
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder; give a folder of shards, a .pt or a .safetensors file")
    if path.is_dir():
        return _of_shards(path, count, seed)
    rows = _read_rows(path)
    drawn = rng.permutation(seed, 0, np.arange(count), len(rows)) if len(rows) > count else np.arange(len(rows))
    rows = rows[torch.from_numpy(np.sort(drawn))].float()
    std, mean = torch.std_mean(rows, dim=0)
    return Tokens(rows, mean, std, dict(latents=str(path), sha256=artifacts.sha256(path), normalised=False))


def _of_shards(folder: Path, count: int, seed: int) -> Tokens:
    latents = open_latents(folder)
    channels, height, width = latents.shape
    places = height * width
    drawn = rng.permutation(seed, 0, np.arange(min(count, len(latents) * places)), len(latents) * places)
    drawn.sort()
    values = torch.empty(len(drawn), channels)
    for start in range(0, len(drawn), _ROWS):
        part = torch.from_numpy(drawn[start : start + _ROWS])
        mirrored = rng.integers(seed, part, 2, rng.Stream.FLIP).bool()
        rows = latents.read(part // places, mirrored).flatten(2)
        values[start : start + len(part)] = rows[torch.arange(len(part)), :, part % places]
    mean, std = latents.mean.flatten(), latents.std.flatten()
    maker = (latents.manifest or {}).get("facts", {}).get("tokenizer")
    facts = dict(latents=str(folder), images=len(latents), shape=list(latents.shape), tokenizer_sha256=maker, normalised=True)
    return Tokens((values - mean) / std, mean, std, facts)


def _read_rows(path: Path) -> Tensor:
    """The tensor (N, D) in a .pt or .safetensors file; `BadInput` names the file and what it holds instead."""
    wanted = "expected a tensor (N, D) of finite numbers"
    rows = _from_safetensors(path, wanted) if path.suffix == ".safetensors" else read_torch(path, f"{wanted} in .pt or .safetensors")
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.numel() or not rows.is_floating_point():
        found = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        hint = "; of shards give the folder" if isinstance(rows, Tensor) and rows.ndim == 4 else ""
        raise BadInput(f"{path}: holds {found}, {wanted}{hint}")
    if not torch.isfinite(rows).all():
        raise BadInput(f"{path}: {int((~torch.isfinite(rows)).sum())} values are NaN or infinite; {wanted}")
    return rows


def _from_safetensors(path: Path, wanted: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            if "latents" not in file.keys():
                raise BadInput(f"{path}: holds {', '.join(sorted(file.keys())[:5]) or 'nothing'}, no latents; {wanted} under that name")
            return file.get_tensor("latents")
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable file of a tensor ({type(error).__name__}); {wanted} in .pt or .safetensors") from None


def measure(tokens: Tokens, seed: int, repeats: int, say: Callable[[str], None]) -> tuple[dict[str, Any], Embedding | None]:
    """Everything in numbers, ready for JSON, and the first t-SNE. `ValueError`: tokens that are all the same."""
    import importlib.metadata

    found: dict[str, Any] = {"neighbour_distance_cv": neighbour_distance_cv(tokens.values)}
    runs, first, started = [], None, time.perf_counter()
    for embedding in embeddings(tokens.values, seed, repeats) if repeats else ():
        first = embedding if first is None else first
        runs.append(density_statistics(embedding.density))
        left = (time.perf_counter() - started) / len(runs) * (repeats - len(runs))
        say(f"t-SNE {len(runs)}/{repeats}  density_cv {runs[-1]['density_cv']:.4f}  ETA {readable_time(left)}")
    versions = {name: importlib.metadata.version(name) for name in ("scikit-learn", "scipy")} if repeats else {}
    protocol = dict(tokens=len(tokens.values), dimensions=tokens.values.shape[1], seed=seed, repeats=repeats, perplexity=PERPLEXITY,
                    neighbour=NEIGHBOUR, packages=versions) | tokens.facts  # fmt: skip
    channels = dict(mean=tokens.mean.tolist(), std=tokens.std.tolist())
    return summary(runs) | found | {"runs": runs, "channels": channels, "protocol": protocol}, first


def channel_counts(tokens: Tokens) -> np.ndarray:
    """(D, bins): how many tokens a channel has in each bin of a quarter standard deviation about its mean; tails in the outer bins."""
    std, mean = torch.std_mean(tokens.values, dim=0)
    scaled = ((tokens.values - mean) / std.clamp_min(1e-12)).clamp(-_REACH, _REACH).numpy()
    return np.stack([np.histogram(column, _BINS, (-_REACH, _REACH))[0] for column in scaled.T])


@torch.inference_mode()
def similarity_sheet(maps: Any, path: Path) -> Path:
    """Rows of image, map of the posterior's mean, map of the features where there are any, of images evenly spread over the set."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = maps.tokenizer.to(device)
    foundation = None if maps.foundation is None else maps.foundation.to(device)
    rows = []
    for batch in maps.images.batches(_MAPS_BATCH, indices=spread_rows(len(maps.images), maps.count)):
        x = to_unit(batch.pixels.to(device))
        looked_at = [tokenizer.encode(x).mode()] + ([] if foundation is None else [foundation(x).float()])
        rows.append(similarity_rows(batch.pixels, looked_at, maps.token))
    return write_grid(path, torch.cat(rows), columns=2 if foundation is None else 3)


def write_page(out: Path, tokens: Tokens, measured: dict[str, Any], embedding: Embedding | None, has_maps: bool) -> Path:
    """tsne.png and channels.png, and analysis.html with all pictures in it."""
    scores = [(name, value, measured.get(f"{name}_std")) for name, value in measured.items() if isinstance(value, float)]
    table = _html.table([("", "value", "std over repeats"), *(row for row in scores if not row[0].endswith("_std"))])
    note = "Evenly spread: density_cv, gini, neighbour_distance_cv towards 0, normalized_entropy towards 1. Compare latents of one width only."
    sections = [("Uniformity", table + _html.paragraph(note))]
    if embedding is not None:
        sheet = density_scatter(embedding.points, embedding.density)
        sections.append(("t-SNE of the first seed", _picture(out / "tsne.png", sheet, "A token each; the lighter, the denser.")))
    panels = histograms(channel_counts(tokens))
    sheet = np.asarray(image_grid(panels, columns=min(8, len(panels))))
    note = f"Histogram of each channel, row by row, over its mean ± {_REACH:g} standard deviations; one height for all."
    lines = {name: list(enumerate(getattr(tokens, name).tolist())) for name in ("mean", "std")}
    plot = _html.svg_lines(lines, "mean and std by channel", x_label="channel")
    sections.append(("Channels", _picture(out / "channels.png", sheet, note) + plot))
    if has_maps:
        note = "Cosine of the framed token with every place: in the latents and, where the config gives one, a foundation model's features."
        sections.append(("Similarity maps", _embedded(out / "similarity.png", f"{note} Red 1, white 0, blue -1.")))
    facts = [(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)) for name, value in measured["protocol"].items()]
    sections.append(("What made it", _html.table([("fact", "value"), *facts])))
    artifacts.write_text(out / "analysis.html", _html.page(f"latents: {tokens.facts['latents']}", sections))
    return out / "analysis.html"


def _picture(path: Path, pixels: np.ndarray, caption: str) -> str:
    """pixels (H, W, 3) uint8 into the PNG file `path`, and onto the page."""
    from PIL import Image

    with artifacts.replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
    return _embedded(path, caption)


def _embedded(path: Path, caption: str) -> str:
    from PIL import Image

    with Image.open(path) as image:
        size = image.size
    return _html.figure(_html.png_image(path.read_bytes(), size, path.stem), caption)
