"""A pipeline of a few thousand random weights: three classes, images of 32 pixels, latents of 4 x 2 x 2 by a 16-fold tokenizer."""

import torch

from vavae_fast.models import AutoencoderKL, create_lightningdit
from vavae_fast.parsing import to_dataclass
from vavae_fast.pipeline.parts import Parts
from vavae_fast.schema import LightningDiTConfig

CONFIG = dict(
    data=dict(image_size=32, num_classes=3, latent_norm=True, latent_multiplier=1.0),
    model=dict(model_type="custom", hidden_size=32, depth=2, num_heads=4, patch_size=1, use_swiglu=True, use_rope=True, use_rmsnorm=True, in_chans=4),
    sample=dict(num_sampling_steps=4, cfg_scale=1.5, timestep_shift=0.3, per_proc_batch_size=4),
)


def shaken(module):
    """Away from the initialisation, in which the last layers are 0."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.eval().requires_grad_(False)


def lightningdit(**changes):
    arguments = dict(name="custom", hidden_size=32, depth=2, num_heads=4, patch_size=1, input_size=2, in_channels=4, num_classes=3)
    return shaken(create_lightningdit(**arguments | changes))


def tokenizer(embed_dim=4):
    return shaken(AutoencoderKL(embed_dim=embed_dim, ch=8, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, attn_resolutions=(), resolution=32))


def statistics(channels=4):
    return torch.randn(1, channels, 1, 1), torch.rand(1, channels, 1, 1) + 0.5


def parts(class_names=(), **changes) -> Parts:
    torch.manual_seed(0)
    groups = {group: CONFIG.get(group, {}) | changes.pop(group, {}) for group in ("data", "model", "sample", "transport")}
    config = to_dataclass(LightningDiTConfig, groups)
    model = lightningdit(class_dropout_prob=config.model.class_dropout_prob)
    return Parts(config, model, tokenizer(), *statistics(), class_names=class_names, origin=dict(weights="ema", sha256="0" * 64))
