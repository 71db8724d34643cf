"""Draw images from a trained LightningDiT: samples.npz, samples.png, manifest.json. Continues where it stopped."""

import shutil
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.commands.networks import Networks, load_networks, precision_of, predictor_of, sampler_settings
from vavae_fast.config import SAMPLE_PRESETS, LightningDiTConfig, run_folder
from vavae_fast.errors import BadInput, require

EXAMPLE = "vavae-fast sample --config configs/lightningdit_xl_64ep.yaml --preset paper-64ep --checkpoint lightningdit.pt --num 64 --out samples"
CONFIG = LightningDiTConfig

GRID_IMAGES = 100  # in samples.png, at most
_WRITES_AHEAD = 2  # batches that wait to be written while the next are drawn
_PNG_THREADS = 8  # that compress one batch


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="CKPT", help="LightningDiT: run folder, checkpoint folder, .pt or .safetensors; default: ckpt_path")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of a checkpoint of ours")
    parser.add_argument("--preset", choices=tuple(SAMPLE_PRESETS), help="published settings, in place of the config's sample keys")
    parser.add_argument("--num", type=int, metavar="N", help="how many images; default: sample.fid_num")
    parser.add_argument("--labels", metavar="L,L,…", help="classes as numbers, repeated in this order; default: sample.labels")
    parser.add_argument("--seed", type=int, help="default: train.global_seed; image i depends on (seed, i) alone")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: <run folder>/samples-<settings>")
    parser.add_argument("--fused", action="store_true", help="run the fused operators (= train.fused=true)")
    parser.add_argument("--png", action="store_true", help="also write every image as PNG")


@dataclass(frozen=True)
class SamplePlan:
    """A checked draw."""

    config: LightningDiTConfig
    out: Path
    num: int
    seed: int
    labels: Any  # (num,) int64 array
    png: bool
    networks: Networks
    facts: dict[str, Any]  # into manifest.json: what the images are a function of

    def describe(self) -> str:
        width = max(map(len, self.facts)) + 1
        lines = "\n".join(f"{key:<{width}}{value}" for key, value in self.facts.items())
        disk = self.num * 3 * self.config.data.image_size**2
        return f"{lines}\n{'out':<{width}}{self.out}, at most {2 * disk / 1e6:.0f} MB while it is written\nnothing was written"


def plan(config: LightningDiTConfig, args: Namespace) -> SamplePlan:
    """Numbers first, then the checkpoint, then the tokenizer."""
    if args.preset:
        config = replace(config, sample=replace(config.sample, **SAMPLE_PRESETS[args.preset]))
    if args.fused:
        config = replace(config, train=replace(config.train, fused=True))
    num = config.sample.fid_num if args.num is None else args.num
    require(num > 0, "--num", num, "above 0")
    seed = config.train.global_seed if args.seed is None else args.seed
    require(seed >= 0, "--seed", seed, "0 or more")
    given = None if args.labels is None else label_list(args.labels, config.data.num_classes)
    out = args.out or run_folder(config, args.config) / f"samples-cfg{config.sample.cfg_scale:g}-seed{seed}"
    artifacts.require_writable(out)
    artifacts.require_space(out, 2 * num * 3 * config.data.image_size**2)
    networks = load_networks(config, args.checkpoint, args.weights)
    facts = dict(num=num, seed=seed, labels=args.labels or config.sample.labels, preset=args.preset) | networks.facts
    plan = SamplePlan(config, out, num, seed, _labels(config, num, seed, given), args.png, networks, facts)
    _require_same_draw(plan)
    return plan


def label_list(text: str, classes: int, flag: str = "--labels") -> list[int]:
    """"207,88" -> [207, 88], each in [0, classes)."""
    labels = []
    for word in text.split(","):
        if not word.strip().lstrip("-").isdigit():
            found = f"{word.strip()!r} is no class number"
            raise BadInput(f"{flag}: {found}; give numbers from 0 to {classes - 1}, in the sorted order of the class folders")
        labels.append(int(word))
        require(0 <= labels[-1] < classes, flag, labels[-1], f"in 0 to {classes - 1} (data.num_classes is {classes})")
    return labels


def _labels(config: LightningDiTConfig, num: int, seed: int, given: list[int] | None):
    """(num,) int64: the given ones in turn, or each class in turn, or drawn by (seed, i)."""
    import numpy as np
    import torch

    from vavae_fast import rng

    index = np.arange(num)
    if given is not None:
        return np.array(given, np.int64)[index % len(given)]
    if config.sample.labels == "balanced":
        return index % config.data.num_classes
    return rng.integers(seed, torch.from_numpy(index), config.data.num_classes, rng.Stream.LABEL).numpy()


def _require_same_draw(plan: SamplePlan) -> None:
    """A folder that holds another draw, finished or not, is not overwritten."""
    for name in ("manifest.json", "parts/manifest.json"):
        held = artifacts.read_json(plan.out / name) if (plan.out / name).is_file() else None
        if held and held.get("facts") != _jsonable(plan.facts):
            raise BadInput(f"{plan.out}: holds samples of other settings; choose another --out, or remove it")
        for key, value in _begun_with(plan).items() if held else ():
            if held.get(key, value) != value:
                raise BadInput(f"{plan.out}: was begun with sample.{key}={held[key]}; continue with that, or choose another --out")


def _begun_with(plan: SamplePlan) -> dict[str, Any]:
    """Of a draw that is not finished: what all its parts have in common beside the facts. `precision` is what auto means on this device."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return dict(per_proc_batch_size=plan.config.sample.per_proc_batch_size, precision=precision_of(plan.config, device))


def _jsonable(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value))


def run(plan: SamplePlan) -> Path:
    """`draw`, by all processes of the launcher."""
    from vavae_fast.distributed import open_world

    with open_world() as world:
        draw(plan, world)
    return plan.out


def draw(plan: SamplePlan, world: Any) -> None:
    """Draw what is missing, batch by batch, each process its share; the main one puts the parts together. All must call."""
    if (plan.out / "manifest.json").is_file():
        if world.main:
            _finish(plan)
        return
    if world.main:
        (plan.out / "parts").mkdir(parents=True, exist_ok=True)
        artifacts.write_json(plan.out / "parts" / "manifest.json", dict(facts=plan.facts, **_begun_with(plan)))
    world.barrier()
    _draw_share(plan, world)
    world.barrier()
    if world.main:
        _assemble(plan, world)


def _finish(plan: SamplePlan) -> None:
    """A draw that is complete lacks at most its single images."""
    if plan.png:
        from vavae_fast.evaluation import NpzImages

        first = 0
        for images in NpzImages(plan.out / "samples.npz"):
            _write_pngs(plan, first, images.permute(0, 2, 3, 1).numpy())
            first += len(images)
    print(f"{plan.out.name}  {plan.out}: already complete")


def _part(plan: SamplePlan, first: int) -> Path:
    return plan.out / "parts" / f"{first:08d}.npz"


def _draw_share(plan: SamplePlan, world) -> None:
    """This process's batches: every world-th one that is not on disk yet. One is written while the next is drawn."""
    import torch

    from vavae_fast.flow.generate import LatentScale, generate_images, generate_latents
    from vavae_fast.models.inference import decoder, matmul_precision

    config, size, device = plan.config, plan.config.sample.per_proc_batch_size, world.device
    firsts = range(0, plan.num, size)[world.rank :: world.size]
    missing = [first for first in firsts if not _part(plan, first).is_file()]
    if not missing:
        return
    wanted = torch.tensor([i for first in missing for i in range(first, min(first + size, plan.num))], dtype=torch.int64)
    precision = precision_of(config, device)
    predict, guide = (predictor_of(config, model, precision, device) for model in (plan.networks.model, plan.networks.guide))
    mean, std = (s.to(device) for s in plan.networks.stats)
    latents = generate_latents(
        predict, torch.from_numpy(plan.labels).to(device), (config.model.in_chans, config.latent_size, config.latent_size),
        sampler_settings(config.sample), seed=plan.seed, null_label=config.data.num_classes, transport=plan.networks.transport, batch_size=size,
        indices=wanted, guide=guide, whole_batches=device.type == "cuda",
    )  # fmt: skip
    images = generate_images(latents, decoder(plan.networks.tokenizer, device, precision), LatentScale(mean, std, config.data.latent_multiplier))
    with matmul_precision(precision):
        _write(plan, images, len(wanted), say=world.main)


def _write(plan: SamplePlan, batches: Iterator[tuple[Any, Any]], count: int, say: bool) -> None:
    """Batches of `count` images in all into parts, in a thread; the thread's errors are raised here."""
    import time

    from vavae_fast.training.log import readable_time

    started, said, written = time.perf_counter(), 0.0, 0
    pending: deque[Future[int]] = deque()

    def finish() -> None:
        nonlocal said, written
        written += pending.popleft().result()
        now = time.perf_counter() - started
        if say and (now - said > 10 or written == count):
            left = (count - written) * now / written
            print(f"{plan.out.name}  {written}/{count}  {written / now:.1f} img/s  ETA {readable_time(left)}", flush=True)
            said = now

    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        for index, images in batches:
            pending.append(writer.submit(_write_part, plan, int(index[0]), images.permute(0, 2, 3, 1).numpy()))
            while len(pending) > _WRITES_AHEAD:
                finish()
        while pending:
            finish()


def _write_part(plan: SamplePlan, first: int, images: Any) -> int:
    """Images `first`, first + 1, … (n, H, W, 3) uint8; returns n. The PNGs go first: a part that is there has its PNGs."""
    import numpy as np

    if plan.png:
        _write_pngs(plan, first, images)
    with artifacts.replacing(_part(plan, first)) as temporary, open(temporary, "wb") as file:
        np.savez(file, images)  # its archive has a checksum
    return len(images)


def _batches(plan: SamplePlan) -> Iterator[tuple[int, Any]]:
    """(index of the first, images) of each part."""
    from vavae_fast.evaluation import NpzImages

    size, pixels = plan.config.sample.per_proc_batch_size, plan.config.data.image_size
    for first in range(0, plan.num, size):
        path, count = _part(plan, first), min(size, plan.num - first)
        try:
            images = _array_of(NpzImages(path, count), (count, pixels, pixels, 3))
        except BadInput as error:
            why, remove = str(error).rsplit(";", 1)[0], f"remove {path}: " if path.exists() else ""
            raise BadInput(f"{why}; {remove}the same command draws it again") from None
        yield first, images


def _array_of(images: Any, shape: tuple[int, ...]) -> Any:
    """`NpzImages` of a shape that is known -> uint8 array (N, H, W, 3)."""
    import torch

    if images.shape != shape:
        raise BadInput(f"{images.path}: images {images.shape}, expected {shape}; it is another draw's")
    return torch.cat(list(images)).permute(0, 2, 3, 1).numpy()


def _assemble(plan: SamplePlan, world) -> None:
    """Parts -> samples.npz and samples.png, then manifest.json: with it the draw is complete. Parts go last."""
    import numpy as np

    from vavae_fast.pixels import image_grid

    size = plan.config.data.image_size
    write_samples(plan.out / "samples.npz", (plan.num, size, size, 3), (images for _, images in _batches(plan)), plan.labels)
    shown = []
    for first, images in _batches(plan):
        shown.extend(images[: GRID_IMAGES - len(shown)])
        if plan.png:  # of parts that were drawn before PNGs were asked for
            _write_pngs(plan, first, images)
        elif len(shown) == GRID_IMAGES:
            break
    with artifacts.replacing(plan.out / "samples.png") as temporary:
        image_grid(np.stack(shown)).save(temporary, format="PNG")
    made = artifacts.manifest("samples", facts=plan.facts, run=_how(plan, world), sha256=artifacts.sha256(plan.out / "samples.npz"))
    artifacts.write_json(plan.out / "manifest.json", made)
    shutil.rmtree(plan.out / "parts")
    print(f"{plan.out.name}  {plan.num} images: {plan.out}")


def _how(plan: SamplePlan, world) -> dict[str, Any]:
    """What images depend on only to rounding."""
    import torch

    s, cuda = plan.config.sample, world.device.type == "cuda"
    return dict(batch=s.per_proc_batch_size, precision=precision_of(plan.config, world.device), fused=plan.config.train.fused, compile=s.compile,
                processes=world.size, device=torch.cuda.get_device_name(world.device) if cuda else "cpu")  # fmt: skip


def write_samples(path: Path, shape: tuple[int, ...], batches: Iterator[Any], labels: Any) -> None:
    """An .npz with arr_0 (uint8 NHWC) and arr_1 (int64), written batch by batch so that it may be larger than memory."""
    import zipfile

    import numpy as np

    with artifacts.replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, dict(descr="|u1", fortran_order=False, shape=shape))
            for batch in batches:
                member.write(batch.tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, labels, allow_pickle=False)


def _write_pngs(plan: SamplePlan, first: int, images: Any) -> None:
    """Those that are not there yet, by several threads: one compresses fewer images a second than a small LightningDiT draws."""
    from PIL import Image

    def write(index: int, image: Any) -> None:
        path = plan.out / "png" / f"{index:06d}.png"
        if not path.is_file():
            with artifacts.replacing(path) as temporary:
                Image.fromarray(image).save(temporary, format="PNG")

    with ThreadPoolExecutor(_PNG_THREADS, thread_name_prefix="png") as pool:
        for _ in pool.map(write, range(first, first + len(images)), images):  # their errors are raised here
            pass
