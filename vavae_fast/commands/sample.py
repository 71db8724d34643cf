"""Draw images from a trained LightningDiT: samples.npz, samples.png, manifest.json. Continues where it stopped."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.config import SAMPLE_PRESETS, LightningDiTConfig, SampleConfig, given_path, run_folder
from vavae_fast.errors import BadInput, require

EXAMPLE = "vavae-fast sample --config configs/lightningdit_xl_64ep.yaml --preset paper-64ep --checkpoint lightningdit.pt --num 64 --out samples"
CONFIG = LightningDiTConfig

GRID_IMAGES = 100  # in samples.png, at most


def arguments(parser) -> None:
    parser.add_argument("--checkpoint", metavar="CKPT", help="LightningDiT: run folder, checkpoint folder, .pt or .safetensors; default: ckpt_path")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of a checkpoint of ours")
    parser.add_argument("--preset", choices=tuple(SAMPLE_PRESETS), help="published settings, in place of the config's sample keys")
    parser.add_argument("--num", type=int, metavar="N", help="how many images; default: sample.fid_num")
    parser.add_argument("--labels", metavar="L,L,…", help="classes as numbers, repeated in this order; default: sample.labels")
    parser.add_argument("--seed", type=int, help="default: train.global_seed; image i depends on (seed, i) alone")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: <run folder>/samples-<settings>")
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
    model: Any
    tokenizer: Any
    transport: Any
    stats: Any  # (mean, std), each (1, C, 1, 1)
    facts: dict[str, Any]  # into manifest.json: what the images are a function of

    def describe(self) -> str:
        lines = "\n".join(f"{key:<11}{value}" for key, value in self.facts.items())
        disk = self.num * 3 * self.config.data.image_size**2
        return f"{lines}\nout        {self.out}, at most {2 * disk / 1e6:.0f} MB while it is written\nnothing was written"


def plan(config: LightningDiTConfig, args) -> SamplePlan:
    """Numbers first, then the checkpoint, then the tokenizer."""
    if args.preset:
        config = replace(config, sample=replace(config.sample, **SAMPLE_PRESETS[args.preset]))
    num = config.sample.fid_num if args.num is None else args.num
    require(num > 0, "--num", num, "above 0")
    seed = config.train.global_seed if args.seed is None else args.seed
    require(seed >= 0, "--seed", seed, "0 or more")
    given = None if args.labels is None else _label_list(args.labels, config.data.num_classes)
    out = args.out or run_folder(config, args.config) / f"samples-cfg{config.sample.cfg_scale:g}-seed{seed}"
    artifacts.require_writable(out)
    artifacts.require_space(out, 2 * num * 3 * config.data.image_size**2)
    settings = sampler_settings(config.sample)
    guidable = config.model.class_dropout_prob > 0 or config.sample.cfg_scale <= 1
    require(guidable, "sample.cfg_scale", config.sample.cfg_scale, "1 for a model without a null class (model.class_dropout_prob is 0)")
    given_path(args.checkpoint or config.ckpt_path, "--checkpoint" if args.checkpoint else "ckpt_path", "the LightningDiT weights")

    from vavae_fast.commands import build

    transport = build.transport(config.transport, config.train.fused)
    model, identity = build.trained_lightningdit(config, args.checkpoint, args.weights)
    tokenizer = build.tokenizer(config)
    stats = _latent_statistics(config)
    facts = dict(
        num=num, seed=seed, labels=args.labels or config.sample.labels, sampler=asdict(settings), precision=config.sample.precision,
        preset=args.preset, checkpoint=identity, tokenizer=config.vae.ckpt_path, image_size=config.data.image_size,
        latent_norm=config.data.latent_norm, latent_multiplier=config.data.latent_multiplier, transport=asdict(config.transport),
    )  # fmt: skip
    plan = SamplePlan(config, out, num, seed, _labels(config, num, seed, given), args.png, model, tokenizer, transport, stats, facts)
    _require_same_draw(plan)
    return plan


def _label_list(text: str, classes: int) -> list[int]:
    labels = []
    for word in text.split(","):
        if not word.strip().lstrip("-").isdigit():
            found = f"{word.strip()!r} is no class number"
            raise BadInput(f"--labels: {found}; give numbers from 0 to {classes - 1}, in the sorted order of the class folders")
        labels.append(int(word))
        require(0 <= labels[-1] < classes, "--labels", labels[-1], f"in 0 to {classes - 1} (data.num_classes is {classes})")
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


def _latent_statistics(config: LightningDiTConfig):
    """Mean and standard deviation that undo the normalisation of training: latents_stats.pt in data.data_path, or beside it."""
    import torch

    if not config.data.latent_norm:
        return torch.zeros(1, config.model.in_chans, 1, 1), torch.ones(1, config.model.in_chans, 1, 1)
    from vavae_fast.data.latents import read_statistics

    folder = given_path(config.data.data_path, "data.data_path", "the folder that holds latents_stats.pt")
    return read_statistics(folder / "latents_stats.pt", config.model.in_chans)


def sampler_settings(s: SampleConfig):
    """sample.* as the sampler takes them; checks method, form and interval."""
    from vavae_fast.flow.generate import SamplerSettings

    return SamplerSettings(
        mode=s.mode, method=s.sampling_method, num_steps=s.num_sampling_steps, shift=s.timestep_shift, cfg_scale=max(s.cfg_scale, 1.0),
        cfg_interval_start=s.cfg_interval_start, cfg_interval_end=s.cfg_interval_end, cfg_channels=s.cfg_channels, atol=s.atol, rtol=s.rtol,
        error_norm=s.error_norm, diffusion_form=s.diffusion_form, diffusion_norm=s.diffusion_norm, last_step=s.last_step,
        last_step_size=s.last_step_size,
    )  # fmt: skip


def _require_same_draw(plan: SamplePlan) -> None:
    """A folder that holds another draw, finished or not, is not overwritten."""
    for name in ("manifest.json", "parts/manifest.json"):
        held = artifacts.read_json(plan.out / name) if (plan.out / name).is_file() else None
        if held and held.get("facts") != _jsonable(plan.facts):
            raise BadInput(f"{plan.out}: holds samples of other settings; choose another --out, or remove it")
        if held and held.get("batch", plan.config.sample.per_proc_batch_size) != plan.config.sample.per_proc_batch_size:
            raise BadInput(f"{plan.out}: was begun with sample.per_proc_batch_size={held['batch']}; continue with that, or choose another --out")


def _jsonable(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value))


def run(plan: SamplePlan) -> Path:
    """Draw what is missing, batch by batch; the last process to finish puts the parts together."""
    from vavae_fast.distributed import open_world

    if (plan.out / "manifest.json").is_file():
        print(f"{plan.out.name}  {plan.out}: already complete")
        return plan.out
    with open_world() as world:
        if world.main:
            (plan.out / "parts").mkdir(parents=True, exist_ok=True)
            artifacts.write_json(plan.out / "parts" / "manifest.json", dict(facts=plan.facts, batch=plan.config.sample.per_proc_batch_size))
        world.barrier()
        _draw(plan, world)
        world.barrier()
        if world.main:
            _assemble(plan)
    return plan.out


def _part(plan: SamplePlan, first: int) -> Path:
    return plan.out / "parts" / f"{first:08d}.npy"


def _draw(plan: SamplePlan, world) -> None:
    """This process's batches: every world-th one that is not on disk yet."""
    import time

    import numpy as np
    import torch

    from vavae_fast.commands import build
    from vavae_fast.flow.generate import LatentScale, generate_images, generate_latents
    from vavae_fast.training.log import readable_time

    config, size = plan.config, plan.config.sample.per_proc_batch_size
    firsts = range(0, plan.num, size)[world.rank :: world.size]
    missing = [first for first in firsts if not _part(plan, first).is_file()]
    wanted = torch.tensor([i for first in missing for i in range(first, min(first + size, plan.num))], dtype=torch.int64)
    model, tokenizer = plan.model.to(world.device), plan.tokenizer.to(world.device)
    mean, std = (s.to(world.device) for s in plan.stats)
    bf16 = build.bf16(config.sample.precision, world.device)

    def predict(x, t, y):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return model(x, t, y).float()

    def decode(z):
        with torch.autocast(z.device.type, torch.bfloat16, enabled=bf16):
            return tokenizer.decode(z).float()

    latents = generate_latents(
        predict, torch.from_numpy(plan.labels).to(world.device), (config.model.in_chans, config.latent_size, config.latent_size),
        sampler_settings(config.sample), seed=plan.seed, null_label=config.data.num_classes,
        transport=plan.transport, batch_size=size, indices=wanted,
    )  # fmt: skip
    started, drawn, said = time.perf_counter(), 0, 0.0
    for index, images in generate_images(latents, decode, LatentScale(mean, std, config.data.latent_multiplier)):
        with artifacts.replacing(_part(plan, int(index[0]))) as temporary, open(temporary, "wb") as file:
            np.save(file, images.permute(0, 2, 3, 1).cpu().numpy())
        drawn += len(index)
        now = time.perf_counter() - started
        if world.main and (now - said > 10 or drawn == len(wanted)):
            left = (len(wanted) - drawn) * now / drawn
            print(f"{plan.out.name}  {drawn}/{len(wanted)}  {drawn / now:.1f} img/s  ETA {readable_time(left)}", flush=True)
            said = now


def _batches(plan: SamplePlan) -> Iterator[Any]:
    import numpy as np

    for first in range(0, plan.num, plan.config.sample.per_proc_batch_size):
        yield np.load(_part(plan, first), allow_pickle=False)


def _assemble(plan: SamplePlan) -> None:
    """Parts -> samples.npz and samples.png, then manifest.json: with it the draw is complete. Parts go last."""
    import numpy as np

    from vavae_fast.pixels import image_grid

    size = plan.config.data.image_size
    write_samples(plan.out / "samples.npz", (plan.num, size, size, 3), _batches(plan), plan.labels)
    first = []
    for batch in _batches(plan):
        first.extend(batch[: GRID_IMAGES - len(first)])
        if len(first) == GRID_IMAGES:
            break
    with artifacts.replacing(plan.out / "samples.png") as temporary:
        image_grid(np.stack(first)).save(temporary, format="PNG")
    if plan.png:
        _write_pngs(plan)
    facts = artifacts.manifest("samples", facts=plan.facts, sha256=artifacts.sha256(plan.out / "samples.npz"))
    artifacts.write_json(plan.out / "manifest.json", facts)
    shutil.rmtree(plan.out / "parts")
    print(f"{plan.out.name}  {plan.num} images: {plan.out}")


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


def _write_pngs(plan: SamplePlan) -> None:
    from PIL import Image

    index = 0
    for batch in _batches(plan):
        for image in batch:
            with artifacts.replacing(plan.out / "png" / f"{index:06d}.png") as temporary:
                Image.fromarray(image).save(temporary, format="PNG")
            index += 1
