"""vavae-fast: VA-VAE and LightningDiT (arXiv 2501.01423), trained and sampled at the speed of the hardware.

Importing this package does nothing else: no device query, no network, and torch only when a subpackage needs it.
"""

__version__ = "0.1.0"
