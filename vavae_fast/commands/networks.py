"""What draws images, for every command that does: the networks of a LightningDiT config, checked one against another, and how they are called."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.config import LightningDiTConfig, SampleConfig, given_path
from vavae_fast.errors import BadInput, require


@dataclass(frozen=True)
class Networks:
    """What draws, checked one against another, on the CPU."""

    model: Any
    guide: Any  # the lesser model of autoguidance, or None
    tokenizer: Any
    transport: Any
    stats: Any  # (mean, std), each (1, C, 1, 1)
    facts: dict[str, Any]  # what they are, and the settings that they are called with


def load_networks(config: LightningDiTConfig, checkpoint: str | None, weights: str) -> Networks:
    """The sampler's settings are checked first, then the model with its guide, then the tokenizer and the statistics."""
    settings = sampler_settings(config.sample)
    guidable = config.model.class_dropout_prob > 0 or config.sample.cfg_scale <= 1 or config.sample.guide is not None
    require(guidable, "sample.cfg_scale", config.sample.cfg_scale, "1 for a model without a null class (model.class_dropout_prob is 0)")
    given_path(checkpoint or config.ckpt_path, "--checkpoint" if checkpoint else "ckpt_path", "the LightningDiT weights")

    from vavae_fast.commands import build
    from vavae_fast.data.latents import extraction_facts

    if config.sample.precision == "fp8":
        _require_fp8()
    model, identity = build.trained_lightningdit(config, checkpoint, weights)
    guide, guide_identity = _guide(config, weights)
    tokenizer = build.tokenizer(config)
    stats, stats_sha256 = latent_statistics(config)
    makers = {one["path"]: one.get("tokenizer") for one in (identity, guide_identity) if one}
    if config.data.data_path is not None:
        makers[config.data.data_path] = extraction_facts(Path(config.data.data_path)).get("tokenizer")
    facts = dict(
        sampler=asdict(settings), precision=config.sample.precision, checkpoint=identity, weights=weights, guide=guide_identity,
        tokenizer=dict(path=config.vae.ckpt_path, sha256=build.tokenizer_digest(tokenizer, config.vae.ckpt_path, makers)),
        statistics_sha256=stats_sha256, image_size=config.data.image_size, latent_norm=config.data.latent_norm,
        latent_multiplier=config.data.latent_multiplier, transport=asdict(config.transport),
    )  # fmt: skip
    return Networks(model, guide, tokenizer, build.transport(config.transport, config.train.fused), stats, facts)


def _require_fp8() -> None:
    import torch

    from vavae_fast.models.fp8 import require_fp8

    require_fp8(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "sample.precision=fp8", "sample.precision=bf16")


def _guide(config: LightningDiTConfig, which: str) -> tuple[Any, dict[str, Any] | None]:
    """The lesser model of sample.guide and what identifies it. A run folder brings its own config; weights alone are of this config's model."""
    from vavae_fast.commands import build
    from vavae_fast.commands.runs import run_config
    from vavae_fast.config import load_config

    if config.sample.guide is None:
        return None, None
    path = given_path(config.sample.guide, "sample.guide", "run folder or weights of the lesser model")
    own = next((folder / "config.yaml" for folder in (path, *path.parents[:2]) if (folder / "config.yaml").is_file()), None)
    theirs = config
    if path.is_dir() and own:
        run_config(own.parent)  # refuses one that is not what the run wrote
        theirs = load_config(own)
    takes = lambda c: (c.model.in_chans, c.latent_size, c.data.num_classes) if isinstance(c, LightningDiTConfig) else None
    if takes(theirs) != takes(config):
        raise BadInput(f"{path}: sample.guide takes other latents or classes than the model; give a LightningDiT trained on the same data")
    return build.trained_lightningdit(replace(theirs, train=config.train), str(path), which)


def latent_statistics(config: LightningDiTConfig) -> tuple[tuple[Any, Any], str | None]:
    """(mean, std) that undo the normalisation of training, of latents_stats.pt in data.data_path, and its sha256; 0, 1 and None without one."""
    import torch

    if not config.data.latent_norm:
        return (torch.zeros(1, config.model.in_chans, 1, 1), torch.ones(1, config.model.in_chans, 1, 1)), None
    from vavae_fast.data.latents import read_statistics

    path = given_path(config.data.data_path, "data.data_path", "the folder that holds latents_stats.pt") / "latents_stats.pt"
    return read_statistics(path, config.model.in_chans), artifacts.sha256(path)


def sampler_settings(s: SampleConfig) -> Any:
    """sample.* as the sampler takes them; checks method, form and interval."""
    from vavae_fast.flow.generate import SamplerSettings

    return SamplerSettings(
        mode=s.mode, method=s.sampling_method, num_steps=s.num_sampling_steps, shift=s.timestep_shift, cfg_scale=max(s.cfg_scale, 1.0),
        cfg_interval_start=s.cfg_interval_start, cfg_interval_end=s.cfg_interval_end, cfg_channels=s.cfg_channels, atol=s.atol, rtol=s.rtol,
        error_norm=s.error_norm, diffusion_form=s.diffusion_form, diffusion_norm=s.diffusion_norm, last_step=s.last_step,
        last_step_size=s.last_step_size,
    )  # fmt: skip


def precision_of(config: LightningDiTConfig, device: Any) -> str:
    """sample.precision, or what auto means on `device`."""
    from vavae_fast.commands import build

    asked = config.sample.precision
    return ("bf16" if build.bf16(asked, device) else "fp32") if asked == "auto" else asked


def predictor_of(config: LightningDiTConfig, model: Any, precision: str, device: Any) -> Callable[..., Any] | None:
    """`model` as `sample.` wants it called; None for None."""
    from vavae_fast.commands import build
    from vavae_fast.models.inference import predictor

    if model is None:
        return None
    return predictor(model, device, precision, build.compiled_regions(config.sample.compile, device), config.sample.cuda_graphs)
