"""What type checkers see of names that load when they are first used."""

from .pipeline import VAVAEPipeline as VAVAEPipeline

__version__: str
