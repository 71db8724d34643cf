"""PSNR and SSIM against their formulas, window by window, and against torchmetrics where it is installed."""

import numpy as np
import pytest
import torch

from vavae_fast.evaluation import psnr, ssim


def images(n=2, c=3, h=16, w=19, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, (n, c, h, w), dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    return a, b


def ssim_by_windows(a, b, data_range):
    """Wang et al. 2004, one 11 x 11 window at a time."""
    offset = np.arange(-5, 6)
    row = np.exp(-(offset**2) / (2 * 1.5**2))
    weight = np.outer(row, row) / row.sum() ** 2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (weight * x).sum(), (weight * y).sum()
            vx, vy, cov = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum(), (weight * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


def test_psnr_formula_and_ranges():
    a, b = images()
    mse = ((a.astype(float) - b) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(psnr(a, b), 10 * np.log10(255**2 / mse), rtol=1e-13)
    np.testing.assert_allclose(psnr(a / 255, b / 255), psnr(a, b), rtol=1e-12)
    np.testing.assert_allclose(psnr(a / 127.5 - 1, b / 127.5 - 1, data_range=2), psnr(a, b), rtol=1e-12)


def test_equal_images():
    a, _ = images()
    assert np.isposinf(psnr(a, a)).all()
    for border in ("valid", "reflect"):
        np.testing.assert_allclose(ssim(a, a, border=border), 1.0, rtol=1e-14)


def test_uint8_does_not_wrap():
    a, b = np.zeros((1, 1, 11, 11), np.uint8), np.full((1, 1, 11, 11), 255, np.uint8)
    assert psnr(a, b)[0] == psnr(b, a)[0] == 0.0


def test_ssim_matches_wang_window_by_window():
    a, b = images()
    expected = [np.mean([ssim_by_windows(x.astype(float), y.astype(float), 255) for x, y in zip(p, q)]) for p, q in zip(a, b)]
    np.testing.assert_allclose(ssim(a, b), expected, rtol=1e-11)


def test_ssim_reflect_is_valid_on_the_mirrored_image():
    a, b = images()
    pad = [(0, 0), (0, 0), (5, 5), (5, 5)]
    np.testing.assert_allclose(ssim(a, b, border="reflect"), ssim(np.pad(a, pad, "reflect"), np.pad(b, pad, "reflect")), rtol=1e-13)
    assert not np.allclose(ssim(a, b, border="reflect"), ssim(a, b), rtol=1e-4)


def test_ssim_agrees_with_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.image")
    a, b = (torch.from_numpy(x / 255) for x in images())
    theirs = functional.structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(a, b, border="reflect"), theirs, rtol=1e-9, atol=1e-9)


def test_ssim_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = images()
    options = dict(data_range=255, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    expected = [metrics.structural_similarity(x, y, **options) for x, y in zip(a, b)]
    np.testing.assert_allclose(ssim(a, b), expected, rtol=1e-9)


def test_values_do_not_move_with_the_batch():
    a, b = images(n=4)
    for metric in (psnr, ssim):
        np.testing.assert_allclose(metric(a, b), np.concatenate([metric(a[i : i + 1], b[i : i + 1]) for i in range(4)]), rtol=1e-13)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_symmetric_and_of_the_kind_given(metric):
    a, b = images()
    np.testing.assert_allclose(metric(a, b), metric(b, a), rtol=1e-13)
    assert isinstance(metric(a, b), np.ndarray) and metric(a, b).shape == (2,)
    found = metric(torch.from_numpy(a), torch.from_numpy(b))
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float64


def test_half_precision_images_are_compared_in_fp64():
    a = torch.rand(1, 3, 16, 16).half()
    b = (a + 0.01).half()
    torch.testing.assert_close(psnr(a, b), psnr(a.double(), b.double()), rtol=0, atol=0)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    "a, b, data_range, message",
    [
        (np.zeros((1, 3, 16, 16)), np.zeros((1, 3, 16, 15)), None, "same shape"),
        (np.zeros((1, 3, 16, 16), np.uint8), np.zeros((1, 3, 16, 16)), None, "same dtype"),
        (np.zeros((3, 16, 16)), np.zeros((3, 16, 16)), None, "shape"),
        (np.full((1, 3, 16, 16), np.nan), np.zeros((1, 3, 16, 16)), None, "NaN"),
        (np.zeros((1, 3, 16, 16), np.int64), np.zeros((1, 3, 16, 16), np.int64), None, "data_range"),
        *((np.zeros((1, 3, 16, 16)), np.zeros((1, 3, 16, 16)), r, "^data_range: must be a positive number") for r in (0, "1", np.nan, [1])),
    ],
)
def test_wrong_input_is_one_clear_line(metric, a, b, data_range, message):
    with pytest.raises(ValueError, match=message):
        metric(a, b, data_range)


def test_ssim_refuses_small_images_and_unknown_borders():
    small = np.zeros((1, 1, 10, 20))
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(small, small)
    assert ssim(small, small, border="reflect") == pytest.approx(1.0)
    with pytest.raises(ValueError, match="6 x 6"):
        ssim(small[:, :, :5], small[:, :, :5], border="reflect")
    with pytest.raises(ValueError, match="border"):
        ssim(small, small, border="same")
