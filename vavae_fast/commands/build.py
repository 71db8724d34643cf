"""Turns configs into objects; nothing else in the engine reads a config to build with."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vavae_fast import artifacts
from vavae_fast.config import Config, LightningDiTConfig, TokenizerConfig, given_path
from vavae_fast.data.images import Images, open_images
from vavae_fast.errors import BadInput
from vavae_fast.flow import create_transport
from vavae_fast.flow.transport import Transport
from vavae_fast.losses import LossWeights
from vavae_fast.models.autoencoder import AutoencoderKL
from vavae_fast.models.discriminator import PatchDiscriminator
from vavae_fast.models.foundation import FoundationModel, create_foundation_model
from vavae_fast.models.foundation_models import USER_MODEL
from vavae_fast.models.lightningdit import LightningDiT, create_lightningdit
from vavae_fast.models.perceptual import LPIPS
from vavae_fast.models.standins import StandInEncoder, load_standin
from vavae_fast.models.user_model import load_user_model
from vavae_fast.models.weights import autoencoder_of, autoencoder_state, load_autoencoder, load_strict, read_state_dict
from vavae_fast.schema import TransportConfig
from vavae_fast.training.checkpoint import group_digest, latest_checkpoint, load_checkpoint


def lightningdit(config: LightningDiTConfig, residual_dtype: torch.dtype | None = None) -> LightningDiT:
    """The model of a LightningDiT config, initialised as the reference's, on the current default device."""
    c = config.model
    custom = {k: getattr(c, k) for k in ("hidden_size", "depth", "num_heads", "patch_size")} if c.model_type == "custom" else {}
    try:
        model = create_lightningdit(
            c.model_type, input_size=config.latent_size, in_channels=c.in_chans, num_classes=config.data.num_classes,
            use_qknorm=c.use_qknorm, use_swiglu=c.use_swiglu, use_rope=c.use_rope, use_rmsnorm=c.use_rmsnorm, wo_shift=c.wo_shift,
            learn_sigma=c.learn_sigma, class_dropout_prob=c.class_dropout_prob, use_checkpoint=c.use_checkpoint,
            fused=config.train.fused, attention=config.train.attention, residual_dtype=residual_dtype, **custom,
        )  # fmt: skip
    except ValueError as error:
        raise BadInput(f"model: {error}") from None
    if c.label_init_std != 0.02:
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=c.label_init_std)
    return model


def transport(config: TransportConfig, fused: bool, use_lognorm: bool | None = None) -> Transport:
    """The transport of a config; `use_lognorm` overrides the config's. The fused loss is that of the linear path and velocity."""
    c = config
    fused = fused and c.path_type == "Linear" and c.prediction == "velocity"
    return create_transport(
        c.path_type, c.prediction, c.loss_weight, c.train_eps, c.sample_eps, use_cosine_loss=c.use_cosine_loss,
        use_lognorm=c.use_lognorm if use_lognorm is None else use_lognorm, partitial_train=c.partitial_train,
        partial_ratio=c.partial_ratio, shift_lg=c.shift_lg, fused=fused,
    )  # fmt: skip


def residual_dtype(config: LightningDiTConfig) -> torch.dtype | None:
    """Of the stream between blocks in training; sampling runs as the reference's does, without autocast."""
    return torch.bfloat16 if config.train.residual_dtype == "bf16" else None


def bf16(precision: str, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16: `auto` does on a GPU."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def compiled_regions(setting: str, device: torch.device) -> str:
    """What is compiled: `auto` is the blocks on a GPU."""
    if setting == "auto":
        return "blocks" if device.type == "cuda" else "none"
    return setting


def autoencoder(config: TokenizerConfig) -> AutoencoderKL:
    """The tokenizer of a tokenizer config, freshly initialised."""
    try:
        return AutoencoderKL(**architecture(config), fused=config.train.fused)
    except ValueError as error:
        raise BadInput(f"model.params.ddconfig: {error}") from None


def architecture(config: TokenizerConfig) -> dict[str, Any]:
    """The constructor arguments of a tokenizer config's AutoencoderKL."""
    p, d = config.model.params, config.model.params.ddconfig
    return dict(
        embed_dim=p.embed_dim, ch=d.ch, ch_mult=tuple(d.ch_mult), num_res_blocks=d.num_res_blocks,
        attn_resolutions=tuple(d.attn_resolutions), resolution=d.resolution, in_channels=d.in_channels, out_ch=d.out_ch,
        z_channels=d.z_channels, dropout=d.dropout,
    )  # fmt: skip


def tokenizer(config: Config, checkpoint: str | None = None) -> AutoencoderKL:
    """A trained tokenizer for either kind of config, in eval mode on the CPU, without gradients.

    The weights are `checkpoint`, or the config's own: `vae.ckpt_path` of a LightningDiT config, `ckpt_path` of a tokenizer
    config. A run folder or checkpoint folder of ours brings its architecture along; of a single file it is read off the shapes.
    """
    is_dit = isinstance(config, LightningDiTConfig)
    key = "vae.ckpt_path" if is_dit else "ckpt_path"
    own = config.vae.ckpt_path if is_dit else config.ckpt_path
    path = given_path(checkpoint or own, "--checkpoint" if checkpoint else key, "the tokenizer's weights")
    model = tokenizer_alone(path, None if is_dit else architecture(config), config.train.fused)
    name, expected = ("model.in_chans", config.model.in_chans) if is_dit else ("model.params.embed_dim", config.model.params.embed_dim)
    if model.embed_dim != expected:
        found = f"the tokenizer has {model.embed_dim} latent channels, {name} is {expected}"
        raise BadInput(f"{path}: {found}; set {name}={model.embed_dim}, or give another tokenizer")
    if is_dit and model.downsample_ratio != config.vae.downsample_ratio:
        found = f"the tokenizer downsamples by {model.downsample_ratio}, vae.downsample_ratio is {config.vae.downsample_ratio}"
        raise BadInput(f"{path}: {found}; set vae.downsample_ratio={model.downsample_ratio}, or give another tokenizer")
    return model


def tokenizer_alone(path: Path, known: dict[str, Any] | None = None, fused: bool = False) -> AutoencoderKL:
    """The tokenizer of a run folder, a checkpoint folder or a file, without a config; `known` arguments of a file's are checked."""
    model = _from_checkpoint(checkpoint_folder(path), fused) if path.is_dir() else load_autoencoder(path, known, fused)
    return model.eval().requires_grad_(False)


def _from_checkpoint(folder: Path, fused: bool) -> AutoencoderKL:
    groups, manifest = load_checkpoint(folder, "model")
    known = manifest.get("architecture")
    if known is None:
        raise BadInput(f"{folder}: a checkpoint of {manifest.get('stage', 'another stage')}, not of a tokenizer; give a tokenizer's run folder")
    if not isinstance(known, dict):
        raise BadInput(f"{folder}: its manifest's architecture is no object; choose another checkpoint")
    return autoencoder_of(groups["model"], folder, {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}, fused)


def checkpoint_folder(path: Path) -> Path:
    """A checkpoint folder: `path` itself, or the newest complete one of the run folder `path`."""
    if path.name.startswith("step_"):
        return path
    newest = latest_checkpoint(path / "checkpoints", print) if (path / "checkpoints").is_dir() else None
    if newest is None:
        raise BadInput(f"{path}: holds no complete checkpoint; give a run folder, a checkpoint folder, a .pt or a .safetensors file")
    return newest


def weights_digest(module: nn.Module) -> str:
    """sha256 of a module's state, by name: what tells one tokenizer from another, whatever file it came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: AutoencoderKL, path: Path | str | None, makers: Mapping[str, str | None]) -> str:
    """`weights_digest` of a tokenizer that is to decode latents. makers: whose latents -> the digest of what made them, None where that is
    not known; `BadInput` where it is another: such images look like noise, or nearly right, and every score of them is wrong."""
    found = weights_digest(tokenizer)
    for whose, maker in makers.items():
        if maker not in (None, found):
            raise BadInput(f"{path}: not the tokenizer that made the latents of {whose} (its weights differ); give that one")
    return found


def dit_weights(path: Path, which: str = "ema") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """LightningDiT's weights in a file or folder, and what identifies them: path, step, sha256, and the tokenizer of their latents."""
    if path.is_dir():
        folder = checkpoint_folder(path)
        groups, manifest = load_checkpoint(folder, which)
        maker = manifest.get("data", {}).get("tokenizer")
        return dict(groups[which]), {"path": str(folder), "step": manifest["step"], "sha256": group_digest(manifest, which), "tokenizer": maker}
    return read_state_dict(path, prefer=which), {"path": str(path), "sha256": artifacts.sha256(path)}


def trained_lightningdit(config: LightningDiTConfig, checkpoint: str | None, which: str = "ema") -> tuple[LightningDiT, dict[str, Any]]:
    """The model with the weights of `checkpoint`, or of the config's `ckpt_path`, in eval mode, without gradients."""
    path = given_path(checkpoint or config.ckpt_path, "--checkpoint" if checkpoint else "ckpt_path", "the LightningDiT weights")
    state, identity = dit_weights(path, which)
    return lightningdit_of(config, state, identity["path"]), identity


def lightningdit_of(config: LightningDiTConfig, state: Mapping[str, Tensor], source: str | Path) -> LightningDiT:
    """The model of a config with the weights `state`, in eval mode, without gradients, on the CPU. `source` names them in errors."""
    with torch.device("meta"):  # nothing is initialised, which takes XL/1 half a minute
        model = lightningdit(config)
    load_strict(model, state, source)  # only compares: no memory is asked for before every shape fits
    model = model.to_empty(device="cpu")
    load_strict(model, state, source)
    return model.eval().requires_grad_(False)


CHECKED_WHOLE = 2000  # images of a set that is decoded before the stage begins; of a larger one a bad image shows when it is read


def images(path: Path | str, size: int, crop: str = "center", backend: str = "auto", max_corrupt: float = 0.0) -> Images:
    """The images at `path`, those of a small set all decoded once, so that more bad ones than may be are named before anything is written."""
    opened = open_images(path, size=size, crop=crop, backend=backend)
    if len(opened) <= CHECKED_WHOLE:
        opened.check(decode_all=True, allowed=int(max_corrupt * len(opened)))
    return opened


# -- what a tokenizer is trained with --------------------------------------------------------------------------------


def discriminator(config: TokenizerConfig) -> PatchDiscriminator:
    """The PatchGAN of a tokenizer config, freshly initialised."""
    loss = config.model.params.lossconfig.params
    return PatchDiscriminator(config.model.params.ddconfig.out_ch, loss.disc_ndf, loss.disc_num_layers)


def loss_weights(config: TokenizerConfig) -> LossWeights:
    """lossconfig.params as the objectives take them."""
    loss = config.model.params.lossconfig.params
    if loss.pixelloss_weight != 1.0:
        raise BadInput("model.params.lossconfig.params.pixelloss_weight: the reference reads it and does not use it; remove the key")
    return LossWeights(**{f.name: getattr(loss, f.name) for f in dataclasses.fields(LossWeights)})


def perceptual(config: TokenizerConfig) -> nn.Module | None:
    """LPIPS from its two files, or the stand-in; None when its weight is 0."""
    if config.model.params.lossconfig.params.perceptual_weight == 0:
        return None
    if config.perceptual.standin is not None:
        return load_standin(Path(config.perceptual.standin)).requires_grad_(False).eval()
    return LPIPS.from_files(config.perceptual.vgg_weights, config.perceptual.linear_weights)


def foundation(config: TokenizerConfig, import_path: str | None = None) -> FoundationModel | None:
    """The frozen model behind `use_vf`, its features on the grid of the latents; None without alignment.

    import_path: `--foundation`'s, whose model stands behind use_vf `module`.
    """
    name, c = config.model.params.use_vf, config.foundation
    if name is None:
        return None
    grid = (config.image_size // config.downsample_ratio,) * 2
    if name == "standin":
        encoder = load_standin(Path(c.standin))
        size = getattr(encoder, "image_size", None)
        if size != config.image_size:
            made_for = f"an encoder of {size}-pixel images" if size else "no encoder"
            raise BadInput(f"{c.standin}: {made_for}, data.image_size is {config.image_size}; give the stand-in that was made for it")
        return FoundationModel(encoder, grid, name)
    if name == USER_MODEL:
        return FoundationModel(load_user_model(import_path, config.image_size), grid, import_path)
    return create_foundation_model(name, c.weights, input_range=c.input_range, grid=grid, pixels_per_patch=c.pixels_per_patch)


def untrained_foundation(config: TokenizerConfig) -> FoundationModel | None:
    """What `foundation` gives, without weights: on the meta device; a stand-in without a file is one of usual size."""
    name, c = config.model.params.use_vf, config.foundation
    grid = (config.image_size // config.downsample_ratio,) * 2
    if name == "standin":
        encoder = load_standin(Path(c.standin)) if c.standin else StandInEncoder(config.image_size, grid=grid[0])
        return FoundationModel(encoder, grid, name)
    with torch.device("meta"):
        return name and create_foundation_model(name, random=True, input_range=c.input_range, grid=grid, pixels_per_patch=c.pixels_per_patch)


def untrained_perceptual(config: TokenizerConfig) -> nn.Module | None:
    """What `perceptual` gives, without its files."""
    if config.model.params.lossconfig.params.perceptual_weight == 0:
        return None
    if config.perceptual.standin is not None:
        return load_standin(Path(config.perceptual.standin))
    return LPIPS.random()


def projection(config: TokenizerConfig, foundation: FoundationModel | None) -> nn.Conv2d | None:
    """The 1x1 convolution `linear_proj`: z to the features without bias, or the features to z with one."""
    if foundation is None:
        return None
    p = config.model.params
    if p.reverse_proj:
        return nn.Conv2d(p.embed_dim, foundation.feature_dim, 1, bias=False)
    return nn.Conv2d(foundation.feature_dim, p.embed_dim, 1)


def start_tokenizer(path: Path, autoencoder: AutoencoderKL, projection: nn.Conv2d | None, discriminator: nn.Module) -> str:
    """Load the weights that a stage starts from: the autoencoder always, projection and discriminator where the file has them."""
    if path.is_dir():
        folder = checkpoint_folder(path)
        groups, _ = load_checkpoint(folder, "model", "discriminator")
        state = groups["model"] | {f"loss.discriminator.{k}": v for k, v in groups["discriminator"].items()}
    else:
        state = read_state_dict(path, prefer="state_dict")
    load_strict(autoencoder, autoencoder_state(state, path), path)
    loaded = ["autoencoder"]
    for name, prefix, network in (("projection", "linear_proj.", projection), ("discriminator", "loss.discriminator.", discriminator)):
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if network is not None and part:
            load_strict(network, part, path)
            loaded.append(name)
    return f"starts from the weights of {path}: {', '.join(loaded)}"
