"""Grids of samples: which labels, which picture a latent makes, where it is written."""

import numpy as np
import pytest
import torch
from PIL import Image

from vavae_fast.training.previews import latent_pixels, preview_labels, write_preview


@pytest.mark.parametrize("count, classes, labels", [
    (4, 1000, [0, 250, 500, 750]), (3, 3, [0, 1, 2]), (5, 2, [0, 1, 0, 1, 0]), (1, 10, [0]), (4, 6, [0, 1, 3, 4]),
])  # fmt: skip
def test_labels_are_spread_over_the_classes(count, classes, labels):
    assert preview_labels(count, classes).tolist() == labels


def test_latents_show_as_their_first_three_channels():
    latents = torch.zeros(1, 4, 1, 2)
    latents[0, 0, 0, 0], latents[0, 1, 0, 0], latents[0, 3] = 3.0, -9.0, 100.0
    pixels = latent_pixels(latents, 2)
    assert pixels.shape == (1, 3, 2, 4) and pixels.dtype == torch.uint8
    assert pixels[0, :, 0, 0].tolist() == [255, 0, 128] and pixels[0, :, 1, 1].tolist() == [255, 0, 128] and pixels[0, :, 0, 2].tolist() == [128] * 3
    one = latent_pixels(torch.ones(2, 1, 1, 1), 1)
    assert one.shape == (2, 3, 1, 1) and (one == one[0, 0]).all()


def test_a_grid_is_one_file_named_by_its_step(tmp_path):
    latents = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    sizes = []

    def pixels(part):
        sizes.append(len(part))
        return (part * 40).to(torch.uint8)

    path = write_preview(tmp_path, 120, latents, pixels, batch=2)
    assert path == tmp_path / "samples" / "step_00000120.png" and sizes == [2, 2, 1]
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (3 * 4 + 2, 2 * 4 + 2, 3)
    assert [[int(sheet[2 + 4 * r, 2 + 4 * c, 0]) for c in range(2)] for r in range(3)] == [[0, 40], [80, 120], [160, 255]]
    assert [file.name for file in path.parent.iterdir()] == ["step_00000120.png"]
