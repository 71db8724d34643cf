"""What evaluate scores: a folder, an .npz, or latents decoded on the fly, as uint8 batches again and again; and what made them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.errors import BadInput


def open_scored(path: str, size: int, batch: int, tokenizer: str | None) -> Any:
    """`len` and uint8 batches (n, 3, H, W) of an .npz with arr_0, of latent shards, or of an image folder cropped to `size`."""
    from vavae_fast.evaluation import NpzImages

    archive = is_npz(path)
    if not archive and Path(path).is_dir() and any(Path(path).glob("*.safetensors")):
        return DecodedLatents(path, batch, tokenizer)
    if tokenizer is not None:
        raise BadInput(f"--tokenizer: decodes latent shards, {path} holds images; leave it out")
    return NpzImages(path, batch) if archive else FolderImages(path, size, batch)


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """A metric's `ValueError` (features that are not finite, images of two sizes, …) as what is wrong with `what`, the images that are scored."""
    try:
        yield
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(f"{what}: {error}") from error


def is_npz(path: str) -> bool:
    if not Path(path).exists() and not path.startswith("builtin:"):
        raise BadInput(f"{path}: no such file or folder")
    return path.endswith(".npz")


def npz_size(path: str) -> int | None:
    """Pixels a side of the images in an .npz; None without images."""
    from vavae_fast.evaluation import load_reference

    if not is_npz(path):
        return None
    images = load_reference(path).images
    return None if images is None else images.shape[1]


class FolderImages:
    """The images of a folder, cropped as ADM does."""

    def __init__(self, path: str, size: int, batch: int):
        from vavae_fast.commands import build

        self.path, self.images, self.batch = path, build.images(path, size), batch

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Any]:
        return (batch.pixels for batch in self.images.batches(self.batch))

    def __repr__(self) -> str:
        return f"{len(self)} images in {self.path}"


class DecodedLatents:
    """Latent shards, decoded by a tokenizer: what its reconstructions of those images score, or generated latents."""

    def __init__(self, path: str, batch: int, tokenizer: str | None):
        import torch

        from vavae_fast.commands import build
        from vavae_fast.config import given_path
        from vavae_fast.data.latents import extraction_facts, open_store
        from vavae_fast.models.inference import decoder

        weights = given_path(tokenizer, "--tokenizer", f"weights of the tokenizer that decodes the latents of {path}")
        self.path, self.store, self.batch = path, open_store(Path(path)), batch
        model = build.tokenizer_alone(weights)
        if model.embed_dim != self.store.shape[0]:
            raise BadInput(f"{weights}: decodes {model.embed_dim} channels, the latents of {path} have {self.store.shape[0]}; "
                           "give the tokenizer that made them")  # fmt: skip
        makers = {path: extraction_facts(Path(path)).get("tokenizer")}
        self.facts = dict(tokenizer=dict(path=tokenizer, sha256=build.tokenizer_digest(model, weights, makers)), precision="fp32")
        self.size = self.store.shape[1] * model.downsample_ratio
        self._decode = decoder(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"), "fp32")

    def __len__(self) -> int:
        return len(self.store)

    def __iter__(self) -> Iterator[Any]:
        import numpy as np
        import torch

        from vavae_fast.models.inference import matmul_precision
        from vavae_fast.pixels import to_uint8

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for first in range(0, len(self), self.batch):
            rows = np.arange(first, min(first + self.batch, len(self)))
            with torch.inference_mode(), matmul_precision("fp32"):
                images = to_uint8(self._decode(self.store.read(rows, np.zeros(len(rows), bool)).to(device)))
            yield images

    def __repr__(self) -> str:
        return f"{len(self)} latents in {self.path}, decoded"


def made_by(path: str, samples: Any) -> dict[str, Any]:
    """What decoded the latents, or what `vavae-fast sample` says of the .npz that it wrote; empty where nothing is known of the images."""
    if isinstance(samples, DecodedLatents):
        return {"facts": samples.facts}
    manifest = Path(path).parent / "manifest.json"
    if not path.endswith(".npz") or not manifest.is_file():
        return {}
    known = artifacts.read_json(manifest)
    if not isinstance(known, dict) or known.get("kind") != "samples" or known.get("sha256") != artifacts.sha256(Path(path)):
        return {}
    return {key: known[key] for key in ("facts", "run", "versions") if key in known}
