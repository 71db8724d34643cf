"""Encode images into latent shards, with their mirrored twins, labels and statistics. Continues where it stopped."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.config import LightningDiTConfig, given_path
from vavae_fast.errors import BadInput, require

EXAMPLE = "vavae-fast extract --config configs/tokenizer_f16d32.yaml --checkpoint vavae.pt --images imagenet/train --out latents/train"
CONFIG = None  # either kind


def arguments(parser) -> None:
    parser.add_argument("--images", help="images, class folders, .zip, .tar, .parquet or builtin:digits")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of shards")
    parser.add_argument("--checkpoint", metavar="CKPT", help="tokenizer weights; default: the config's")
    parser.add_argument("--seed", type=int, default=0, help="of the posterior's noise (default 0)")
    parser.add_argument("--batch", type=int, default=32, help="images at a time (default 32)")
    parser.add_argument("--shard-size", type=int, default=10_000, help="latents a shard (default 10,000, as the reference)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the stored latents")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="fp32", help="of the encoder (default fp32, as the reference)")
    parser.add_argument("--stats-only", action="store_true", help="only compute latents_stats.pt of the shards in --out")


@dataclass(frozen=True)
class ExtractPlan:
    """A checked extraction; `writer` knows what is there already."""

    images: Any
    tokenizer: Any
    out: Path
    shape: tuple[int, int, int]
    seed: int
    batch: int
    shard_size: int
    dtype: Any
    precision: str
    facts: dict[str, Any]
    done: int

    def describe(self) -> str:
        size = len(self.images) * (2 * self.dtype.itemsize * self.shape[0] * self.shape[1] * self.shape[2] + 8)
        return (
            f"images     {len(self.images):,} of {self.facts['images']}, {len(self.images.classes)} classes\n"
            f"latents    {self.shape}, {self.dtype}\n"
            f"disk       {artifacts.readable_bytes(size)} in {self.out}; {self.done:,} of {len(self.images):,} are there\n"
            "nothing was written"
        )


@dataclass(frozen=True)
class StatisticsPlan:
    """Only the statistics of shards that are there."""

    out: Path

    def describe(self) -> str:
        return f"statistics of the shards in {self.out} -> {self.out / 'latents_stats.pt'}\nnothing was written"


def plan(config: Any, args) -> "ExtractPlan | StatisticsPlan":
    """Flags, images, tokenizer, what is there already."""
    for flag, value in (("--batch", args.batch), ("--shard-size", args.shard_size)):
        require(value > 0, flag, value, "above 0")
    require(args.seed >= 0, "--seed", args.seed, "0 or more")
    artifacts.require_writable(args.out)
    if args.stats_only:
        if not args.out.is_dir():
            raise BadInput(f"{args.out}: no such folder of shards; give it with --out")
        return StatisticsPlan(args.out)
    is_dit = isinstance(config, LightningDiTConfig)
    source = args.images or (config.data.path if is_dit else config.image_path)
    if not (source or "").startswith("builtin:"):
        given_path(source, "--images" if args.images else "data.path", "the folder of images")
    import torch

    from vavae_fast.commands import build

    images = build.images(source, config.data.image_size if is_dit else config.image_size)
    if is_dit and len(images.classes) > config.data.num_classes:
        found = f"{len(images.classes)} class folders, data.num_classes is {config.data.num_classes}"
        raise BadInput(f"{source}: {found}; set data.num_classes={len(images.classes)}")
    tokenizer = build.tokenizer(config, args.checkpoint)
    side = images.size // tokenizer.downsample_ratio
    shape, dtype = (tokenizer.embed_dim, side, side), getattr(torch, args.dtype)
    facts = dict(images=str(source), fingerprint=images.fingerprint(), image_size=images.size, classes=list(images.classes), seed=args.seed,
                 tokenizer=build.weights_digest(tokenizer), precision=args.precision)  # fmt: skip
    done = _writer(args.out, shape, images, args.shard_size, dtype, facts, 0, 1).done
    return ExtractPlan(images, tokenizer, args.out, shape, args.seed, args.batch, args.shard_size, dtype, args.precision, facts, done)


def _writer(out, shape, images, shard_size, dtype, facts, rank, world):
    from vavae_fast.data import LatentWriter

    return LatentWriter(out, shape, len(images), shard_size, dtype, facts, rank, world)


def run(plan: "ExtractPlan | StatisticsPlan") -> Path:
    """Write what is missing; rank 0 adds statistics and manifest at the end."""
    if isinstance(plan, StatisticsPlan):
        from vavae_fast.data import latent_statistics, write_statistics

        print(f"extract  {write_statistics(plan.out, latent_statistics(plan.out))}")
        return plan.out
    from vavae_fast.distributed import open_world

    with open_world() as world:
        writer = _writer(plan.out, plan.shape, plan.images, plan.shard_size, plan.dtype, plan.facts, world.rank, world.size)
        _encode(plan, writer, world)
        world.barrier()
        if world.main:
            writer.close()
            print(f"extract  {len(plan.images):,} images: {plan.out}")
    return plan.out


def _encode(plan: ExtractPlan, writer, world) -> None:
    """This process's images, batch by batch: one posterior sample of each image, and one of its mirror image."""
    import torch

    from vavae_fast import rng
    from vavae_fast.commands import build
    from vavae_fast.pixels import to_unit
    from vavae_fast.training.log import readable_time

    tokenizer = plan.tokenizer.to(world.device)
    bf16 = build.bf16(plan.precision, world.device)

    @torch.inference_mode()
    def sample(pixels, counter):
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            posterior = tokenizer.encode(to_unit(pixels))
        return posterior.sample(noise=rng.normal(plan.seed, counter, like=posterior.mean, stream=rng.Stream.POSTERIOR))

    total, before, done = len(writer.indices), writer.done, writer.done
    started, said = time.perf_counter(), 0.0
    for batch in plan.images.batches(plan.batch, start=before, indices=writer.indices, border=plan.shard_size):
        pixels, index = batch.pixels.to(world.device), batch.index.to(world.device)
        writer.append(sample(pixels, 2 * index), sample(pixels.flip(-1), 2 * index + 1), batch.labels.clamp_min(0))
        done += len(index)
        seconds = time.perf_counter() - started
        if world.main and (seconds - said > 10 or done == total):
            rate = (done - before) / seconds
            print(f"extract  {done:,}/{total:,}  {rate:.0f} img/s  ETA {readable_time((total - done) / rate)}", flush=True)
            said = seconds
