"""How well a tokenizer reconstructs images: rFID, PSNR, SSIM and LPIPS by one of two named protocols, in one pass, flat in memory.

Images are shared among the processes of the launcher. Nothing depends on their number or on the batch beyond rounding: the noise of a
posterior sample is a function of the seed and of the image's place in the set.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vavae_fast import rng
from vavae_fast.commands._pictures import differences
from vavae_fast.commands.online_fid import gathered
from vavae_fast.data.images import ImageBatch, Images
from vavae_fast.distributed import World
from vavae_fast.evaluation import FeatureStatistics, frechet_distance, psnr, ssim
from vavae_fast.models.autoencoder import AutoencoderKL
from vavae_fast.pixels import to_uint8, to_unit
from vavae_fast.training.heldout import spread_rows
from vavae_fast.training.log import readable_time
from vavae_fast.training.previews import write_grid

METRICS = ("rfid", "psnr", "ssim", "lpips")


@dataclass(frozen=True)
class Protocol:
    """What is scored: which crop, which latent, and SSIM and LPIPS of 8-bit pixels or of the decoder's output as it is."""

    crop: str
    sample: bool  # a posterior sample; else its mean
    eight_bit: bool
    ssim_border: str
    says: str


PROTOCOLS = {
    "adm": Protocol("center", False, True, "valid", "ADM's centre crop (box halving, bicubic); posterior mean; everything of 8-bit pixels; "
                    "SSIM of windows inside the image"),
    "lightningdit": Protocol("bilinear", True, False, "reflect", "LightningDiT's evaluate_tokenizer.py: bilinear short side, centre crop; posterior "
                             "sample; rFID and PSNR of 8-bit pixels; SSIM of clamped floats, border mirrored; LPIPS of floats, not clamped"),
}  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """One batch: images and reconstructions in 8 bits, (n, 3, H, W) each, and as the protocol hands them to SSIM and LPIPS, about [-1, 1]."""

    pixels: Tensor
    made: Tensor
    images: Tensor
    reconstructions: Tensor


@dataclass(frozen=True)
class Judges:
    """Networks of the metrics that need one; None where the metric is not asked for."""

    inception: Callable[[Tensor], Any] | None
    lpips: nn.Module | None


@dataclass(frozen=True)
class Reconstructor:
    """A tokenizer under a protocol, on the device of `world`."""

    tokenizer: AutoencoderKL
    images: Images  # opened with the protocol's crop
    protocol: Protocol
    seed: int
    bf16: bool
    world: World

    def batches(self, size: int, indices: Any = None) -> Iterator[Scored]:
        """The images `indices`, all by default, `size` at a time."""
        for batch in self.images.batches(size, indices=indices):
            yield self._scored(batch)

    @torch.inference_mode()
    def _scored(self, batch: ImageBatch) -> Scored:
        device = self.world.device
        pixels, index = batch.pixels.to(device), batch.index.to(device)
        images = to_unit(pixels)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            posterior = self.tokenizer.encode(images)
            z = posterior.mode()
            if self.protocol.sample:
                z = posterior.sample(noise=rng.normal(self.seed, index, like=posterior.mean, stream=rng.Stream.POSTERIOR))
            decoded = self.tokenizer.decode(z).float()
        made = to_uint8(decoded)
        return Scored(pixels, made, images, to_unit(made) if self.protocol.eight_bit else decoded)


def reconstruction_scores(reconstructor: Reconstructor, judges: Judges, metrics: list[str], batch: int) -> dict[str, float] | None:
    """{metric: value} over all images, PSNR in dB: means of one value an image; on the main process, None elsewhere. All must call."""
    world, images = reconstructor.world, reconstructor.images
    own = range(world.rank, len(images), world.size)
    per_image = [name for name in METRICS[1:] if name in metrics]
    sums = torch.zeros(len(per_image), dtype=torch.float64, device=world.device)
    originals, reconstructions = FeatureStatistics(), FeatureStatistics()
    progress = _Progress(len(images), world)
    for scored in reconstructor.batches(batch, own):
        values = _values(scored, reconstructor.protocol, judges, per_image)
        sums += sums.new_tensor([values[name].double().sum() for name in per_image])
        if "rfid" in metrics:
            with torch.inference_mode():
                originals.update(judges.inception(scored.pixels).pool.cpu())
                reconstructions.update(judges.inception(scored.made).pool.cpu())
        progress.add(len(scored.pixels))
    found = {}
    if "rfid" in metrics:
        moments = gathered(reconstructions, world), gathered(originals, world)
        if world.main:
            found["rfid"] = frechet_distance(*moments[0].result(), *moments[1].result())
    means = (world.mean(sums) * world.size / len(images)).tolist()
    return found | dict(zip(per_image, means)) if world.main else None


@torch.inference_mode()
def _values(scored: Scored, protocol: Protocol, judges: Judges, names: list[str]) -> dict[str, Tensor]:
    """One value an image, (n,) each."""
    values = {}
    if "psnr" in names:
        values["psnr"] = psnr(scored.made, scored.pixels)
    if "ssim" in names and protocol.eight_bit:
        values["ssim"] = ssim(scored.made, scored.pixels, border=protocol.ssim_border)
    elif "ssim" in names:
        values["ssim"] = ssim(scored.reconstructions.clamp(-1, 1), scored.images, data_range=2.0, border=protocol.ssim_border)
    if "lpips" in names:
        values["lpips"] = judges.lpips(scored.images, scored.reconstructions).flatten()
    return values


def write_picture(path: Path, reconstructor: Reconstructor, count: int, batch: int) -> Path:
    """`count` images, evenly spread over the set, a row each: original, reconstruction, difference (grey where they agree)."""
    rows = []
    for scored in reconstructor.batches(batch, spread_rows(len(reconstructor.images), count)):
        rows.append(torch.stack((scored.pixels, scored.made, differences(scored.pixels, scored.made)), dim=1).flatten(0, 1).cpu())
    return write_grid(path, torch.cat(rows), columns=3)


class _Progress:
    """A line every ten seconds and at the end, by the main process, which counts for all."""

    def __init__(self, total: int, world: World):
        self.total, self.world, self.done, self.said, self.started = total, world, 0, 0.0, time.perf_counter()

    def add(self, count: int) -> None:
        self.done = min(self.done + count * self.world.size, self.total)
        seconds = time.perf_counter() - self.started
        if self.world.main and (seconds - self.said > 10 or self.done == self.total):
            rate = self.done / seconds
            print(f"evaluate  {self.done:,}/{self.total:,}  {rate:.0f} img/s  ETA {readable_time((self.total - self.done) / rate)}", flush=True)
            self.said = seconds
