"""Flow matching: probability paths, the training objective, samplers, guidance, generation. Knows models as callables."""

from .dopri5 import dopri5
from .generate import LatentScale, SamplerSettings, generate_images, generate_latents, to_uint8
from .guidance import guided
from .paths import DIFFUSIONS, PATHS, Path, batch_time
from .samplers import ODE_METHODS, SAMPLERS, SDE_SAMPLERS, Sampler, time_grid
from .transport import Transport, create_transport

__all__ = [
    "DIFFUSIONS",
    "ODE_METHODS",
    "PATHS",
    "SAMPLERS",
    "SDE_SAMPLERS",
    "LatentScale",
    "Path",
    "Sampler",
    "SamplerSettings",
    "Transport",
    "batch_time",
    "create_transport",
    "dopri5",
    "generate_images",
    "generate_latents",
    "guided",
    "time_grid",
    "to_uint8",
]
