"""uint8 pixels and the range of the models."""

import torch

from vavae_fast.pixels import to_uint8, to_unit


def test_to_uint8_truncates_as_the_reference_does():
    images = torch.tensor([-2.0, -1.0, -128 / 127.5 + 1 / 127.5, 0.0, 0.5, 1.0, 3.0])
    assert to_uint8(images).tolist() == [0, 0, 1, 128, 191, 255, 255]
    assert to_uint8(images.bfloat16()).dtype == torch.uint8


def test_every_pixel_comes_back():
    """x -> x / 127.5 - 1 -> trunc(127.5 y + 128) is the identity: half a step stands between a value and the next."""
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit(pixels)), pixels)
    assert to_unit(pixels)[0] == -1 and to_unit(pixels)[255] == 1
