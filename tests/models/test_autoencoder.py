"""The tokenizer network: laws of its shapes and posterior, then parity with the reference's outputs."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from vavae_fast.errors import BadInput
from vavae_fast.models.autoencoder import AutoencoderKL, DiagonalGaussian
from vavae_fast.models.weights import load_strict

TINY = dict(embed_dim=4, ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=32)


def relative(found, expected):
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize("levels", [3, 4, 5])
@pytest.mark.parametrize("size", [(1, 2), (2, 1), (3, 3)])
def test_latents_are_the_ratio_smaller_and_decode_to_the_image_size(levels, size):
    vae = AutoencoderKL(**{**TINY, "ch_mult": (1,) * levels})
    ratio = 2 ** (levels - 1)
    assert vae.downsample_ratio == ratio
    x = torch.randn(2, 3, size[0] * ratio, size[1] * ratio)
    out = vae(x)
    assert out.z.shape == out.posterior.mean.shape == (2, 4, *size)
    assert out.reconstruction.shape == x.shape


@pytest.mark.parametrize("embed_dim", [16, 32, 64])
def test_published_architectures_have_the_reference_s_sizes(embed_dim):
    """Parameters of the f16 tokenizers; f16d32 is the released VA-VAE."""
    with torch.device("meta"):
        vae = AutoencoderKL(embed_dim=embed_dim)
    shapes = {key: tuple(value.shape) for key, value in vae.state_dict().items()}
    assert vae.downsample_ratio == 16
    assert shapes["encoder.conv_out.weight"] == (2 * embed_dim, 512, 3, 3)
    assert shapes["quant_conv.weight"] == (2 * embed_dim, 2 * embed_dim, 1, 1)
    assert shapes["decoder.conv_in.weight"] == (512, embed_dim, 3, 3)
    assert {m.num_groups for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)} == {32}
    assert {key.split(".attn.")[0] for key in shapes if ".attn." in key} == {"encoder.down.4", "decoder.up.4"}


def test_latent_channels_may_differ_from_the_channels_between():
    vae = AutoencoderKL(**TINY, z_channels=6)
    assert vae.quant_conv.weight.shape[:2] == (8, 12) and vae.post_quant_conv.weight.shape[:2] == (6, 4)
    assert vae(torch.randn(1, 3, 8, 8)).reconstruction.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(("ch", "groups"), [(8, 8), (16, 16), (24, 8), (32, 32), (48, 16), (128, 32)])
def test_groups_default_to_the_largest_power_of_two_that_fits(ch, groups):
    with torch.device("meta"):
        vae = AutoencoderKL(embed_dim=4, ch=ch, ch_mult=(1, 2))
    assert {m.num_groups for m in vae.modules() if isinstance(m, torch.nn.GroupNorm)} == {groups}


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_groups 32 does not divide"):
        AutoencoderKL(embed_dim=4, ch=8, ch_mult=(1, 2), num_groups=32)


@pytest.mark.parametrize(
    "changes",
    [
        *(dict(ch_mult=value) for value in ((), [], 4, None, (1, 0), (1, 1.5), "12")),
        *(dict(embed_dim=value) for value in (0, -4, 4.0, None)),
        *(dict(ch=value) for value in (8.0, "8", 0)),
        *({key: 0} for key in ("num_res_blocks", "resolution", "in_channels", "out_ch", "z_channels", "num_groups")),
        dict(dropout=1.0),
    ],
)
def test_arguments_that_make_no_network_are_named(changes):
    (name,) = changes
    with pytest.raises(BadInput, match=f"^AutoencoderKL: {name}: must be "):
        AutoencoderKL(**{**TINY, **changes})


@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (1, 3, 6, 8), (1, 4, 8, 8), (3, 8, 8), (1, 3, 0, 8)])
def test_encode_names_images_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"encode: images"):
        AutoencoderKL(**TINY).encode(torch.zeros(shape))


def test_decode_names_latents_that_do_not_fit():
    with pytest.raises(ValueError, match=r"decode: latents have shape \(1, 8, 2, 2\), expected \(N, 4, h, w\)"):
        AutoencoderKL(**TINY).decode(torch.zeros(1, 8, 2, 2))


def test_fused_shares_keys_and_agrees():
    """Within a small multiple of float32's rounding, forward and for every gradient."""
    plain = AutoencoderKL(**TINY).double()
    x, noise = torch.randn(2, 3, 16, 16).double(), torch.randn(2, 4, 4, 4).double()
    results = []
    for fused in (False, True):
        vae = AutoencoderKL(**TINY, fused=fused).double()
        assert list(vae.state_dict()) == list(plain.state_dict())
        load_strict(vae, plain.state_dict(), "plain")
        out = vae(x, noise=noise)
        loss = out.reconstruction.square().sum() + out.posterior.kl().sum()
        gradients = torch.autograd.grad(loss, list(vae.parameters()))
        results.append((out.reconstruction, torch.cat([g.flatten() for g in gradients])))
    for found, expected in zip(*results):
        assert relative(found, expected) < 1e-12  # float64, a few hundred operations deep


def test_channels_last_gives_the_same_image():
    vae = AutoencoderKL(**TINY).double().eval()
    x = torch.randn(2, 3, 16, 16).double()
    expected = vae(x, sample_posterior=False).reconstruction
    found = vae.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), sample_posterior=False).reconstruction
    assert relative(found, expected) < 1e-12


def test_a_bfloat16_model_takes_float32_images_and_latents():
    vae = AutoencoderKL(**TINY).bfloat16()
    out = vae(torch.randn(1, 3, 8, 8))
    assert out.reconstruction.dtype == torch.bfloat16
    assert out.posterior.logvar.dtype == torch.float32


def test_kl_is_torch_s():
    posterior = DiagonalGaussian(2 * torch.randn(3, 8, 2, 5).double())
    standard = Normal(torch.zeros(()).double(), torch.ones(()).double())
    expected = kl_divergence(Normal(posterior.mean, posterior.std), standard).sum(dim=(1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected, rtol=1e-12, atol=1e-12)
    assert posterior.kl().shape == (3,)


def test_the_standard_normal_has_kl_zero():
    assert DiagonalGaussian(torch.zeros(2, 8, 3, 3)).kl().tolist() == [0.0, 0.0]


def test_log_variance_is_clamped_so_that_nothing_overflows():
    posterior = DiagonalGaussian(torch.tensor([0.0, 0.0, 1e4, -1e4]).view(1, 4, 1, 1))
    assert posterior.logvar.flatten().tolist() == [20.0, -30.0]
    assert posterior.kl().isfinite().all() and posterior.sample().isfinite().all()


def test_samples_have_the_posterior_s_moments():
    posterior = DiagonalGaussian(torch.cat([torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), -2.0)], 1))
    sample = posterior.sample(torch.Generator().manual_seed(0))
    n = sample.numel()
    std = torch.tensor(-1.0).exp().item()
    assert abs(sample.mean().item() - 3.0) < 5 * std / n**0.5
    assert abs(sample.std().item() - std) < 5 * std / (2 * n) ** 0.5


def test_a_draw_is_a_function_of_its_noise_or_generator():
    posterior = DiagonalGaussian(torch.randn(2, 8, 3, 3))
    noise = torch.randn(2, 4, 3, 3)
    assert torch.equal(posterior.sample(noise=noise), posterior.mean + posterior.std * noise)
    draws = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert posterior.mode() is posterior.mean


@pytest.mark.parametrize("fused", [False, True])
def test_golden(golden_dir, fused):
    meta = json.loads((golden_dir / "meta.json").read_text())
    case = meta["autoencoder"][0]
    vae = AutoencoderKL(case["embed_dim"], ch=case["ch"], ch_mult=case["ch_mult"], resolution=case["resolution"], fused=fused).eval()
    shapes = meta["state_dict_shapes"][case["name"]]
    assert {key: list(value.shape) for key, value in vae.state_dict().items()} == shapes
    load_strict(vae, golden_weights(golden_dir, shapes, meta["seed"]), "golden")
    golden = load_file(golden_dir / f"autoencoder_{case['name']}.safetensors")
    with torch.no_grad():
        posterior = vae.encode(golden["x"])
        found = dict(mean=posterior.mean, logvar=posterior.logvar, kl=posterior.kl(), recon=vae.decode(posterior.mean))
    for name, value in found.items():
        assert relative(value, golden[name]) <= 5e-5, name


def golden_weights(folder, shapes, seed):
    spec = importlib.util.spec_from_file_location("golden_state", folder / "golden_state.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {key: module.golden_parameter(key, tuple(shape), seed) for key, shape in shapes.items()}
