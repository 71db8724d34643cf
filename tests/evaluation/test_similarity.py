"""Similarity maps: cosines by hand, kinds kept, wrong input named."""

import numpy as np
import pytest
import torch

from vavae_fast.evaluation import similarity_map


def test_cosines_by_hand():
    features = torch.tensor([[3.0, 0.0, -6.0], [4.0, 0.0, -8.0]]).view(1, 2, 1, 3)
    assert similarity_map(features, (0, 0))[0, 0].tolist() == pytest.approx([1.0, 0.0, -1.0])
    assert similarity_map(features, (0, 1))[0, 0].tolist() == [0.0, 0.0, 0.0], "a zero token has cosine 0 with everything"


def test_the_token_in_the_middle_is_the_default_and_scale_does_not_matter():
    features = torch.randn(3, 5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = similarity_map(features)
    assert found.shape == (3, 4, 6) and torch.equal(found, similarity_map(features, (2, 3)))
    assert found[:, 2, 3] == pytest.approx(1.0)
    unit = features / features.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, (unit * unit[:, :, 2:3, 3:4]).sum(1).float())
    torch.testing.assert_close(similarity_map(7 * features), found)
    assert isinstance(similarity_map(features.numpy()), np.ndarray)


@pytest.mark.parametrize("features, token, message", [
    (torch.zeros(2, 3, 4), None, "features: expected shape"), (torch.full((1, 2, 2, 2), np.nan), None, "features: .* NaN"),
    (torch.zeros(1, 2, 2, 2), (2, 0), r"token: \(2, 0\) is outside a grid of 2 x 2"), (torch.zeros(1, 2, 2, 2), (0, -1), "token"),
])  # fmt: skip
def test_wrong_input_is_one_clear_line(features, token, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        similarity_map(features, token)
