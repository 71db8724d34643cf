"""Small networks with the calling convention of LightningDiT: model(x, t, y) and the reference's forward_with_cfg."""

import torch
from torch import Tensor, nn


class ToyDiT(nn.Module):
    """A velocity that depends on x, t and y, row by row; class `classes` is the null class. Counts the rows it is given."""

    def __init__(self, channels: int = 5, classes: int = 10, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.mix = nn.Parameter(torch.randn(channels, channels, generator=generator).to(dtype) / channels)
        self.table = nn.Parameter(torch.randn(classes + 1, channels, generator=generator).to(dtype))
        self.null_label = classes
        self.calls: list[tuple[int, float]] = []  # rows, first time

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((len(x), t[0].item()))
        t = t.reshape(-1, 1, 1, 1)
        mixed = (x.unsqueeze(1) * self.mix[:, :, None, None]).sum(2)  # elementwise, so rows do not share a matmul
        return torch.tanh(mixed + self.table[y][:, :, None, None] * torch.cos(3 * t)) - t * x

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_interval=None, cfg_interval_start=None):
        """The formula of DiT and LightningDiT on 2N rows [x, x], [y, null]: three channels, off below the start."""
        out = self.forward(torch.cat((x[: len(x) // 2],) * 2), t, y)
        cond, uncond = out[:, :3].chunk(2)
        mixed = cond if cfg_interval and t[0] < cfg_interval_start else uncond + cfg_scale * (cond - uncond)
        return torch.cat((torch.cat((mixed, mixed)), out[:, 3:]), dim=1)
