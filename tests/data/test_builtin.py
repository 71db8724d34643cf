"""The bundled digits: complete, split once, and the same after the way up and down."""

import numpy as np
import pytest
import torch

from vavae_fast.data import digits, digits_from_images, open_images
from vavae_fast.errors import BadInput


def test_digits_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.datasets")
    bunch = sklearn.load_digits()
    images, labels = digits()
    assert np.array_equal(images.numpy(), bunch.images) and np.array_equal(labels.numpy(), bunch.target)


def test_the_split_is_stratified_and_disjoint():
    (train, train_labels), (test, test_labels), (images, labels) = digits("train"), digits("test"), digits("all")
    assert (len(train), len(test), len(images)) == (1437, 360, 1797)
    assert torch.equal(torch.bincount(test_labels), torch.full((10,), 36))
    assert torch.equal(torch.bincount(train_labels) + torch.bincount(test_labels), torch.bincount(labels))
    rows = lambda x: sorted(map(bytes, x.flatten(1).numpy()))
    assert sorted(rows(train) + rows(test)) == rows(images)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_up_by_replication_and_down_by_area_mean_is_the_identity(size, layout):
    images = open_images("builtin:digits", size=size)
    pixels = images.read(range(len(images)))
    assert pixels.shape == (1797, 3, size, size) and pixels.max() == 255 and pixels.min() == 0
    if layout == "NHWC":
        pixels = pixels.permute(0, 2, 3, 1).numpy()
    originals, _ = digits()
    assert torch.equal(digits_from_images(pixels, rounded=True), originals.float())
    assert (digits_from_images(pixels) - originals).abs().max() <= 0.5 * 16 / 255 + 1e-5


def test_builtin_images_have_the_interface_of_files():
    for name, count in (("builtin:digits", 1797), ("builtin:digits/train", 1437), ("builtin:digits/test", 360)):
        images = open_images(name, size=16, crop="random")
        assert len(images) == count and images.classes == list("0123456789") and images.labels.dtype == torch.int64
    batch = next(iter(images.batches(5, start=3)))
    assert torch.equal(batch.pixels, images.read([3, 4, 5, 6, 7])) and torch.equal(batch.labels, images.labels[3:8])
    with pytest.raises(IndexError):
        images.read([360])


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 1, 8, 8), (2, 3, 12, 8), (2, 3, 0, 0)])
def test_the_way_back_refuses_other_shapes(shape):
    with pytest.raises(BadInput):
        digits_from_images(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(BadInput):
        digits("valid")
