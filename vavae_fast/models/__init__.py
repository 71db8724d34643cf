"""Networks: the diffusion transformer, the tokenizer and what the tokenizer is trained against.

Names load their file when they are first used (PEP 562), so the transformer needs nothing that the tokenizer needs.
"""

from importlib import import_module

_WHERE = {
    "LightningDiT": "lightningdit",
    "create_lightningdit": "lightningdit",
    "LIGHTNINGDIT_SIZES": "lightningdit",
    "AutoencoderKL": "autoencoder",
    "DiagonalGaussian": "autoencoder",
    "load_autoencoder": "weights",
    "PatchDiscriminator": "discriminator",
    "LPIPS": "perceptual",
    "create_foundation_model": "foundation",
}
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
