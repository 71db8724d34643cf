"""Encode images into latent shards, with their mirrored twins, labels and statistics. Continues where it stopped."""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.commands.run_lock import locked
from vavae_fast.config import LightningDiTConfig, given_images, world_size
from vavae_fast.errors import BadInput, Interrupted, require

EXAMPLE = "vavae-fast extract --config configs/tokenizer_f16d32.yaml --checkpoint vavae.pt --images imagenet/train --out latents/train"
CONFIG = None  # either kind

POSTERIORS = ("sample", "mean", "mean+std")
_QUIET_SECONDS = 10.0  # from one progress line to the next


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--images", help="images, class folders, .zip, .tar, .parquet or builtin:digits")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of shards")
    parser.add_argument("--checkpoint", metavar="CKPT", help="tokenizer weights; default: the config's")
    parser.add_argument("--backend", choices=("auto", "pil", "fast", "dali"), default="auto", help="what decodes and cuts; dali: on the GPU")
    parser.add_argument("--posterior", choices=POSTERIORS, default="sample", help="what is stored (default: one sample, as the reference)")
    parser.add_argument("--seed", type=int, default=0, help="of the posterior's noise (default 0)")
    parser.add_argument("--batch", type=int, default=32, help="images at a time (default 32)")
    parser.add_argument("--shard-size", type=int, default=10_000, help="latents a shard (default 10,000, as the reference)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the stored latents")
    parser.add_argument("--precision", choices=("auto", "bf16", "tf32", "fp32"), default="tf32",
                        help="of the encoder; auto: bf16 on a GPU (default tf32, as the reference; on a CPU that is fp32)")  # fmt: skip
    parser.add_argument("--fused", action="store_true", help="run the fused operators (= train.fused=true)")
    parser.add_argument("--stats-only", action="store_true", help="only compute latents_stats.pt of the shards in --out")
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: plan for N processes")


@dataclass(frozen=True)
class ExtractPlan:
    """A checked extraction; `writer` knows what is there already."""

    images: Any
    tokenizer: Any
    writer: Any
    posterior: str
    seed: int
    batch: int
    precision: str  # bf16, tf32 or fp32
    processes: int

    def describe(self) -> str:
        from vavae_fast.data.latent_writer import WAITING_BYTES

        writer, size, missing = self.writer, artifacts.readable_bytes, self.writer.count - self.writer.done
        longest = writer.todo[:: self.processes]
        share = sum(map(writer.rows, longest))
        parameters, flops, activations = _cost(self.tokenizer, self.images.size, self.batch, 2 if self.precision == "bf16" else 4)
        pixels, waiting = 3 * self.images.size**2 * 3 * self.batch, min(WAITING_BYTES, share * writer.row_bytes)
        lines = dict(
            images=f"{len(self.images):,} of {self.images.path}, {len(self.images.classes):,} classes, decoding: {self.images.backend}",
            latents=f"{writer.shape}, {writer.dtype}, {self.posterior} of the posterior, of each image and its mirror image",
            shards=f"{writer.shards:,} of at most {writer.shard_size:,} rows; {writer.done:,} of {writer.count:,} are there",
            work=f"{missing:,} images, {len(writer.todo):,} shards; by {self.processes} processes at most {share:,}, {len(longest):,} each",
            disk=f"{size(writer.count * writer.row_bytes)} in {writer.folder}, {size(missing * writer.row_bytes)} of them to be written",
            encoder=f"{parameters / 1e6:.1f} M parameters, 2 x {flops / 1e9:.1f} GFLOP an image, {self.precision}",
            memory=f"a process: about {size(activations)} of activations, {size(pixels)} of pixels, {size(waiting)} of latents before the disk",
        )
        return "\n".join(f"{key:<11}{line}" for key, line in lines.items()) + "\nnothing was written"


def _cost(tokenizer: Any, size: int, batch: int, item_bytes: int) -> tuple[int, int, int]:
    """The encoder's parameters, FLOPs of an image, and bytes of activations at their most.

    They are five maps of the widest level, as PyTorch allocates them for a residual block: x, h, and three on the way to the next.
    """
    import copy

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    on_meta = copy.deepcopy(tokenizer).to("meta")
    with FlopCounterMode(display=False) as counter:
        on_meta.encode(torch.empty(1, 3, size, size, device="meta"))
    parameters = sum(p.numel() for module in (tokenizer.encoder, tokenizer.quant_conv) for p in module.parameters())
    widest = max(level.block[0].conv1.out_channels * (size >> depth) ** 2 for depth, level in enumerate(tokenizer.encoder.down))
    return parameters, counter.get_total_flops(), 5 * batch * widest * item_bytes


@dataclass(frozen=True)
class StatisticsPlan:
    """Only the statistics of shards that are there."""

    out: Path

    def describe(self) -> str:
        return f"statistics of the shards in {self.out} -> {self.out / 'latents_stats.pt'}\nnothing was written"


def plan(config: Any, args: Namespace) -> "ExtractPlan | StatisticsPlan":
    """Flags, images, tokenizer, what is there already."""
    for flag, value in (("--batch", args.batch), ("--shard-size", args.shard_size)):
        require(value > 0, flag, value, "above 0")
    require(args.seed >= 0, "--seed", args.seed, "0 or more")
    processes = args.world_size
    require(processes is None or args.dry_run and processes > 0, "--world-size", processes, "above 0, with --dry-run; torchrun sets it otherwise")
    artifacts.require_writable(args.out)
    if args.stats_only:
        if not args.out.is_dir():
            raise BadInput(f"{args.out}: no such folder of shards; give it with --out")
        return StatisticsPlan(args.out)
    if args.fused:
        config = replace(config, train=replace(config.train, fused=True))
    is_dit = isinstance(config, LightningDiTConfig)
    source = args.images or (config.data.path if is_dit else config.image_path)
    given_images(source, "--images" if args.images else "data.path", "the folder of images")
    import torch

    from vavae_fast.commands import build
    from vavae_fast.data import LatentWriter

    images = build.images(source, config.data.image_size if is_dit else config.image_size, backend=args.backend)
    if is_dit and len(images.classes) > config.data.num_classes:
        found = f"{len(images.classes)} class folders, data.num_classes is {config.data.num_classes}"
        raise BadInput(f"{source}: {found}; set data.num_classes={len(images.classes)}")
    _check_labels(images)
    tokenizer = build.tokenizer(config, args.checkpoint)
    ratio = tokenizer.downsample_ratio
    require(images.size % ratio == 0, "data.image_size", images.size, f"a multiple of {ratio}, by which the tokenizer downsamples")
    on_gpu = torch.cuda.is_available()
    precision = {"auto": "bf16" if on_gpu else "fp32", "tf32": "tf32" if on_gpu else "fp32"}.get(args.precision, args.precision)
    facts = dict(images=str(source), fingerprint=images.fingerprint(), image_size=images.size, classes=list(images.classes), seed=args.seed,
                 decoder="dali on a GPU" if args.backend == "dali" and on_gpu else "pillow's bits",
                 tokenizer=build.weights_digest(tokenizer), precision=precision, posterior=args.posterior)  # fmt: skip
    shape, dtype = (tokenizer.embed_dim, images.size // ratio, images.size // ratio), getattr(torch, args.dtype)
    writer = LatentWriter(args.out, shape, len(images), args.shard_size, dtype, facts, args.posterior == "mean+std", images.names)
    return ExtractPlan(images, tokenizer, writer, args.posterior, args.seed, args.batch, precision, processes or world_size())


def _check_labels(images: Any) -> None:
    """`BadInput` where only some images have a class: without any, all are of class 0."""
    if len(images.classes) > 1 and int(images.labels.min()) < 0:
        lost = (images.labels < 0).nonzero().flatten().tolist()
        found = f"{images.path}/{images.names[lost[0]]}: has no class, as {len(lost):,} of {len(images):,} images"
        raise BadInput(f"{found}, and the others have; give it one, or remove it")


def run(plan: "ExtractPlan | StatisticsPlan") -> Path:
    """Write what is missing; rank 0 adds statistics and manifest at the end. `Interrupted` after a signal."""
    if isinstance(plan, StatisticsPlan):
        from vavae_fast.data import latent_statistics, write_statistics

        print(f"extract  {write_statistics(plan.out, latent_statistics(plan.out))}")
        return plan.out
    from vavae_fast.distributed import open_world
    from vavae_fast.models.inference import matmul_precision
    from vavae_fast.training.loop import StopSignal

    writer, out = plan.writer, plan.writer.folder
    with open_world() as world, locked(out, "choose another --out") if world.main else nullcontext(), StopSignal() as stop:
        plan.images.device = world.device
        plan.images.threads = max(1, plan.images.threads // world.local_size)  # of the node's cores
        if world.main:
            writer.sweep()
        shards = world.from_main(writer.todo)  # what main found: others might see shards that it has written since
        shares = [shards[rank :: world.size] for rank in range(world.size)]
        writer.take(shares[world.rank])
        with writer, matmul_precision(plan.precision):
            encoded = _encode(plan, shares, world, stop)
            hashes = writer.finish() if encoded else None
        hashes = world.gathered(hashes)
        if not encoded:
            if world.main:
                there, why = sum(path.is_file() for path in map(writer.path, range(writer.shards))), stop.name or "another process was stopped"
                print(f"extract  {why}: {there:,} of {writer.shards:,} shards are in {out}; the same command continues")
            raise Interrupted(f"{out}: stopped")
        if world.main:
            writer.close({number: digest for part in hashes for number, digest in part.items()})
            print(f"extract  {len(plan.images):,} images: {out}")
        world.barrier()  # until main has closed, a signal to any process ends none
    return out


def _encode(plan: ExtractPlan, shares: list[list[int]], world: Any, stop: Any) -> bool:
    """This process's images, batch by batch, into the writer; all processes keep step. False when a signal came to any of them."""
    writer, data, disk = plan.writer, _Seconds(), _Seconds()
    sizes = [_batch_sizes(writer, share, plan.batch) for share in shares]
    encoded = accumulate(sum(step) for step in zip_longest(*sizes, fillvalue=0))  # by all processes, after each batch
    total, started = writer.count - writer.done, time.perf_counter()
    said = started
    with closing(plan.images.batches(plan.batch, indices=writer.indices, border=writer.shard_size)) as batches:
        rows = _host_rows(batches, _Encoder(plan, world.device), data)
        for done in encoded:
            batch = next(rows, None)  # another process may have more
            if batch is not None:
                with disk:
                    writer.append(**batch)
            if world.any(stop.name is not None):
                return False
            now = time.perf_counter()
            if world.main and (now - said > _QUIET_SECONDS or done == total):
                print(_progress_line(writer.done + done, writer.count, done / (now - started), (total - done) * (now - started) / done,
                                     data.total / (now - started), disk.total / (now - started)), flush=True)  # fmt: skip
                said = now
    return True


def _batch_sizes(writer: Any, shards: list[int], batch: int) -> list[int]:
    """As `Images.batches` cuts them at the borders of shards."""
    return [min(batch, writer.rows(number) - first) for number in shards for first in range(0, writer.rows(number), batch)]


def _progress_line(done: int, count: int, rate: float, seconds_left: float, data: float, disk: float) -> str:
    """`extract  320,000/1,281,167  5210 img/s  data 3%  disk 0%  ETA 3 m`; data, disk: share of the time spent waiting for them."""
    from vavae_fast.training.log import readable_time

    return f"extract  {done:,}/{count:,}  {rate:.0f} img/s  data {100 * data:.0f}%  disk {100 * disk:.0f}%  ETA {readable_time(seconds_left)}"


class _Seconds:
    """The time spent inside `with`, added up."""

    total = 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.total += time.perf_counter() - self._entered


def _host_rows(batches: Iterator[Any], encode: "_Encoder", data: _Seconds) -> Iterator[dict[str, Any]]:
    """What `LatentWriter.append` takes, of every batch; one batch behind, so that a GPU has the next when it is done with one."""
    before = None
    while True:
        with data:
            batch = next(batches, None)
        rows = encode(batch) if batch is not None else None
        if before is not None:
            yield before()
        if rows is None:
            return
        before = rows


class _Encoder:
    """batch -> a function that waits for its rows in host memory. Copies to and fro overlap with the encoding of other batches."""

    def __init__(self, plan: ExtractPlan, device: Any):
        import torch

        from vavae_fast.models.inference import round_weights

        self.tokenizer = plan.tokenizer.to(device, memory_format=torch.channels_last)
        if plan.precision == "bf16":
            round_weights(self.tokenizer)
        self.plan, self.device = plan, device
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Any) -> Callable[[], dict[str, Any]]:
        import torch

        with torch.inference_mode():
            pixels, index = self._sent(batch.pixels), self._sent(batch.index)
            rows = {}
            for mirrored, key in enumerate(("latents", "latents_flip")):
                rows |= self._encoded(key, pixels.flip(-1) if mirrored else pixels, 2 * index + mirrored)
            rows = {key: tensor.to(self.plan.writer.dtype).to("cpu", non_blocking=True) for key, tensor in rows.items()}  # into pinned memory
        rows["labels"] = batch.labels.clamp_min(0)
        if self.copies is None:
            return lambda: rows
        done = torch.cuda.current_stream().record_event()
        return lambda: done.synchronize() or rows

    def _sent(self, tensor: Any) -> Any:
        """On the device, where DALI may have put it; to a GPU copied while the batch before is being encoded."""
        import torch

        if tensor.device == self.device:
            return tensor
        with torch.cuda.stream(self.copies):
            sent = tensor.pin_memory().to(self.device, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self.copies)
        sent.record_stream(torch.cuda.current_stream())
        return sent

    def _encoded(self, key: str, pixels: Any, counter: Any) -> dict[str, Any]:
        """What is stored of the posterior, under `key`; a sample is a function of (seed, counter)."""
        import torch

        from vavae_fast import rng
        from vavae_fast.pixels import to_unit

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16"):
            posterior = self.tokenizer.encode(to_unit(pixels).contiguous(memory_format=torch.channels_last))
        if self.plan.posterior == "sample":
            noise = rng.normal(self.plan.seed, counter, like=posterior.mean, stream=rng.Stream.POSTERIOR)
            return {key: posterior.sample(noise=noise)}
        return {key: posterior.mean} | ({f"{key}_std": posterior.std} if self.plan.posterior == "mean+std" else {})
