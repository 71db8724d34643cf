"""Flow matching: probability paths, the training objective, samplers, guidance, generation. Knows models as callables."""

from vavae_fast.flow.dopri5 import dopri5
from vavae_fast.flow.generate import LatentScale, SamplerSettings, generate_images, generate_latents
from vavae_fast.flow.guidance import guided
from vavae_fast.flow.paths import DIFFUSIONS, PATHS, Path, batch_time
from vavae_fast.flow.samplers import ODE_METHODS, SAMPLERS, SDE_SAMPLERS, Sampler, time_grid
from vavae_fast.flow.transport import Transport, create_transport

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
]
