"""The stages of a tokenizer's config as steps of its run."""

import math
from dataclasses import dataclass
from typing import Any

from vavae_fast.config import TokenizerConfig
from vavae_fast.errors import BadInput, require

RECIPE_EPOCHS = 100  # of the published recipe's first stage, when a config names no length


@dataclass(frozen=True)
class PlannedStage:
    """Steps `begin` up to `end`, which is the next one's; both None where epochs are to be counted and there are no images."""

    name: str | None  # None: the run is one stage, which needs no name
    config: TokenizerConfig  # of a run that is this stage alone
    epochs: int | None
    begin: int | None
    end: int | None

    def describe(self) -> str:
        model, loss = self.config.model, self.config.model.params.lossconfig.params
        length = [f"{self.epochs} epochs"] if self.epochs is not None else []
        length += [f"{self.end - self.begin:,} steps, to {self.end:,}"] if self.end is not None else []
        facts = [f"lr {model.base_learning_rate:g} (not scaled)"]
        facts += [f"GAN from iteration {-(-loss.disc_start // 2):,}, weight {loss.disc_weight:g}"] if loss.disc_factor else ["no GAN"]
        if model.params.use_vf is not None:
            fixed = ", projection fixed" if model.params.proj_fix else ""
            facts.append(f"VF weight {loss.vf_weight:g}, margins {loss.distmat_margin:g} and {loss.cos_margin:g}{fixed}")
        return f"{self.name or 'one'}: {' = '.join(length)}; {'; '.join(facts)}"


def plan_stages(config: TokenizerConfig, images: Any) -> tuple[PlannedStage, ...]:
    """Each stage that has steps, `images` long where they are None; a run without stages is one, of train.max_steps or of epochs."""
    if not config.stages:
        steps = config.train.max_steps
        epochs = (config.lightning.trainer.max_epochs or RECIPE_EPOCHS) if steps is None else None
        end = steps if steps is not None else _steps(config, epochs, images)
        return (PlannedStage(None, config, epochs, None if end is None else 0, end),)
    planned, begin = [], 0
    for stage in config.stages:
        length = stage.steps if stage.epochs is None else _steps(config, stage.epochs, images)
        end = None if begin is None or length is None else begin + length
        if length != 0:
            planned.append(PlannedStage(stage.name, config.at(stage), stage.epochs, None if end is None else begin, end))
        begin = end
    if not planned:
        raise BadInput("stages: all are 0 steps long; give one of them epochs or steps")
    return tuple(planned)


def run_length(config: TokenizerConfig, stages: tuple[PlannedStage, ...]) -> int | None:
    """The steps of the run: those of its stages, or train.max_steps of them. None where that is not known without images."""
    whole, asked = stages[-1].end, config.train.max_steps
    if whole is None or asked is None:
        return whole
    require(asked <= whole, "train.max_steps", asked, f"at most {whole}, the steps of all stages")
    return asked


def _steps(config: TokenizerConfig, epochs: int, images: Any) -> int | None:
    if epochs == 0:
        return 0
    return None if images is None else math.ceil(epochs * len(images) / config.global_batch_size)
