"""A trained LightningDiT with its tokenizer and statistics, to be called from Python, saved as one folder and shared.

    pipeline.py   VAVAEPipeline: labels in, images out
    parts.py      what a pipeline is made of, and where it is found: a run of ours, or the reference's released files
    folder.py     a pipeline as a folder: written whole, read back verified
    card.py       README.md of that folder, the model card
    hub.py        the Hugging Face hub, by its own client
"""

from vavae_fast.pipeline.pipeline import VAVAEPipeline, VAVAEPipelineOutput

__all__ = ["VAVAEPipeline", "VAVAEPipelineOutput"]
