"""vavae-fast: VA-VAE and LightningDiT (arXiv 2501.01423), trained and sampled at the speed of the hardware.

Importing this package does nothing but refuse a torch that is too old: no device query, no network, and torch only when a
subpackage needs it.
"""

from importlib import import_module

import vavae_kernels as _kernels  # noqa: F401  it refuses that torch

__version__ = "0.1.0"
__all__ = ["VAVAEPipeline", "__version__"]


def __getattr__(name: str):
    """VAVAEPipeline, loaded when it is first used (PEP 562)."""
    if name != "VAVAEPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("vavae_fast.pipeline").VAVAEPipeline
