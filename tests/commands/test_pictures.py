"""Pictures: colours at known values, frames, differences, bars and dots where they belong."""

import numpy as np
import torch

from vavae_fast.commands._pictures import RISING, SIGNED, coloured, density_scatter, differences, framed, histograms, similarity_rows


def test_colours_at_their_stops_between_and_beyond():
    found = coloured(np.array([-2.0, -1.0, 0.0, 0.25, 1.0, 9.0]), -1.0, 1.0, SIGNED)
    assert found.dtype == np.uint8 and found[0].tolist() == found[1].tolist() == list(SIGNED[0])
    assert found[2].tolist() == list(SIGNED[2]) and found[4].tolist() == found[5].tolist() == list(SIGNED[4])
    assert np.abs(found[3] - (np.array(SIGNED[2]) + SIGNED[3]) / 2).max() <= 0.5


def test_a_frame_surrounds_what_a_token_covers_and_copies():
    images = torch.zeros(2, 3, 32, 16, dtype=torch.uint8)
    found = framed(images, (1, 0), (4, 2))
    changed = found[0].any(dim=0)
    assert not images.any() and changed[8:16, 0:8].sum() == changed.sum() == 28, "the border of 8 x 8"
    assert not found[:, :, 9:15, 1:7].any()


def test_rows_hold_image_and_a_map_of_each_grid():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    z, features = torch.randn(2, 4, 2, 2), torch.randn(2, 5, 4, 4)
    found = similarity_rows(images, (z, features), (1, 0))
    assert found.shape == (6, 3, 8, 8) and found.dtype == torch.uint8
    for k in range(2):
        assert found[3 * k + 1, :, 7, 0].tolist() == list(SIGNED[4]), "its own place is red"
        assert len(found[3 * k + 1].flatten(1).unique(dim=1).T) <= 4 < len(found[3 * k + 2].flatten(1).unique(dim=1).T)


def test_differences_are_grey_where_equal():
    a, b = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8), torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    b[0, 0, 0, 0], b[0, 1, 0, 0], b[0, 2, 0, 0] = 110, 90, 255
    assert differences(a, b)[0, :, 0, 0].tolist() == [148, 108, 255] and (differences(a, b)[0, :, 1] == 128).all()


def test_bars_are_as_high_as_their_counts():
    found = histograms(np.array([[0, 10, 5], [2, 0, 0]]), height=20, bar=2)
    assert found.shape == (2, 20, 6, 3)
    bars = (found != found[0, 0, 0]).any(axis=-1).sum(axis=1)
    assert bars.tolist() == [[0, 0, 20, 20, 10, 10], [4, 4, 0, 0, 0, 0]]


def test_dots_stand_at_their_points_densest_on_top():
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    sheet = density_scatter(points, np.array([0.0, 0.5, 0.5, 0.1, 1.0]), side=100)
    assert sheet.shape == (100, 100, 3) and sheet[12, 12].tolist() == list(RISING[0]) and sheet[88, 88].tolist() == list(RISING[-1])
    assert sheet[50, 50].tolist() == [255, 255, 255] and density_scatter(points[:1], np.zeros(1), side=40).shape == (40, 40, 3)
