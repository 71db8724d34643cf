"""The evaluation as a whole, with a small stand-in for Inception: values, names, protocol, refusals."""

import numpy as np
import pytest
import torch

from vavae_fast.errors import BadInput
from vavae_fast.evaluation import (
    METRICS,
    ReferenceStatistics,
    evaluate_samples,
    feature_statistics,
    frechet_distance,
    inception_score,
    precision_recall,
)
from vavae_fast.evaluation.evaluate import fid_name, frechet_standard_error, require_count
from vavae_fast.evaluation.inception import InceptionFeatures


class Pixels:
    """Features that are linear in the pixels: enough to follow every number by hand."""

    sha256 = "0" * 64
    recognised = True
    seen = 0

    def __call__(self, images):
        self.seen += len(images)
        flat = images.flatten(1).float() / 255
        return InceptionFeatures(flat[:, :10], flat[:, 10:15], flat[:, :4] * 5)


def draw(n, seed, low=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(low, 256, (n, 3, 4, 4), dtype=np.uint8))


@pytest.fixture(scope="module")
def samples():
    return draw(2100, seed=0)


@pytest.fixture(scope="module")
def real():
    return draw(2048, seed=1, low=30)


def test_values_are_those_of_the_single_functions(samples, real):
    features = Pixels()
    found = evaluate_samples(samples.split(256), ReferenceStatistics("real", images=real.split(500)), METRICS, features)
    ours, theirs = Pixels()(samples), Pixels()(real)
    assert features.seen == 2100 + 2048, "one pass over each set"
    expected = {
        "fid": frechet_distance(*feature_statistics(ours.pool), *feature_statistics(theirs.pool)),
        "sfid": frechet_distance(*feature_statistics(ours.spatial), *feature_statistics(theirs.spatial)),
        "is": inception_score(ours.logits),
    }
    expected["precision"], expected["recall"] = precision_recall(theirs.pool, ours.pool)
    protocol = found.pop("protocol")
    assert found == pytest.approx(expected, rel=1e-10)
    assert protocol["fid_name"] == "FID-2100" and protocol["samples"] == 2100 and protocol["image_size"] == [4, 4]
    assert protocol["inception_sha256"] == "0" * 64 and protocol["reference"] == "real" and protocol["warnings"] == []


@pytest.mark.parametrize("batch", [3, 77, 2100])
def test_values_do_not_move_with_the_batch_size(samples, real, batch):
    reference = ReferenceStatistics("real", images=[real])
    whole = evaluate_samples([samples], reference, ("fid", "is"), Pixels())
    parts = evaluate_samples(samples.split(batch), reference, ("fid", "is"), Pixels())
    assert (parts["fid"], parts["is"]) == pytest.approx((whole["fid"], whole["is"]), rel=1e-10)


def test_stored_moments_need_no_images(samples, real):
    theirs = Pixels()(real)
    (mu, sigma), (mu_s, sigma_s) = feature_statistics(theirs.pool.numpy()), feature_statistics(theirs.spatial.numpy())
    stored = ReferenceStatistics("stored.npz", "f" * 64, mu, sigma, mu_s, sigma_s)
    found = evaluate_samples([samples.numpy()], stored, ("fid", "sfid", "is"), Pixels())
    images = evaluate_samples([samples], ReferenceStatistics("real", images=[real]), ("fid", "sfid", "is"), Pixels())
    assert [found[m] for m in ("fid", "sfid", "is")] == pytest.approx([images[m] for m in ("fid", "sfid", "is")], rel=1e-9)
    assert found["protocol"]["reference_sha256"] == "f" * 64


def test_only_what_is_asked(samples, real):
    found = evaluate_samples([samples], ReferenceStatistics("real", images=[real]), ("recall",), Pixels())
    assert set(found) == {"recall", "protocol"}


def test_bootstrap_error_is_the_spread_of_the_mean():
    """With a fixed covariance far from zero the distance moves as 2 |mu1 - mu2| se(mean): the error is known."""
    x = torch.randn(1000, 1, dtype=torch.float64)
    mu, sigma = torch.tensor([10.0], dtype=torch.float64), torch.eye(1, dtype=torch.float64)
    error = frechet_standard_error(x, mu, sigma, repeats=100, seed=0)
    assert error == pytest.approx(2 * 10 / 1000**0.5, rel=0.3)  # 100 repeats know a spread to 7 %
    assert error == frechet_standard_error(x, mu, sigma, repeats=100, seed=0)
    assert error != frechet_standard_error(x, mu, sigma, repeats=100, seed=1)


def test_bootstrap_stands_in_the_result(samples, real):
    found = evaluate_samples([samples], ReferenceStatistics("real", images=[real]), ("fid",), Pixels(), bootstrap=5)
    assert 0 < found["fid_standard_error"] < found["fid"]


def test_every_value_has_its_standard_error(samples, real):
    reference = ReferenceStatistics("real", images=[real])
    found = evaluate_samples([samples], reference, METRICS, Pixels(), bootstrap=4)
    plain = evaluate_samples([samples], reference, METRICS, Pixels())
    assert {name: found[name] for name in METRICS} == {name: plain[name] for name in METRICS}, "resampling changes no value"
    assert set(found) == {*METRICS, *(f"{name}_standard_error" for name in METRICS), "protocol"} and found["protocol"]["bootstrap"] == 4
    share = found["precision"]
    assert found["precision_standard_error"] == pytest.approx((share * (1 - share) / 2100) ** 0.5)
    assert 0 < found["sfid_standard_error"] < found["sfid"] and 0 < found["is_standard_error"] < found["is"]


def test_a_distance_in_another_space(samples, real):
    """Of features that the caller gives; Inception is not needed for it alone."""

    class Corners:
        name, sha256 = "corners", "1" * 64

        def __call__(self, images):
            return images[:, :, ::3, ::3].double().flatten(1)

    reference = ReferenceStatistics("real", images=real.split(500))
    found = evaluate_samples(samples.split(300), reference, ("fd",), None, bootstrap=3, embedding=Corners())
    expected = frechet_distance(*feature_statistics(Corners()(samples)), *feature_statistics(Corners()(real)))
    assert found["fd"] == pytest.approx(expected, rel=1e-9) and 0 < found["fd_standard_error"] < found["fd"]
    assert (found["protocol"]["fd_features"], found["protocol"]["fd_sha256"], found["protocol"]["warnings"]) == ("corners", "1" * 64, [])
    both = evaluate_samples([samples], reference, ("fd", "fid"), Pixels(), embedding=Corners())
    assert both["fd"] == pytest.approx(expected, rel=1e-9) and both["fid"] != both["fd"]
    with pytest.raises(BadInput, match="fd; choose among"):
        evaluate_samples([samples], reference, ("fd",), Pixels())
    with pytest.raises(BadInput, match="no images .* for fd"):
        evaluate_samples([samples], ReferenceStatistics("moments", None, torch.zeros(3), torch.eye(3)), ("fd",), None, embedding=Corners())


def test_fewer_than_50000_samples_have_a_name_of_their_own():
    assert [fid_name(n) for n in (5000, 49_999, 50_000, 60_000)] == ["FID-5000", "FID-49999", "FID", "FID"]


def test_too_few_for_fid(samples, real):
    reference = ReferenceStatistics("real", images=[real])
    with pytest.raises(BadInput, match="samples: 2047 images, FID and sFID need 2048"):
        evaluate_samples([samples[:2047]], reference, ("sfid",), Pixels())
    with pytest.raises(BadInput, match="few: 100 images"):
        evaluate_samples([samples], ReferenceStatistics("few", images=[real[:100]]), ("fid",), Pixels())
    with pytest.raises(BadInput, match="samples: 3 images, precision and recall need 4 or more"):
        evaluate_samples([samples[:3]], reference, ("recall",), Pixels())
    with pytest.raises(BadInput, match="few: 3 images, precision and recall need 4"):
        evaluate_samples([samples[:9]], ReferenceStatistics("few", images=[real[:3]]), ("precision",), Pixels())
    require_count(100, ("is", "precision"))
    assert 0 <= evaluate_samples([samples[:100]], reference, ("precision",), Pixels())["precision"] <= 1


def test_reference_without_what_a_metric_needs(samples):
    reference = ReferenceStatistics("pooled.npz", mu=np.zeros(10), sigma=np.eye(10))
    with pytest.raises(BadInput, match="pooled.npz: has no images .* for sfid, recall"):
        evaluate_samples([samples], reference, ("fid", "sfid", "recall"), Pixels())
    with pytest.raises(BadInput, match="--metrics: kid; choose among fid,sfid,is,precision,recall"):
        evaluate_samples([samples], reference, ("fid", "kid"), Pixels())


@pytest.mark.parametrize("metrics, count", [(("fid", "sfid"), 2048), (("precision", "recall"), 200)])
def test_only_is_moves_with_the_order_of_the_images(samples, real, metrics, count):
    """And the hashes that name the images stay, whatever order, batch or file they came in."""
    order = torch.from_numpy(np.random.default_rng(5).permutation(count))
    one = evaluate_samples([samples[:count]], ReferenceStatistics("real", images=[real[:count]]), metrics, Pixels())
    shuffled = ReferenceStatistics("real", images=[real[:count][order]])
    other = evaluate_samples(samples[:count].flip(0).split(100), shuffled, metrics, Pixels())
    assert [one[m] for m in metrics] == pytest.approx([other[m] for m in metrics], rel=1e-9) and one["protocol"] == other["protocol"]


def test_one_pixel_changes_the_hash_of_the_images(samples, real):
    changed = samples[:20].clone()
    changed[0, 0, 0, 0] ^= 1
    found = [evaluate_samples([images], ReferenceStatistics("real", images=[real[:20]]), ("recall",), Pixels())["protocol"] for images in
             (samples[:20], changed)]  # fmt: skip
    assert found[0]["samples_sha256"] != found[1]["samples_sha256"] and found[0]["reference_sha256"] == found[1]["reference_sha256"]


def test_images_of_one_colour_are_counted():
    """One that begins like one, and differs in its last pixel, is none."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 3, 16, 16), dtype=np.uint8))
    images[:3] = torch.tensor([7, 9, 200], dtype=torch.uint8)[:, None, None]
    images[2, 1, -1, -1] += 1
    found = evaluate_samples(images.split(5), ReferenceStatistics("real", images=[images]), ("recall",), Pixels())
    assert "samples: 2 of 12 images are of one colour" in found["protocol"]["warnings"]


def test_a_reference_of_another_size_is_said(samples):
    larger = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (50, 3, 8, 8), dtype=np.uint8))
    found = evaluate_samples([samples[:50]], ReferenceStatistics("large.npz", images=[larger]), ("precision",), Pixels())
    assert found["protocol"]["warnings"] == ["large.npz: images of 8 x 8 pixels, the samples have 4 x 4"]


def test_reference_of_other_features(samples):
    reference = ReferenceStatistics("other.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(ValueError, match="10 dimensions.* 7"):
        evaluate_samples([samples], reference, ("fid",), Pixels())


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "no images"),
        ([np.zeros((5, 3, 4, 4), np.uint8)], "all 5 images are of one colour"),
        ([np.zeros((5, 3, 4, 4))], "uint8"),
        ([np.zeros((5, 4, 4, 3), np.uint8)], "uint8"),
        ([np.full((5, 3, 4, 4), np.nan)], "uint8"),
        ([draw(5, 0), draw(5, 0)[..., :3]], "image 5 is"),
    ],
)
def test_wrong_images_are_one_clear_line(real, batches, message):
    with pytest.raises(ValueError, match=f"samples: .*{message}"):
        evaluate_samples(batches, ReferenceStatistics("real", images=[real]), ("is",), Pixels())


def test_suspicious_images_are_reported(samples, real):
    dull = samples.clone()
    dull[3], dull[10:20] = 7, dull[9]
    found = evaluate_samples([dull], ReferenceStatistics("real", images=[real]), ("is",), Pixels())
    assert found["protocol"]["warnings"] == [
        "samples: 1 of 2100 images are of one colour",
        "samples: 10 of 2100 images are copies of others",
    ]


def test_unknown_weights_are_reported(samples, real):
    features = Pixels()
    features.recognised = False
    found = evaluate_samples([samples], ReferenceStatistics("real", images=[real]), ("is",), features)
    assert "weights are not the known ones" in found["protocol"]["warnings"][0]
