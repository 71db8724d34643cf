"""The Inception port: keys and numbers of torch-fidelity's on random weights, the resize, the loader's errors."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from vavae_fast.errors import BadInput
from vavae_fast.evaluation import Inception, load_inception
from vavae_fast.evaluation.inception import full_fp32, resize_tensorflow1


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights whose activations neither vanish nor explode, saved as the port's file is."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.25)
            nn.init.normal_(module.bias, 0, 0.1)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(weights):
    return load_inception(weights)


@pytest.fixture(scope="module")
def features(inception):
    """Of `images(2, (40, 56))`, computed once: a forward pass at 299 x 299 takes its time."""
    return inception(images(2, (40, 56)))


def images(n, size, seed=0):
    """Noise on a ramp that turns from image to image: they differ in what survives the resize."""
    noise, ramp = np.random.default_rng(seed).integers(0, 64, (n, 3, *size)), np.linspace(0, 190, size[1])
    return torch.from_numpy(np.stack([x + (ramp if i % 2 else ramp[::-1]) for i, x in enumerate(noise)]).astype(np.uint8))


def assert_equal_to_rounding(a, b):
    """fp32 through about 100 layers, each of which may round once relative to the largest value."""
    assert a.dtype == b.dtype == torch.float32
    assert (a - b).abs().max() <= 100 * torch.finfo(torch.float32).eps * b.abs().max()


@pytest.fixture(scope="module")
def torch_fidelity():
    """CPU torch beside a CUDA build of torchvision lacks these two schemas, and torch-fidelity imports torchvision."""
    if not torch.cuda.is_available():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


def test_same_numbers_as_torch_fidelity(torch_fidelity, weights, features):
    """Its strict loading takes our keys, so they are the port's; every output is equal to rounding."""
    theirs = torch_fidelity.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    spatial = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: spatial.append(output))
    pool, logits = theirs(images(2, (40, 56)))
    assert_equal_to_rounding(features.pool, pool)
    assert_equal_to_rounding(features.logits, logits)
    assert_equal_to_rounding(features.spatial, spatial[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1))


def test_resize_is_bit_exact_with_torch_fidelity(torch_fidelity):
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    for size in ((8, 8), (256, 256), (299, 299), (512, 300)):
        x = images(1, size).float()
        assert torch.equal(resize_tensorflow1(x), theirs(x, size=(299, 299), align_corners=False))


def test_shapes_and_parameter_count(inception, features):
    assert [tuple(value.shape) for value in features] == [(2, 2048), (2, 2023), (2, 1008)]
    assert sum(p.numel() for p in inception.parameters()) == 23_834_568 + 8 * 2049  # torchvision's without AuxLogits, and 8 more classes
    assert all((value[0] - value[1]).abs().max() > 0.05 * value.abs().max() for value in features), "random weights must tell images apart"


def test_neither_batch_nor_autocast_moves_features(inception, features):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = inception(images(2, (40, 56))[1:])
    for a, b in zip(features, alone):
        assert_equal_to_rounding(a[1:], b)


def test_resize_identity_and_corners():
    x = images(1, (299, 299)).float()
    assert torch.equal(resize_tensorflow1(x), x)
    small = torch.tensor([[[[0.0, 100.0], [200.0, 300.0]]]])
    out = resize_tensorflow1(small, size=4)[0, 0]
    assert out[0].tolist() == [0, 50, 100, 100]  # position i / 2, without half-pixel shift, clamped at the last pixel
    assert out[:, 0].tolist() == [0, 100, 200, 200]


def test_full_fp32_restores_what_it_found():
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    with pytest.raises(KeyError), full_fp32():
        assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
        raise KeyError
    assert (conv.fp32_precision, matmul.fp32_precision) == before


def test_file_hash_is_recorded(weights, inception):
    assert inception.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert not inception.recognised


def test_old_files_without_batch_counters_load(weights, inception, tmp_path):
    state = {key: value for key, value in torch.load(weights, weights_only=True).items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth")
    loaded = load_inception(tmp_path / "old.pth").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in inception.state_dict().items())


def test_errors_name_the_file_and_the_flag(weights, tmp_path):
    with pytest.raises(BadInput, match="--inception PATH with a copy of pt_inception-2015-12-05-6726825d.pth"):
        load_inception(None)
    with pytest.raises(BadInput, match="absent.pth: no such file.*--inception PATH"):
        load_inception(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(BadInput, match="text.pth: not a PyTorch file"):
        load_inception(tmp_path / "text.pth")
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:1_000_000])
    with pytest.raises(BadInput, match="cut.pth: not a PyTorch file"):
        load_inception(tmp_path / "cut.pth")
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(BadInput, match=r"1 keys differ, first fc.weight: expected \(1008, 2048\), got \(1000, 2048\)"):
        load_inception(tmp_path / "torchvision.pth")
    torch.save({"AuxLogits.fc.bias": torch.zeros(1), **state}, tmp_path / "more.pth")
    with pytest.raises(BadInput, match="first AuxLogits.fc.bias: expected nothing"):
        load_inception(tmp_path / "more.pth")


@pytest.mark.parametrize("x", [torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_images_are_uint8_nchw(inception, x):
    with pytest.raises(ValueError, match=r"uint8 \(N, 3, H, W\)"):
        inception(x)
