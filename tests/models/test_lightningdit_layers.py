"""The parts of LightningDiT below the block, each by its law."""

import math

import pytest
import torch
from torch import nn

from vavae_fast.models.lightningdit_layers import RMSNorm, RotaryEmbedding2D, TimestepEmbedder


def test_rotary_embedding_is_a_complex_rotation():
    """Each interleaved pair is a complex number, turned by row · f_i in the first half and by column · f_i in the second."""
    grid, head_dim = 3, 12
    rope = RotaryEmbedding2D(head_dim, grid).double()
    frequency = 10000.0 ** (-torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    place = torch.arange(grid, dtype=torch.float64)
    row, column = (p.flatten() for p in torch.meshgrid(place, place, indexing="ij"))
    angle = torch.cat([torch.outer(row, frequency), torch.outer(column, frequency)], dim=1)
    rope.freqs_cos, rope.freqs_sin = (f(angle).repeat_interleave(2, dim=1) for f in (torch.cos, torch.sin))
    x = torch.randn(2, 4, grid * grid, head_dim, dtype=torch.float64)
    turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    torch.testing.assert_close(rope(x), turned, rtol=0, atol=1e-14)
    built = RotaryEmbedding2D(head_dim, grid)
    torch.testing.assert_close(built.freqs_cos.double(), rope.freqs_cos, rtol=0, atol=2e-7)
    torch.testing.assert_close(built.freqs_sin.double(), rope.freqs_sin, rtol=0, atol=2e-7)


def test_rotary_scores_depend_on_the_offset_alone():
    """q·k of two tokens is a function of (row - row', column - column'): what makes the embedding relative."""
    grid = 4
    rope = RotaryEmbedding2D(8, grid)
    q, k = torch.randn(8), torch.randn(8)
    scores = rope(q.expand(1, 1, grid * grid, 8))[0, 0] @ rope(k.expand(1, 1, grid * grid, 8))[0, 0].T
    scores = scores.view(grid, grid, grid, grid)
    torch.testing.assert_close(scores[1, 2, 0, 3], scores[3, 0, 2, 1])
    torch.testing.assert_close(scores[:-1, :, :-1, :], scores[1:, :, 1:, :], atol=1e-5, rtol=1e-5)
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3  # rows and columns are told apart


def test_rms_norm_has_unit_mean_square():
    x = 7 * torch.randn(5, 64, dtype=torch.float64)
    torch.testing.assert_close(RMSNorm(64).double()(x).square().mean(-1), torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=0)


def test_timestep_embedding_starts_with_cosines():
    embedder = TimestepEmbedder(256).double()
    embedder.mlp = nn.Sequential(nn.Linear(256, 256).double())
    nn.init.eye_(embedder.mlp[0].weight)
    nn.init.zeros_(embedder.mlp[0].bias)
    out = embedder(torch.tensor([0.3]))[0]
    assert out[0].item() == pytest.approx(math.cos(0.3), abs=1e-7) and out[128].item() == pytest.approx(math.sin(0.3), abs=1e-7)
    assert out[64].item() == pytest.approx(math.cos(0.3 / 100), abs=1e-7)  # 10000 ** -(64 / 128)
