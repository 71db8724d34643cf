"""What type checkers see of names that load when they are first used."""

from .autoencoder import AutoencoderKL as AutoencoderKL
from .autoencoder import DiagonalGaussian as DiagonalGaussian
from .discriminator import PatchDiscriminator as PatchDiscriminator
from .foundation import create_foundation_model as create_foundation_model
from .lightningdit import LIGHTNINGDIT_SIZES as LIGHTNINGDIT_SIZES
from .lightningdit import LightningDiT as LightningDiT
from .lightningdit import create_lightningdit as create_lightningdit
from .perceptual import LPIPS as LPIPS
from .weights import load_autoencoder as load_autoencoder
