"""Global features of images: one row an image, whatever its size, from the class token or the mean over patches."""

from importlib.util import find_spec

import pytest
import torch

from vavae_fast.errors import BadInput
from vavae_fast.models.image_features import ImageFeatures

pytestmark = pytest.mark.skipif(find_spec("timm") is None, reason="pip install timm")


@pytest.fixture(scope="module")
def dino():
    return ImageFeatures("dinov2-small", None, random=True)


def test_one_row_an_image_of_the_class_token(dino):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    rows = dino(images)
    assert rows.shape == (2, 384) and rows.dtype == torch.float32 and dino.sha256 is None
    torch.testing.assert_close(dino(images[1:]), rows[1:], rtol=1e-4, atol=1e-5)
    shown = torch.nn.functional.interpolate(images / 127.5 - 1, size=(224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = dino.encoder.transformer.forward_features(((shown + 1) / 2 - mean) / std)[:, 0]
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


def test_weights_come_from_a_file_and_are_named_by_its_hash(dino, tmp_path):
    path = tmp_path / "dino.pth"
    torch.save(dino.encoder.transformer.state_dict(), path)
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    loaded = ImageFeatures("dinov2-small", path)
    assert len(loaded.sha256) == 64 and torch.equal(loaded(images), dino(images))
    with pytest.raises(BadInput, match="no foundation model 'dinov22'"):
        ImageFeatures("dinov22", path)
