"""The reference's sampled latents: its LightningDiT on seeded weights, through our samplers, both ways of guiding."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from vavae_fast.flow import Sampler, create_transport, guided
from vavae_fast.models import LightningDiT

CASES = [
    "sample.euler.n12.shift0.0.cfg1.0.start0.0",
    "sample.euler.n15.shift0.3.cfg4.0.start0.0",
    "sample.euler.n20.shift0.3.cfg6.7.start0.125",
    "sample.heun2.n10.shift0.3.cfg1.0.start0.0",
    "sample.dopri5.n2.shift0.0.cfg1.0.start0.0",
]


@pytest.fixture(scope="module")
def golden(golden_dir):
    return load_file(golden_dir / "transport.safetensors")


@pytest.fixture(scope="module")
def model(golden_dir):
    """The first case of meta.json, its parameters drawn by name, its buffers as stored."""
    meta = json.loads((golden_dir / "meta.json").read_text())
    spec = importlib.util.spec_from_file_location("golden_state", golden_dir / "golden_state.py")
    golden_state = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden_state)
    case = next(iter(meta["lightningdit"]))
    stored = load_file(golden_dir / f"lightningdit_{case}.safetensors")
    state = {
        name: stored.get(f"buffer.{name}", golden_state.golden_parameter(name, tuple(shape), meta["seed"]))
        for name, shape in meta["state_dict_shapes"][case].items()
    }
    model = LightningDiT(**meta["lightningdit"][case]).eval().requires_grad_(False)
    model.load_state_dict(state)
    return model


def settings(case):
    method, count, rest = case.removeprefix("sample.").split(".", 2)
    shift, cfg_and_start = rest.removeprefix("shift").split(".cfg")
    scale, start = cfg_and_start.split(".start")
    options = dict(sampling_method=method, num_steps=int(count.removeprefix("n")), timestep_shift=float(shift))
    return Sampler(create_transport()).sample_ode(**options), float(scale), float(start)


def test_every_stored_sample_is_a_case(golden):
    assert set(CASES) == {key for key in golden if key.startswith("sample.")}


def test_prediction_and_losses(model, golden, golden_dir):
    """The labels of `pred` are those of the model's own file; `y` here belongs to `z`, its null half included."""
    y = load_file(golden_dir / "lightningdit_lightning.safetensors")["y"]
    transport = create_transport(use_cosine_loss=True, use_lognorm=True)
    terms = transport.training_losses(model, golden["x1"], dict(y=y), x0=golden["x0"], t=golden["t"])
    torch.testing.assert_close(terms["pred"], golden["pred"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms["loss"], golden["mse"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms["cos_loss"], golden["cos"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_samples_as_the_reference_calls_it(model, golden, case):
    """With guidance 2N latents through forward_with_cfg, else the plain model."""
    sample, scale, start = settings(case)
    z, y = golden["z"], golden["y"][: len(golden["z"])]
    if scale > 1:
        arguments = dict(y=torch.cat((y, torch.full_like(y, 11))), cfg_scale=scale, cfg_interval=True, cfg_interval_start=start)
        x = sample(torch.cat((z, z)), model.forward_with_cfg, **arguments)[-1].chunk(2)[0]
    else:
        x = sample(z, model, y=y)[-1]
    torch.testing.assert_close(x, golden[case], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_samples_of_n_latents(model, golden, case):
    """The same images by `guided`, which leaves the unconditional half out where it has no say."""
    sample, scale, start = settings(case)
    z, y = golden["z"], golden["y"][: len(golden["z"])]
    predict = guided(model, scale, y, null_label=11, interval=(start, 1.0))
    torch.testing.assert_close(sample.integrate(predict, z)[-1], golden[case], rtol=1e-5, atol=1e-5)
