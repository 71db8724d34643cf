"""The names of experiments, each the file of that name, and of scales; imports nothing until one is asked for."""

import importlib
from typing import Any

PAPER = ("dilemma", "ladder", "vf-ablation", "foundation-models", "convergence", "scaling", "uniformity", "system")
FUTURE_WORK = ("vf-sweep", "paths", "resolution", "unlabeled", "latents")  # as the paper names it
NAMES = (*PAPER, *FUTURE_WORK)
SCALES = ("demo", "cifar", "imagenet")


def experiment(name: str) -> Any:
    """The `Experiment` of that name."""
    return importlib.import_module(f"vavae_fast.experiments.{name.replace('-', '_')}").EXPERIMENT
