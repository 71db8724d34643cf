"""What a LightningDiT run looks at while it trains: held-out loss, grids of samples, the share of the device's peak. From `log:` and
`data.valid_path` of the config; nothing here changes what is trained."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vavae_fast import rng
from vavae_fast.commands import build
from vavae_fast.commands.networks import sampler_settings
from vavae_fast.commands.online_fid import FidJudge, share_of
from vavae_fast.config import LightningDiTConfig, given_path
from vavae_fast.data.latents import Latents, ShardStore, open_store
from vavae_fast.distributed import World
from vavae_fast.errors import BadInput, require
from vavae_fast.evaluation import load_inception, load_reference
from vavae_fast.flow.generate import LatentScale, SamplerSettings, generate_latents
from vavae_fast.models.autoencoder import AutoencoderKL
from vavae_fast.models.diagnostics import layer_statistics
from vavae_fast.models.lightningdit_cost import flops_per_image
from vavae_fast.pixels import to_uint8
from vavae_fast.training.averaged import averaged_weights, evaluating
from vavae_fast.training.boards import require_boards
from vavae_fast.training.device_peaks import peak_flops
from vavae_fast.training.dit import DiTState
from vavae_fast.training.heldout import SEED, held_out_loss, read_held_out, spread_rows
from vavae_fast.training.log import RunLog
from vavae_fast.training.loop import Observer
from vavae_fast.training.previews import latent_pixels, preview_labels, write_preview

LOOKED_AT = 8  # latents for the statistics of layers


@dataclass(frozen=True)
class Watch:
    """What a config asks to be looked at, checked: held-out latents, sampler settings, the tokenizer that decodes; None: not asked for."""

    held_out: ShardStore | None
    sampler: SamplerSettings | None
    tokenizer: AutoencoderKL | None
    judge: FidJudge | None = None

    def describe(self, config: LightningDiTConfig) -> str:
        log, parts = config.log, []
        if self.held_out is not None:
            used = min(log.valid_num, len(self.held_out))
            parts.append(f"loss on {used:,} of {len(self.held_out):,} held-out latents every {log.valid_every:,} steps")
        if log.samples_every is not None:
            parts.append(f"{log.samples_num} samples every {log.samples_every:,} steps, {'decoded' if self.tokenizer else 'as latents'}")
        if self.judge is not None:
            parts.append(f"FID of {log.fid_num:,} samples every {log.fid_every:,} steps")
        return "; ".join(parts) or "the training loss alone; data.valid_path and log.samples_every add to it"


def plan_watch(config: LightningDiTConfig, latents: Latents | None) -> Watch:
    """Open and check what will be looked at; writes nothing. `latents`: those trained on, None in a dry run without data."""
    require_boards(tuple(config.log.to))
    held_out = _held_out(config, latents) if config.data.valid_path else None
    if config.log.samples_every is None and config.log.fid_every is None:
        return Watch(held_out, None, None)
    settings = sampler_settings(config.sample)
    if settings.method == "dopri5":  # processes must take the same steps, and a grid need not be exact
        settings = replace(settings, method="euler")
    guidable = config.model.class_dropout_prob > 0 or settings.cfg_scale == 1
    require(guidable, "sample.cfg_scale", config.sample.cfg_scale, "1 for a model without a null class (model.class_dropout_prob is 0)")
    path = config.vae.ckpt_path
    tokenizer = build.tokenizer(config) if path and "path/to/" not in path else None
    return Watch(held_out, settings, tokenizer, _judge(config, tokenizer) if config.log.fid_every is not None else None)


def _judge(config: LightningDiTConfig, tokenizer: AutoencoderKL | None) -> FidJudge:
    if tokenizer is None:
        raise BadInput("log.fid_every: FID is of images; set vae.ckpt_path to the tokenizer that decodes them")
    path = given_path(config.data.fid_reference_file, "data.fid_reference_file", "an .npz with mu and sigma, for log.fid_every")
    reference = load_reference(path)
    if reference.mu is None:
        raise BadInput(f"{path}: holds images but no mu and sigma; log.fid_every needs the moments")
    weights = given_path(config.log.fid_inception, "log.fid_inception", "the weights of the FID Inception network")
    return FidJudge(load_inception(weights), reference.mu, reference.sigma)


def _held_out(config: LightningDiTConfig, latents: Latents | None) -> ShardStore:
    path = given_path(config.data.valid_path, "data.valid_path", "a folder of latents that are not trained on")
    store = open_store(path)
    expected = (config.model.in_chans, config.latent_size, config.latent_size)
    if store.shape != expected:
        raise BadInput(f"{path}: held-out latents are {store.shape}, the model takes {expected}; extract them as those in data.data_path")
    highest = int(store.labels.max())
    if highest >= config.data.num_classes:
        raise BadInput(f"{path}: label {highest} found, data.num_classes is {config.data.num_classes}; extract with the same class folders")
    if latents is not None:
        if path.resolve() == latents.folder.resolve():
            raise BadInput(f"data.valid_path: {path} is data.data_path, of which nothing is held out; extract other images for it")
        makers = [(manifest or {}).get("facts", {}).get("tokenizer") for manifest in (latents.manifest, store.manifest)]
        if None not in makers and makers[0] != makers[1]:
            raise BadInput(f"{path}: made by another tokenizer than {latents.folder}; extract both with one")
    return store


def observers(config: LightningDiTConfig, watch: Watch, latents: Latents, state: DiTState, micro_batch: int, log: RunLog) -> list[Observer]:
    """Those that the config asks for. Every process makes and calls the same ones; the main one writes into the run folder."""
    found = []
    if watch.held_out is not None:
        found.append(Observer(config.log.valid_every, _held_out_look(config, watch.held_out, latents, state, micro_batch)))
    if config.log.samples_every is not None:
        found.append(Observer(config.log.samples_every, _samples_look(config, watch, latents, state, micro_batch, log)))
    if watch.judge is not None:
        found.append(Observer(config.log.fid_every, _fid_look(config, watch, latents, state, micro_batch)))
    if config.log.layers_every is not None:
        found.append(Observer(config.log.layers_every, _layers_look(config, latents, state, log)))
    return found


def _layers_look(config: LightningDiTConfig, latents: Latents, state: DiTState, log: RunLog):
    """The same few latents, noise and times at every look."""
    device = state.world.device
    rows = torch.from_numpy(spread_rows(len(latents), LOOKED_AT))
    x1, y = latents.read(rows).to(device), latents.labels[rows].to(device)
    if config.data.latent_norm:
        x1 = (x1 - latents.mean.to(device)) / latents.std.to(device)
    x1, t = x1 * config.data.latent_multiplier, (torch.arange(len(rows), device=device) + 0.5) / len(rows)
    x0 = rng.normal(SEED, rows.to(device), like=x1)
    x = torch.lerp(x0, x1, t.view(-1, 1, 1, 1))

    def look(step: int) -> dict[str, float]:
        """`attention_logit`: the largest of all layers, and which layer's; `residual_rms` likewise. All layers go to layers.jsonl."""
        with evaluating(state.model), torch.autocast(device.type, torch.bfloat16, enabled=state.bf16):
            statistics = {name: values.tolist() for name, values in layer_statistics(state.model, x, t, y).items()}
        if state.world.main:
            with log.sparing("layers.jsonl"), open(log.folder / "layers.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | statistics) + "\n")
        largest = {name: max(values) for name, values in statistics.items()}
        return largest | {"attention_logit_layer": float(statistics["attention_logit"].index(largest["attention_logit"]))}

    return look


def _held_out_look(config: LightningDiTConfig, store: ShardStore, latents: Latents, state: DiTState, micro_batch: int):
    mean, std = (latents.mean, latents.std) if config.data.latent_norm else (None, None)
    held = read_held_out(store, config.log.valid_num, mean, std, config.data.latent_multiplier, state.world)

    def look(step: int) -> dict[str, float]:
        """`valid_mse` of the averaged weights, by t too; `valid_mse_model` of those being trained."""
        measured = (state.transport, held, micro_batch, state.bf16, state.world)
        with evaluating(state.model):
            own = held_out_loss(state.model, *measured)
            with averaged_weights(state.model, state.optimizer.ema_state_dict()):
                averaged = held_out_loss(state.model, *measured)
        return {f"valid_{key}": value for key, value in averaged.items()} | {"valid_mse_model": own["mse"]}

    return look


def _samples_look(config: LightningDiTConfig, watch: Watch, latents: Latents, state: DiTState, micro_batch: int, log: RunLog):
    labels = preview_labels(config.log.samples_num, config.data.num_classes).to(state.world.device)
    pixels = _decoder(config, watch.tokenizer, latents, state) if state.world.main else None
    if watch.tokenizer is None:
        log.say("samples are shown as their first three latent channels; vae.ckpt_path would give the tokenizer that decodes them")

    def look(step: int) -> dict[str, float]:
        """Every process draws all images, since a sharded model needs all of them; the main one writes."""
        with evaluating(state.model), averaged_weights(state.model, state.optimizer.ema_state_dict()):
            drawn = torch.cat(list(_drawn(config, watch.sampler, state, labels, micro_batch)))
        if state.world.main:
            with log.sparing("samples"):
                log.image(step, write_preview(log.folder, step, drawn, pixels, config.sample.per_proc_batch_size))
        return {}

    return look


def _fid_look(config: LightningDiTConfig, watch: Watch, latents: Latents, state: DiTState, micro_batch: int):
    """Classes evenly spread, the noise of the sample grids' numbering; each process draws, decodes and looks at its share."""
    labels = preview_labels(config.log.fid_num, config.data.num_classes).to(state.world.device)
    judge = replace(watch.judge, inception=watch.judge.inception.to(state.world.device))
    pixels = _decoder(config, watch.tokenizer, latents, state)

    def look(step: int) -> dict[str, float]:
        """`fid`, of log.fid_num samples, on the main process."""
        with evaluating(state.model), averaged_weights(state.model, state.optimizer.ema_state_dict()):
            own = share_of(len(labels), state.world)
            fid = judge.score(map(pixels, _drawn(config, watch.sampler, state, labels, micro_batch, own)), state.world)
        return {} if fid is None else {"fid": fid}

    return look


def _drawn(
    config: LightningDiTConfig, sampler: SamplerSettings, state: DiTState, labels: Tensor, batch: int, indices: range | None = None
) -> Iterator[Tensor]:
    """Normalised latents of the images `indices`, all by default, `batch` at a time, by the weights that the model has now."""
    device, shape = state.world.device, (config.model.in_chans, config.latent_size, config.latent_size)

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=state.bf16):
            return state.model(x, t, y).float()

    batches = generate_latents(
        predict, labels, shape, sampler, seed=config.train.global_seed, null_label=config.data.num_classes,
        transport=state.transport, batch_size=batch, indices=indices,
    )  # fmt: skip
    return (x for _, x in batches)


def _decoder(config: LightningDiTConfig, tokenizer: AutoencoderKL | None, latents: Latents, state: DiTState):
    """Normalised latents -> uint8 pixels: by the tokenizer, or the latents themselves."""
    if tokenizer is None:
        return lambda z: latent_pixels(z, config.vae.downsample_ratio)
    device = state.world.device
    tokenizer = tokenizer.to(device)
    mean, std = (latents.mean.to(device), latents.std.to(device)) if config.data.latent_norm else (0.0, 1.0)
    scale = LatentScale(mean, std, config.data.latent_multiplier)

    def pixels(z: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=state.bf16):
            return to_uint8(tokenizer.decode(scale.denormalise(z)).float())

    return pixels


def peak_images_per_second(model: nn.Module, world: World, log: RunLog) -> float | None:
    """Training images a second at which the model's own FLOPs, three forward passes', would fill all devices; None, said, where unknown."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "this CPU"
    peak = peak_flops(name)
    if peak is None:
        log.say(f"no MFU: the peak of {name} is not in the table of known GPUs")
        return None
    return peak * world.size / (3 * flops_per_image(model))
