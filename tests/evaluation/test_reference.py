"""ADM's npz layouts: what NumPy writes opens here, what is written here opens in NumPy, damage is named."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch

from vavae_fast.errors import BadInput
from vavae_fast.evaluation import NpzImages, load_reference, save_reference


def moments(d, seed=0):
    x = np.random.default_rng(seed).standard_normal((50, d))
    return x.mean(0), np.cov(x, rowvar=False)


def nhwc(n=7, h=5, w=4):
    return np.random.default_rng(0).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_adm_layout(tmp_path, save):
    (mu, sigma), (mu_s, sigma_s), images = moments(4), moments(3, 1), nhwc()
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    save(path, images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    reference = load_reference(path, batch_size=3)
    for name, value in dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s).items():
        np.testing.assert_array_equal(getattr(reference, name), value)
    batches = list(reference.images)
    assert [len(batch) for batch in batches] == [3, 3, 1] and len(reference.images) == 7
    np.testing.assert_array_equal(torch.cat(batches).permute(0, 2, 3, 1), images)
    assert reference.name == path.name and len(reference.sha256) == 64


def test_round_trip_of_our_own(tmp_path):
    (mu, sigma), (mu_s, sigma_s) = moments(4), moments(3, 1)
    save_reference(tmp_path / "ours.npz", torch.from_numpy(mu), sigma, mu_s, sigma_s)
    assert [file.name for file in tmp_path.iterdir()] == ["ours.npz"]
    with np.load(tmp_path / "ours.npz") as file:
        assert sorted(file.files) == ["mu", "mu_s", "sigma", "sigma_s"]
    again = load_reference(tmp_path / "ours.npz")
    np.testing.assert_array_equal(again.mu, mu)
    np.testing.assert_array_equal(again.sigma_s, sigma_s)
    assert again.images is None


def test_images_iterate_again_from_the_first(tmp_path):
    np.savez(tmp_path / "samples.npz", nhwc(), np.arange(7))
    images = NpzImages(tmp_path / "samples.npz", batch_size=100)
    assert torch.equal(next(iter(images)), next(iter(images)))


def test_statistics_of_the_pooled_features_alone(tmp_path):
    mu, sigma = moments(4)
    np.savez(tmp_path / "r.npz", mu=mu, sigma=sigma)
    reference = load_reference(tmp_path / "r.npz")
    assert reference.mu_s is None and reference.images is None


def wrong_files():
    mu, sigma = moments(4)
    yield "nothing of ours", dict(x=mu), "needs mu and sigma, or arr_0"
    yield "half", dict(mu=mu), "only one of mu and sigma"
    yield "shape", dict(mu=mu, sigma=sigma[:3]), r"\(3, 4\)"
    yield "nan", dict(mu=mu * np.nan, sigma=sigma), "mu holds NaN"
    yield "pickle", dict(arr_0=np.array([{}, None], dtype=object)), "arr_0 is object"
    yield "pickled moments", dict(mu=np.array([None]), sigma=sigma), "mu object"
    yield "float images", dict(arr_0=np.zeros((2, 4, 4, 3))), "arr_0 is float64"
    yield "nchw", dict(arr_0=np.zeros((2, 3, 4, 4), np.uint8)), r"\(N, H, W, 3\)"
    yield "no images", dict(arr_0=np.zeros((0, 4, 4, 3), np.uint8)), "no images"
    yield "fortran", dict(arr_0=np.asfortranarray(nhwc())), "Fortran"


@pytest.mark.parametrize("arrays, message", [pytest.param(a, m, id=name) for name, a, m in wrong_files()])
def test_wrong_files_are_named_in_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(BadInput, match=f"r.npz: .*{message}") as error:
        load_reference(tmp_path / "r.npz")
    assert "\n" not in str(error.value)


def test_fewer_images_than_the_archive_holds_are_not_taken_for_all(tmp_path):
    """(7, 4, 4, 3) in the header, one bit on, is (6, …, or (3, …: the checksum behind the seventh image is never met."""
    np.savez(tmp_path / "r.npz", arr_0=nhwc())
    data = (tmp_path / "r.npz").read_bytes()
    for n in (b"6", b"5", b"3"):
        (tmp_path / "r.npz").write_bytes(data.replace(b"'shape': (7,", b"'shape': (" + n + b",", 1))
        with pytest.raises(BadInput, match="does not fill its|does not fill|cannot be read"):
            load_reference(tmp_path / "r.npz")


def test_missing_text_and_damaged_files(tmp_path):
    with pytest.raises(BadInput, match="absent.npz: no such file"):
        load_reference(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(BadInput, match="text.npz: not an .npz"):
        load_reference(tmp_path / "text.npz")
    np.savez(tmp_path / "labels.npz", x=np.zeros(3))
    with pytest.raises(BadInput, match="labels.npz: holds no arr_0"):
        NpzImages(tmp_path / "labels.npz")
    np.savez(tmp_path / "whole.npz", nhwc(50, 16, 16))
    data = bytearray((tmp_path / "whole.npz").read_bytes())
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match="cut.npz: not an .npz"):
        load_reference(tmp_path / "cut.npz")
    data[len(data) // 2] ^= 255
    (tmp_path / "flipped.npz").write_bytes(data)
    images = load_reference(tmp_path / "flipped.npz").images
    with pytest.raises(BadInput, match="flipped.npz: cannot be read .BadZipFile"):
        list(images)


def test_statistics_of_more_features_than_any_network_has(tmp_path):
    """Refused from its header: a file of a few kilobytes may unfold to gigabytes of zeros."""
    with zipfile.ZipFile(tmp_path / "r.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in (("mu", (5000,)), ("sigma", (5000, 5000))):
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(head, dict(descr="<f8", fortran_order=False, shape=shape))
            archive.writestr(f"{name}.npy", head.getvalue() + bytes(8 * int(np.prod(shape))))
    with pytest.raises(BadInput, match="D at most 4,096"):
        load_reference(tmp_path / "r.npz")


def test_a_header_that_is_no_array_s_and_an_archive_behind_something_else(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=nhwc())
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "behind.npz").write_bytes(b"#!/bin/sh\n" + data)
    with pytest.raises(BadInput, match="behind.npz: not an .npz file"):
        load_reference(tmp_path / "behind.npz")
    for text in ("((((", "9**9**9", "{'descr': [", "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -8, 8, 3), }"):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + bytes(64))
        with pytest.raises(BadInput, match="a.npz: "):
            load_reference(tmp_path / "a.npz")
