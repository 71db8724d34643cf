"""How well a tokenizer reconstructs images: rFID, PSNR, SSIM and LPIPS by one of two named protocols, in one pass, flat in memory.

Images are shared among the processes of the launcher; each keeps a tally on disk, from which it goes on after a kill. Nothing depends on
their number or on the batch beyond rounding: the noise of a posterior sample is a function of the seed and of the image's place in the set.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vavae_fast import artifacts, rng
from vavae_fast.commands._pictures import differences
from vavae_fast.commands.online_fid import gathered
from vavae_fast.data.images import ImageBatch, Images
from vavae_fast.distributed import World
from vavae_fast.evaluation import FeatureStatistics, frechet_distance, psnr, ssim
from vavae_fast.models.autoencoder import AutoencoderKL
from vavae_fast.models.inference import matmul_precision
from vavae_fast.pixels import to_uint8, to_unit
from vavae_fast.training.checkpoint import write_tensors
from vavae_fast.training.heldout import spread_rows
from vavae_fast.training.log import readable_time
from vavae_fast.training.previews import write_grid

METRICS = ("rfid", "psnr", "ssim", "lpips")
SAVED_EVERY = 60.0  # seconds from one saved tally to the next


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
    @matmul_precision("fp32")
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


@dataclass
class Tally:
    """What is known of a process's first `done` images: sums of the values of one image each, and the moments of rFID."""

    sums: Tensor  # (metrics,) float64
    done: int = 0
    originals: FeatureStatistics = field(default_factory=FeatureStatistics)
    reconstructions: FeatureStatistics = field(default_factory=FeatureStatistics)

    def state_dict(self) -> dict[str, Tensor]:
        moments = {f"{name}.{key}": value for name in ("originals", "reconstructions") for key, value in getattr(self, name).state_dict().items()}
        return {"sums": self.sums, "done": torch.tensor(self.done)} | moments

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums, self.done = state["sums"], int(state["done"])
        for name in ("originals", "reconstructions"):
            of = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            getattr(self, name).load_state_dict(of)


class TallyFile:
    """A tally on disk, from which a killed evaluation goes on. `identity` says of what it is; that of something else is not used."""

    def __init__(self, path: Path, identity: str):
        self.path, self.identity, self.saved = path, identity, time.perf_counter()

    def read(self, tally: Tally) -> None:
        if not self.path.is_file():
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                if (file.metadata() or {}).get("identity") == self.identity:
                    tally.load_state_dict({key: file.get_tensor(key) for key in file.keys()})
        except SafetensorError as error:
            print(f"evaluate  {self.path}: not readable ({error}), so it begins again", flush=True)

    def write(self, tally: Tally) -> None:
        """Once in SAVED_EVERY seconds."""
        if time.perf_counter() - self.saved >= SAVED_EVERY:
            with artifacts.replacing(self.path) as temporary:
                write_tensors(temporary, tally.state_dict(), {"identity": self.identity})
            self.saved = time.perf_counter()

    def remove(self) -> None:
        """And what a kill within `write` has left beside it."""
        for path in (self.path, self.path.with_name(f"{self.path.name}.tmp")):
            path.unlink(missing_ok=True)


def reconstruction_scores(
    reconstructor: Reconstructor, judges: Judges, metrics: list[str], batch: int, held: TallyFile | None = None
) -> dict[str, float] | None:
    """{metric: value} over all images, PSNR in dB: means of one value an image; on the main process, None elsewhere. All must call.

    held: where this process's tally is kept meanwhile. It goes on at a batch's border, so the values are those of an undisturbed one.
    """
    world, images = reconstructor.world, reconstructor.images
    own = range(world.rank, len(images), world.size)
    per_image = [name for name in METRICS[1:] if name in metrics]
    tally = Tally(torch.zeros(len(per_image), dtype=torch.float64))
    if held is not None:
        held.read(tally)
    progress = _Progress(len(images), tally.done * world.size, world)
    for scored in reconstructor.batches(batch, own[tally.done :]):
        values = _values(scored, reconstructor.protocol, judges, per_image)
        tally.sums = tally.sums + torch.tensor([values[name].double().sum() for name in per_image], dtype=torch.float64)
        if "rfid" in metrics:
            with torch.inference_mode():
                originals, reconstructions = judges.inception(scored.pixels).pool.cpu(), judges.inception(scored.made).pool.cpu()
            tally.originals.update(originals)
            tally.reconstructions.update(reconstructions)
        tally.done += len(scored.pixels)
        if held is not None:
            held.write(tally)
        progress.add(len(scored.pixels))
    return _gathered_means(tally, metrics, per_image, len(images), world)


def _gathered_means(tally: Tally, metrics: list[str], per_image: list[str], count: int, world: World) -> dict[str, float] | None:
    means = (world.mean(tally.sums.to(world.device)) * world.size / count).tolist()
    moments = (gathered(tally.reconstructions, world), gathered(tally.originals, world)) if "rfid" in metrics else ()
    if not world.main:
        return None
    rfid = {"rfid": frechet_distance(*moments[0].result(), *moments[1].result())} if moments else {}
    return rfid | dict(zip(per_image, means))


@torch.inference_mode()
@matmul_precision("fp32")
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

    def __init__(self, total: int, before: int, world: World):
        self.total, self.before, self.done, self.world, self.said, self.started = total, before, before, world, 0.0, time.perf_counter()
        if world.main and before:
            print(f"evaluate  continues after {min(before, total):,} of {total:,} images", flush=True)

    def add(self, count: int) -> None:
        self.done = min(self.done + count * self.world.size, self.total)
        seconds = time.perf_counter() - self.started
        if self.world.main and (seconds - self.said > 10 or self.done == self.total):
            rate = max(self.done - self.before, 1) / seconds
            print(f"evaluate  {self.done:,}/{self.total:,}  {rate:.0f} img/s  ETA {readable_time((self.total - self.done) / rate)}", flush=True)
            self.said = seconds
