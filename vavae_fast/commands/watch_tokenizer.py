"""What a tokenizer run looks at while it trains: scores of held-out reconstructions, pictures, VF similarity maps, a small rFID. From
`log:` and `data.valid_path` of the config; nothing here changes what is trained.

Held-out images are cropped as for scores, and the noise of each posterior sample is a function of the image's place in the set: the same
question at every look, so that the answer moves only with the weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vavae_fast import rng
from vavae_fast.commands import build
from vavae_fast.commands._pictures import similarity_rows
from vavae_fast.commands.online_fid import LEAST, gathered, pool_statistics
from vavae_fast.config import TokenizerConfig, given_images, given_path
from vavae_fast.data.images import ImageBatch, Images
from vavae_fast.distributed import World
from vavae_fast.errors import BadInput
from vavae_fast.evaluation import Inception, frechet_distance, load_inception, psnr, ssim
from vavae_fast.losses import alignment_terms, reconstruction_terms
from vavae_fast.models.autoencoder import DiagonalGaussian
from vavae_fast.pixels import to_uint8
from vavae_fast.training.averaged import evaluating
from vavae_fast.training.heldout import SEED, spread_rows
from vavae_fast.training.log import RunLog
from vavae_fast.training.loop import Observer
from vavae_fast.training.previews import write_grid
from vavae_fast.training.tokenizer import TokenizerState

_MAPS = 8  # images a sheet of similarity maps shows
_SSIM_SIDE = 11  # pixels of its window: smaller images have no SSIM


@dataclass(frozen=True)
class TokenizerWatch:
    """What a config asks to be looked at, checked; None: not asked for."""

    held_out: Images | None  # the centre crops that scores are taken of
    shown: Images | None  # those that pictures show: held-out ones, or those trained on where none are held out
    inception: Inception | None

    def describe(self, config: TokenizerConfig) -> str:
        log, parts = config.log, []
        if self.held_out is not None:
            used = min(log.valid_num, len(self.held_out))
            parts.append(f"reconstructions of {used:,} of {len(self.held_out):,} held-out images every {log.valid_every:,} steps")
        if self.shown is not None:
            which = "held-out images" if self.shown is self.held_out else "images trained on"
            parts.append(f"pictures of {min(log.samples_num, len(self.shown))} {which} every {log.samples_every:,} steps")
        if self.inception is not None:
            parts.append(f"rFID of {log.fid_num:,} held-out images every {log.fid_every:,} steps")
        return "; ".join(parts) or "the training loss alone; data.valid_path and log.samples_every add to it"


def plan_watch(config: TokenizerConfig, images: Images | None) -> TokenizerWatch:
    """Open and check what will be looked at; writes nothing. `images`: those trained on, None in a dry run without any."""
    held_out = _held_out(config) if config.data.valid_path else None
    shown = None
    if config.log.samples_every is not None:
        shown = held_out if held_out is not None or images is None else build.images(config.image_path, config.image_size)
    return TokenizerWatch(held_out, shown, _inception(config, held_out) if config.log.fid_every is not None else None)


def _held_out(config: TokenizerConfig) -> Images:
    path = config.data.valid_path
    given_images(path, "data.valid_path", "a folder of images that are not trained on")
    if config.image_path and Path(path).resolve() == Path(config.image_path).resolve():
        raise BadInput(f"data.valid_path: {path} is data.path, of which nothing is held out; give other images")
    return build.images(path, config.image_size)


def _inception(config: TokenizerConfig, held_out: Images | None) -> Inception:
    found = 0 if held_out is None else len(held_out)
    if found < config.log.fid_num:
        short = f"rFID of log.fid_num={config.log.fid_num} images, {LEAST} or more, and data.valid_path has {found}"
        raise BadInput(f"log.fid_every: {short}; give more held-out images")
    return load_inception(given_path(config.log.fid_inception, "log.fid_inception", "the weights of the FID Inception network"))


def observers(config: TokenizerConfig, watch: TokenizerWatch, state: TokenizerState, batch: int, log: RunLog) -> list[Observer]:
    """Those that the config asks for, `batch` images at a time. Every process makes and calls the same ones; the main one writes."""
    c, found = config.log, []
    if watch.held_out is not None:
        found.append(Observer(c.valid_every, _scores_look(watch.held_out, c.valid_num, state, batch)))
    if watch.shown is not None:
        found.append(Observer(c.samples_every, _pictures_look(watch.shown, c.samples_num, state, batch, log)))
    if watch.inception is not None:
        found.append(Observer(c.fid_every, _rfid_look(watch.held_out, c.fid_num, watch.inception, state, batch)))
    return found


@dataclass(frozen=True)
class Reconstructed:
    """Images and what the present weights make of them."""

    pixels: Tensor  # (n, 3, H, W) uint8
    images: Tensor  # the same in [-1, 1]
    posterior: DiagonalGaussian
    z: Tensor  # (n, C, h, w), sampled
    reconstructions: Tensor  # (n, 3, H, W), about [-1, 1]


def _reconstructed(images: Images, rows: np.ndarray, state: TokenizerState, batch: int) -> Iterator[Reconstructed]:
    """The images `rows`, `batch` at a time. The caller has the model in evaluation mode."""
    for part in images.batches(batch, indices=rows):
        yield _reconstruct(part, state)


def _reconstruct(part: ImageBatch, state: TokenizerState) -> Reconstructed:
    x = state.images(part)
    with state.autocast():
        posterior = state.autoencoder.encode(x)
        noise = rng.normal(SEED, part.index.to(x.device), like=posterior.mean, stream=rng.Stream.POSTERIOR)
        z = posterior.sample(noise=noise)
        return Reconstructed(part.pixels.to(x.device), x, posterior, z, state.autoencoder.decode(z))


def _share(images: Images, count: int, world: World) -> np.ndarray:
    """This process's of `count` images, evenly spread; no process waits for another inside the model, so shares may differ by one."""
    return spread_rows(len(images), count)[world.rank :: world.size]


def _scores_look(images: Images, count: int, state: TokenizerState, batch: int) -> Callable[[int], dict[str, float]]:
    rows, names = _share(images, count, state.world), _score_names(state, images.size)

    def look(step: int) -> dict[str, float]:
        """`valid_psnr`, `valid_ssim` of 8-bit pixels; `valid_rec`, `valid_perceptual`, `valid_kl`, `valid_mdms`, `valid_mcos`, `valid_vf_loss`
        by training's definitions. Means over all held-out images; one host sync."""
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=state.world.device)
        with evaluating(state.autoencoder):
            for made in _reconstructed(images, rows, state, batch):
                scores = _scores(made, state)
                means = torch.stack([scores[name].double() for name in names] + [sums.new_ones(())])
                sums += len(made.pixels) * means
        *totals, number = (state.world.mean(sums) * state.world.size).tolist()
        return {f"valid_{name}": total / number for name, total in zip(names, totals)}

    return look


def _score_names(state: TokenizerState, size: int) -> list[str]:
    """Known without looking: a process may have no images."""
    names = ["psnr", "ssim", "rec", "kl"] if size >= _SSIM_SIDE else ["psnr", "rec", "kl"]
    names += ["perceptual"] if state.perceptual is not None and state.weights.perceptual_weight > 0 else []
    return names + (["mdms", "mcos", "vf_loss"] if state.foundation is not None else [])


def _scores(made: Reconstructed, state: TokenizerState) -> dict[str, Tensor]:
    """Means over a batch, each ()."""
    with state.autocast():
        scores = reconstruction_terms(made.images, made.reconstructions, state.weights, state.perceptual)
        features = state.features(made.images)
        if features is not None:
            scores |= alignment_terms(state.alignment(made.z, features), state.weights)
    pixels = to_uint8(made.reconstructions)
    scores |= dict(kl=made.posterior.kl().mean(), psnr=psnr(pixels, made.pixels).mean())
    return scores | (dict(ssim=ssim(pixels, made.pixels).mean()) if made.pixels.shape[2] >= _SSIM_SIDE else {})


def _pictures_look(images: Images, count: int, state: TokenizerState, batch: int, log: RunLog) -> Callable[[int], dict[str, float]]:
    rows = spread_rows(len(images), count)

    def look(step: int) -> dict[str, float]:
        """samples/: each image with its reconstruction at its right. similarity/: token, map of z, map of the features. By the main process."""
        if not state.world.main:
            return {}
        pairs, maps = [], []
        with evaluating(state.autoencoder):
            for made in _reconstructed(images, rows, state, batch):
                pairs.append(torch.stack((made.pixels, to_uint8(made.reconstructions)), dim=1).flatten(0, 1))
                maps += [] if state.foundation is None else [_similarity(made, state)]
        name, across = f"step_{step:08d}.png", 2 * max(1, round((len(rows) / 2) ** 0.5))
        with log.sparing("reconstructions"):
            log.image(step, write_grid(log.folder / "samples" / name, torch.cat(pairs), across))
        if maps:
            with log.sparing("similarity maps"):
                log.image(step, write_grid(log.folder / "similarity" / name, torch.cat(maps)[: 3 * _MAPS], 3))
        return {}

    return look


def _similarity(made: Reconstructed, state: TokenizerState) -> Tensor:
    """(3 n, 3, H, W) uint8: of each image the framed middle token, and its similarity maps in z and in the features, as the loss compares them."""
    with state.autocast():
        z, features, projection = state.alignment(made.z, state.features(made.images))
        z = z if projection is None else torch.einsum("fc,bchw->bfhw", projection, z)
    return similarity_rows(made.pixels, (z.float(), features.float()))


def _rfid_look(images: Images, count: int, inception: Inception, state: TokenizerState, batch: int) -> Callable[[int], dict[str, float]]:
    rows, inception = _share(images, count, state.world), inception.to(state.world.device)
    seen = (part.pixels.to(state.world.device) for part in images.batches(batch, indices=rows))
    originals = gathered(pool_statistics(inception, seen), state.world)

    def look(step: int) -> dict[str, float]:
        """`rfid`, of log.fid_num held-out images, on the main process."""
        with evaluating(state.autoencoder):
            made = (to_uint8(batch.reconstructions) for batch in _reconstructed(images, rows, state, batch))
            reconstructions = gathered(pool_statistics(inception, made), state.world)
        return {} if reconstructions is None else {"rfid": frechet_distance(*reconstructions.result(), *originals.result())}

    return look
