"""Pictures of a trained LightningDiT: classes, ways from noise to image, images between two noises, nearest training latents.

    classes         a row a class, an image a column
    trajectory      a row a class, the state at times from noise (left) to image
    interpolation   a row a class, noises on the great circle between two; one label
    neighbours      images with the training latents nearest to theirs, decoded: what was learnt by heart shows here
"""

import math
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.commands import sample
from vavae_fast.commands.networks import Networks, load_networks, precision_of, predictor_of, sampler_settings
from vavae_fast.config import LightningDiTConfig, given_path, run_folder
from vavae_fast.errors import BadInput, require

EXAMPLE = "vavae-fast gallery --config configs/lightningdit_xl_64ep.yaml --checkpoint output/lightningdit_xl_64ep --classes 207,974"
CONFIG = LightningDiTConfig

KINDS = ("classes", "trajectory", "interpolation", "neighbours")
_NEIGHBOURS = 3
_ROWS_AT_ONCE = 4096  # of the training latents


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="CKPT", help="as sample's; default: ckpt_path")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which weights of a checkpoint of ours")
    parser.add_argument("--preset", choices=tuple(sample.SAMPLE_PRESETS), help="published settings, in place of the config's sample keys")
    parser.add_argument("--pictures", default=",".join(KINDS), help=f"of {','.join(KINDS)} (default: all)")
    parser.add_argument("--classes", metavar="L,L,…", help="as numbers; default: 4 evenly spread over all")
    parser.add_argument("--columns", type=int, default=8, help="images a row (default 8)")
    parser.add_argument("--seed", type=int, help="default: train.global_seed")
    parser.add_argument("--fused", action="store_true", help="run the fused operators (= train.fused=true)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: <run folder>/gallery, which report.html shows")


@dataclass(frozen=True)
class GalleryPlan:
    """What is drawn of which classes, by which networks."""

    config: LightningDiTConfig
    pictures: list[str]
    classes: list[int]
    columns: int
    seed: int
    out: Path
    networks: Networks
    latents: Any  # training latents, for neighbours; or None
    facts: dict[str, Any]

    def describe(self) -> str:
        return f"{', '.join(self.pictures)} of classes {', '.join(map(str, self.classes))} -> {self.out}\nnothing was written"


def plan(config: LightningDiTConfig, args: Namespace) -> GalleryPlan:
    """Numbers, then the networks, then the latents."""
    pictures = args.pictures.split(",")
    for name in pictures:
        require(name in KINDS, "--pictures", name, f"among {', '.join(KINDS)}")
    require(args.columns >= 2, "--columns", args.columns, "2 or more")
    if args.preset:
        config = replace(config, sample=replace(config.sample, **sample.SAMPLE_PRESETS[args.preset]))
    if args.fused:
        config = replace(config, train=replace(config.train, fused=True))
    if config.sample.mode == "SDE":
        raise BadInput("sample.mode: pictures are drawn by the ODE, of which an image is a smooth function of its noise; set sample.mode=ODE")
    count = config.data.num_classes
    spread = [k * count // min(4, count) for k in range(min(4, count))]
    classes = spread if args.classes is None else sample.label_list(args.classes, count, "--classes")
    seed = config.train.global_seed if args.seed is None else args.seed
    require(seed >= 0, "--seed", seed, "0 or more")
    out = args.out or run_folder(config, args.config) / "gallery"
    artifacts.require_writable(out)
    networks = load_networks(config, args.checkpoint, args.weights)
    latents = _latents(config) if "neighbours" in pictures else None
    facts = dict(classes=classes, columns=args.columns, seed=seed, preset=args.preset) | networks.facts
    return GalleryPlan(config, pictures, classes, args.columns, seed, out, networks, latents, facts)


def _latents(config: LightningDiTConfig):
    from vavae_fast.data import open_latents

    latents = open_latents(given_path(config.data.data_path, "data.data_path", "the training latents, for --pictures neighbours"))
    expected = (config.model.in_chans, config.latent_size, config.latent_size)
    if latents.shape != expected:
        raise BadInput(f"{latents.folder}: latents are {latents.shape}, the model makes {expected}; give those that it was trained on")
    return latents


def run(plan: GalleryPlan) -> Path:
    """Each picture as a PNG, and manifest.json."""
    import torch

    from vavae_fast.models.inference import matmul_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    artist = Artist(plan, device)
    with matmul_precision(artist.precision), torch.inference_mode():
        for name in plan.pictures:
            path = plan.out / f"{name}.png"
            with artifacts.replacing(path) as temporary:
                getattr(artist, name)().save(temporary, format="PNG")
            print(f"gallery  {path}", flush=True)
    artifacts.write_json(plan.out / "manifest.json", artifacts.manifest("gallery", facts=plan.facts | artist.notes))
    return plan.out


class Artist:
    """Draws what a plan asks for: one method a picture, each a PIL image."""

    def __init__(self, plan: GalleryPlan, device: Any):
        import torch

        from vavae_fast.flow.generate import LatentScale
        from vavae_fast.models.inference import decoder

        config = plan.config
        self.plan, self.device, self.precision = plan, device, precision_of(config, device)
        self.settings = sampler_settings(config.sample)
        as_it_is = replace(config, sample=replace(config.sample, compile="none"))  # a few dozen images, in batches of several sizes
        self.predict, self.guide = (
            predictor_of(as_it_is, model, self.precision, device) for model in (plan.networks.model, plan.networks.guide)
        )
        self.decode = decoder(plan.networks.tokenizer, device, self.precision)
        mean, std = (s.to(device) for s in plan.networks.stats)
        self.scale = LatentScale(mean, std, config.data.latent_multiplier)
        self.shape = (config.model.in_chans, config.latent_size, config.latent_size)
        self.labels = torch.tensor(plan.classes, device=device)
        self.notes: dict[str, Any] = {}

    def classes(self) -> Any:
        labels = self.labels.repeat_interleave(self.plan.columns)
        return self._picture(self._walk(self._noise(len(labels)), labels)[-1])

    def trajectory(self) -> Any:
        import torch

        states = self._walk(self._noise(len(self.labels)), self.labels, keep=True)  # (T, B, ...)
        times = torch.linspace(0, len(states) - 1, self.plan.columns).round().long()
        return self._picture(states[times].transpose(0, 1).flatten(0, 1))

    def interpolation(self) -> Any:
        import torch

        first, last = self._noise(2 * len(self.labels)).chunk(2)
        between = torch.stack([slerp(first, last, k / (self.plan.columns - 1)) for k in range(self.plan.columns)], dim=1)
        return self._picture(self._walk(between.flatten(0, 1), self.labels.repeat_interleave(self.plan.columns))[-1])

    def neighbours(self) -> Any:
        """A row a class: one image, then the training latents nearest to its own, normalised, mirrored ones included; L2."""
        import torch

        drawn = self._walk(self._noise(len(self.labels)), self.labels)[-1]
        found, distances = nearest_latents(drawn, self.plan.latents, self.scale, _NEIGHBOURS)
        self.notes["neighbour_distances"] = [[round(d, 4) for d in row] for row in distances.tolist()]
        return self._picture(torch.cat((drawn[:, None], found), dim=1).flatten(0, 1), columns=1 + _NEIGHBOURS)

    def _noise(self, count: int):
        import torch

        from vavae_fast import rng

        index = torch.arange(count, device=self.device)
        return rng.normal(self.plan.seed, index, like=torch.empty(count, *self.shape, device=self.device))

    def _walk(self, x, labels, keep: bool = False):
        """Noises x (N, C, h, w) of labels (N,) -> (T, N, C, h, w): the end alone, T = 1, unless `keep`."""
        import torch

        from vavae_fast.flow.generate import bind_sampler
        from vavae_fast.flow.guidance import guided

        s, parts = self.settings, []
        sampler = replace(bind_sampler(self.plan.networks.transport, s, self.plan.seed, labels), keep_trajectory=keep)
        size = self.plan.config.sample.per_proc_batch_size
        for part, y in zip(x.split(size), labels.split(size)):
            interval = (s.cfg_interval_start, s.cfg_interval_end)
            predict = guided(self.predict, s.cfg_scale, y, self.plan.config.data.num_classes, s.cfg_channels, interval, self.guide)
            parts.append(sampler.integrate(predict, part))
        return torch.cat(parts, dim=1)

    def _picture(self, latents, columns: int | None = None):
        import torch

        from vavae_fast.pixels import image_grid, to_uint8

        size = self.plan.config.sample.per_proc_batch_size
        images = torch.cat([to_uint8(self.decode(self.scale.denormalise(part))).cpu() for part in latents.split(size)])
        return image_grid(images.permute(0, 2, 3, 1).numpy(), columns=columns or self.plan.columns)


def slerp(a: Any, b: Any, share: float) -> Any:
    """From a (share 0) to b (share 1), (N, ...), along the great circle: between Gaussian noises every point is a typical noise."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos().clamp_min(1e-6).view(-1, *[1] * (a.ndim - 1))
    return ((1 - share) * angle).sin() / angle.sin() * a + (share * angle).sin() / angle.sin() * b


def nearest_latents(drawn: Any, latents: Any, scale: Any, k: int) -> tuple[Any, Any]:
    """drawn (N, C, h, w) normalised -> (N, k, C, h, w) of the training latents, plain or mirrored, nearest first, and L2 distances (N, k).

    One pass over the shards; differences are taken as they are, so a copy has a distance of 0.
    """
    import numpy as np
    import torch

    best = drawn.new_full((len(drawn), k), math.inf)
    found = drawn.new_zeros(len(drawn), k, *drawn.shape[1:])
    for first in range(0, len(latents), _ROWS_AT_ONCE):
        rows = np.arange(first, min(first + _ROWS_AT_ONCE, len(latents)))
        for mirrored in (False, True):
            others = scale.normalise(latents.read(rows, mirrored).to(drawn.device))
            distances = torch.cdist(drawn.flatten(1), others.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
            nearest, where = distances.topk(min(k, len(others)), largest=False)
            candidates = torch.cat((found, others[where]), dim=1)
            best, order = torch.cat((best, nearest), dim=1).topk(k, largest=False)
            found = candidates.gather(1, order.view(*order.shape, *[1] * (found.ndim - 2)).expand(-1, -1, *found.shape[2:]))
    return found, best
