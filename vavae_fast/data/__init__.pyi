"""What type checkers see of names that load when they are first used."""

from .builtin import digits as digits
from .builtin import digits_from_images as digits_from_images
from .images import ImageBatch as ImageBatch
from .images import Images as Images
from .images import open_images as open_images
from .latent_writer import LatentWriter as LatentWriter
from .latents import Latents as Latents
from .latents import latent_statistics as latent_statistics
from .latents import open_latents as open_latents
from .latents import write_statistics as write_statistics
from .streams import ImageStream as ImageStream
from .streams import LatentBatch as LatentBatch
from .streams import LatentStream as LatentStream
from .streams import Share as Share
