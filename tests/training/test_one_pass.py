"""The one-pass gradients against the plain formulation: the same numbers in float64, from fewer passes through the networks.

Run as a script, this file is one of two processes.
"""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizer_states import batch, state
from torch.utils._python_dispatch import TorchDispatchMode

from vavae_fast.distributed import open_world
from vavae_fast.models.perceptual import LPIPS
from vavae_fast.training.one_pass import one_pass_gradients
from vavae_fast.training.tokenizer import plain_gradients, tokenizer_step

STARTS = {"gan": 0, "first_of_discriminator": 1, "no_gan": 1000}  # disc_start; what step 0 then is
ALIGNMENTS = {
    "z_to_features": dict(reverse_proj=True),
    "features_to_z": dict(reverse_proj=False),
    "fixed_projection": dict(proj_fix=True),
    "fixed_weight": dict(adaptive_vf=False),
    "none": dict(vf=False),
}


class Convolutions(TorchDispatchMode):
    """Counts every layer's passes: forward, data gradient, weight gradient. A convolution's layer is told by its weight."""

    def __init__(self, **networks):
        super().__init__()
        layers = {f"{name}.{key}": m for name, n in networks.items() for key, m in n.named_modules() if isinstance(m, torch.nn.Conv2d)}
        self.layer_of = {layer.weight.data_ptr(): name for name, layer in layers.items()}
        self.passes = {name: [0, 0, 0] for name in layers}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self._add(args[1], (1, 0, 0))
        if func is torch.ops.aten.convolution_backward.default:
            self._add(args[2], (0, *args[10][:2]))
        return func(*args, **(kwargs or {}))

    def _add(self, weight, kinds):
        layer = self.layer_of.get(weight.data_ptr())
        if layer is not None:  # the foundation model's are not watched
            self.passes[layer] = [count + kind for count, kind in zip(self.passes[layer], kinds)]


def passes(formulation, disc_start, **changes):
    """{network: [passes of its first layer, of each in between, of its last]}."""
    s = state(dtype=torch.float64, disc_start=disc_start, perceptual=LPIPS.random().double(), **changes)
    networks = dict(encoder=s.autoencoder.encoder, decoder=s.autoencoder.decoder, lpips=s.perceptual.net, discriminator=s.discriminator)
    with Convolutions(**networks) as convolutions:
        formulation(s, 0, batch(2))
    found = {}
    for network in networks:
        first, *body, last = (tuple(kinds) for name, kinds in convolutions.passes.items() if name.startswith(f"{network}."))
        assert body and len(set(body)) == 1, f"{network}: {body}"
        found[network] = [first, body[0], last]
    return found


NO_GAN = dict(encoder=(1, 1, 1), decoder=(1, 1, 1), lpips=(2, 1, 0), discriminator=(0, 0, 0))


@pytest.mark.parametrize(
    ("formulation", "start", "expected"),
    [
        (plain_gradients, "gan", dict(encoder=(1, 1, 1), decoder=(1, 2, 1), lpips=(2, 3, 0), discriminator=(3, 4, 2))),
        (one_pass_gradients, "gan", dict(encoder=(1, 1, 1), decoder=(1, 2, 1), lpips=(2, 1, 0), discriminator=(2, 3, 2))),
        (one_pass_gradients, "first_of_discriminator", NO_GAN | dict(discriminator=(2, 2, 2))),
        (one_pass_gradients, "no_gan", NO_GAN),
    ],
)
def test_passes_through_the_networks(formulation, start, expected):
    found = passes(formulation, STARTS[start])
    assert {network: body for network, (_, body, _) in found.items()} == expected


def test_passes_through_the_layers_at_the_ends():
    """Images need no data gradient, but r does. Last layers give the gradients that the adaptive weights compare: the decoder's two add
    up to its gradient, the encoder's also hears the KL term and so has a third."""
    found = passes(one_pass_gradients, STARTS["gan"])
    assert found["encoder"][0] == (1, 0, 1) and found["encoder"][2] == (1, 1, 3)
    assert found["decoder"][2] == (1, 2, 2) and found["discriminator"][0] == (2, 1, 2)


@pytest.mark.parametrize("alignment", ["none", "fixed_weight"])
def test_without_an_adaptive_vf_weight_the_decoder_runs_backward_once(alignment):
    assert passes(one_pass_gradients, STARTS["gan"], **ALIGNMENTS[alignment])["decoder"][1] == (1, 1, 1)


def assert_same(found, expected, largest, name):
    """To 1e-12 of its length; a gradient that is 0 but for rounding, as of a key's bias, to 1e-15 of the longest."""
    error = (found - expected).norm()
    assert error <= 1e-12 * expected.norm() + 1e-15 * largest, f"{name}: {error} of {expected.norm()}"


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("start", STARTS)
def test_terms_gradients_and_running_statistics_are_those_of_the_plain_formulation(start, alignment):
    s = state(dtype=torch.float64, disc_start=STARTS[start], **ALIGNMENTS[alignment])
    twin = copy.deepcopy(s)
    expected_terms, expected = plain_gradients(s, 0, batch())
    terms, gradients = one_pass_gradients(twin, 0, batch())
    assert terms.keys() == expected_terms.keys()
    assert (terms["d_weight"] > 0) == (start == "gan") and (terms["vf_weight"] > 0) == (alignment != "none"), "weighed, not off"
    for name, value in expected_terms.items():
        assert_same(terms[name], value, 0, name)
    names = trained(s)
    assert len(gradients) == len(expected) == len(names) - (0 if start != "no_gan" else len(list(s.discriminator.parameters())))
    largest = max(gradient.norm() for gradient in expected.values())
    for (name, p), q in zip(names.items(), trained(twin).values()):
        if p in expected:
            assert_same(gradients[q], expected[p], largest, name)
    for (name, found), value in zip(twin.discriminator.named_buffers(), s.discriminator.buffers()):
        assert_same(found.double(), value.double(), 0, name)


def trained(s):
    """Every trained parameter, by name."""
    return s.trained() | {f"discriminator.{name}": p for name, p in s.discriminator.named_parameters()}


def test_running_statistics_saw_the_reconstructions_twice():
    """What the test above compares does move: real images alone would leave other statistics and a smaller count."""
    s = state(dtype=torch.float64)
    one_pass_gradients(s, 0, batch())
    norm = next(m for m in s.discriminator.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert norm.num_batches_tracked == 3 and norm.running_mean.abs().max() > 0


def test_steps_with_accumulation_across_the_start_of_the_gan():
    """Moments after each step, from the same state: batches of unequal content, the discriminator from step 2 on, the GAN from 3."""
    s = state(dtype=torch.float64, disc_start=5)
    for step in range(5):
        micro_batches = [batch(3, 6 * step), batch(3, 6 * step + 3)]
        twin = copy.deepcopy(s)
        twin.gradients = one_pass_gradients
        expected, found = (tokenizer_step(x, step, micro_batches) for x in (s, twin))
        assert found.keys() == expected.keys() and ("d_loss" in found) == (step >= 2) and (found["d_weight"] > 0) == (step >= 3)
        for name, value in expected.items():
            assert_same(found[name], value, 0, f"{name} at {step}")
        for part in ("optimizer", "optimizer_disc", "discriminator"):
            moments = {name: v for name, v in s.groups()[part].items() if part == "discriminator" or name.startswith("exp_avg.")}
            largest = max((v.double().norm() for v in moments.values()), default=0)
            for name, value in moments.items():
                if part != "discriminator" or "running" in name:
                    assert_same(twin.groups()[part][name], value, largest, f"{part} {name} at {step}")


@pytest.mark.parametrize("reverse_proj", [True, False])
def test_in_bf16_the_two_differ_far_less_than_rounding_moves_either(reverse_proj):
    """Both against float64; the plain one sums cotangents in bf16, this one in float32."""
    exact, plain, found = (
        {part: torch.cat([gradients[p].double().flatten() for name, p in trained(s).items() if name.startswith(part)]) for part in PARTS}
        for s, gradients in (
            bf16_gradients(plain_gradients, reverse_proj, dtype=torch.float64),
            bf16_gradients(plain_gradients, reverse_proj, bf16=True),
            bf16_gradients(one_pass_gradients, reverse_proj, bf16=True),
        )
    )
    for part in PARTS:
        rounding = (plain[part] - exact[part]).norm()
        assert 0 < rounding < 0.5 * exact[part].norm(), part
        assert (found[part] - plain[part]).norm() < 0.15 * rounding, part
        assert (found[part] - exact[part]).norm() < 1.05 * rounding, part


PARTS = ("encoder", "quant_conv", "decoder", "post_quant_conv", "linear_proj", "discriminator")


def bf16_gradients(formulation, reverse_proj, **changes):
    s = state(reverse_proj, **changes)
    return s, formulation(s, 0, batch())[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes over gloo; on a GPU machine they would share one over NCCL")
def test_two_processes_average_their_gradients():
    """Each sees two of four images, with adaptive weights of its own as under DDP; the mean of what the plain formulation gives for either."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=str(port), OMP_NUM_THREADS="1")  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, __file__], env=common | dict(RANK=rank, LOCAL_RANK=rank), stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=120)[0].strip().splitlines()[-1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert said == ["the mean of both"] * 2


def one_of_two():
    with open_world() as world:
        alone, s = state(dtype=torch.float64), state(dtype=torch.float64, world=world, gradients=one_pass_gradients)
        halves = [plain_gradients(alone, 0, batch(2, first))[1] for first in (0, 2)]
        one, other = (half[alone.autoencoder.last_encoder_weight] for half in halves)
        assert (one - other).norm() > 0.1 * one.norm()
        tokenizer_step(s, 0, [batch(2, 2 * world.rank)])
        moments = {p: adam["exp_avg"] for optimizer in (s.optimizer, s.optimizer_disc) for p, adam in optimizer.state.items()}
        largest = max(gradient.norm() for gradient in halves[0].values())
        for (name, p), q in zip(trained(alone).items(), trained(s).values()):
            mean = (halves[0][p] + halves[1][p]) / 2
            assert_same(moments[q] / 0.5, mean, largest, name)  # Adam's first moment is (1 - beta1) times the gradient
        print("the mean of both")


if __name__ == "__main__":
    one_of_two()
