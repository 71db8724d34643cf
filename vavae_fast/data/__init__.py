"""What goes in: images for the tokenizer, latents for LightningDiT, and the order in which training meets them.

Names load on first use, so that importing this package costs nothing.
"""

from importlib import import_module

_HOME = {
    "open_images": "images",
    "Images": "images",
    "ImageBatch": "images",
    "open_latents": "latents",
    "Latents": "latents",
    "LatentWriter": "latent_writer",
    "latent_statistics": "latents",
    "write_statistics": "latents",
    "ImageStream": "streams",
    "LatentBatch": "streams",
    "LatentStream": "streams",
    "Share": "streams",
    "digits": "builtin",
    "digits_from_images": "builtin",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
