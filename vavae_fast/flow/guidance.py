"""Classifier-free guidance (Ho and Salimans 2022) inside an interval of times (Kynkaanniemi et al. 2024); autoguidance.

    guided = weak + scale (cond - weak)   where start <= t <= end,   else cond

weak is the model without its label, or, in autoguidance (Karras et al. 2024), a lesser model with it. LightningDiT guides the
first 3 channels only, a legacy of GLIDE that its published scales (6.7, 10) go with; the other channels stay conditional.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vavae_fast.errors import require
from vavae_fast.flow.paths import batch_time, like, require_like

Model = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x (B, ...), t (B,), y (B,)) -> (B, ...)


def guided(
    model: Model,
    cfg_scale: float,
    y: Tensor,
    null_label: int,
    channels: int | str = 3,
    interval: tuple[float, float] = (0.0, 1.0),
    guide: Model | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """-> predict(x (B, C, ...), t) -> (B, C, ...), from model(x, t (B,), y (B,)) and labels y (B,).

    t () on the CPU, as fixed steps have it: the host decides, and outside the interval the model sees B samples instead
    of 2B. t (B,), as dopri5 has it: every sample is evaluated twice and each decides for itself on the device.
    channels: how many are guided, from the first, or "all". An end of 1 is no upper bound. Scale 1 is no guidance.
    guide: the lesser model of autoguidance; None: the model itself, with null_label.
    `BadInput` where the model's output is not of its input's shape.
    """
    require(channels == "all" or (isinstance(channels, int) and channels >= 1), "cfg_channels", channels, 'a count from 1 or "all"')
    start, end = interval
    require(start <= end, "cfg_interval", interval, "(start, end) with start <= end")
    labels = torch.cat((y, torch.full_like(y, null_label)))

    def both(x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """cond, weak."""
        if guide is not None:
            return require_like(model(x, times, y), x), require_like(guide(x, times, y), x)
        twice = torch.cat((x, x))
        cond, uncond = require_like(model(twice, torch.cat((times, times)), labels), twice).chunk(2)
        return cond, uncond

    def acts(t: Tensor) -> Tensor:
        """In t's own precision: a float32 time on the border is compared with the float32 border."""
        return (t >= start) & ((t <= end) | (end >= 1.0))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        times, inside = batch_time(t, x), acts(t)
        host_decides = t.ndim == 0 and t.device.type == "cpu"
        if cfg_scale == 1 or (host_decides and not inside):
            return model(x, times, y)
        cond, weak = both(x, times)
        count = x.shape[1] if channels == "all" else channels
        mixed = weak[:, :count] + cfg_scale * (cond[:, :count] - weak[:, :count])
        if not host_decides:
            mixed = torch.where(like(inside, x), mixed, cond[:, :count])
        return torch.cat((mixed, cond[:, count:]), dim=1)

    return predict
