"""The fused layers of the tokenizer's network: the plain ones' numbers, keys and gradients, with channels last from end to end."""

import pytest
import torch

from vavae_fast.models.autoencoder_layers import Blocks

LAYERS = {
    "double": lambda blocks: blocks.double(6),
    "halve": lambda blocks: blocks.halve(6),
    "attention": lambda blocks: blocks.attention(6),
    "residual": lambda blocks: blocks.residual(6, 4),
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


def plain_and_fused(layer):
    """The same float64 weights in both forms, the fused one's with channels last."""
    torch.manual_seed(0)
    plain, fused = (LAYERS[layer](Blocks(2, 0.0, fused)).double() for fused in (False, True))
    fused.load_state_dict(plain.state_dict(), strict=True)
    return plain, fused.to(memory_format=torch.channels_last)


@each_layer
@pytest.mark.parametrize("size", [(8, 6), (5, 7), (2, 3), (7, 4)])
def test_forward_and_every_gradient(layer, size):
    """To 1e-12 in float64, at odd sizes too."""
    plain, fused = plain_and_fused(layer)
    x = torch.randn(2, 6, *size).double()
    found = []
    for module, given in ((plain, x), (fused, x.contiguous(memory_format=torch.channels_last))):
        given = given.detach().requires_grad_()
        y = module(given)
        cotangent = torch.linspace(-1, 1, y.numel()).double().view(y.shape).sin()
        names, parameters = zip(*module.named_parameters())
        found.append(dict(zip(("y", "x", *names), (y, *torch.autograd.grad(y, [given, *parameters], cotangent)))))
    largest = max(value.abs().max() for value in found[0].values())
    for name, expected in found[0].items():
        assert found[1][name].shape == expected.shape
        assert (found[1][name] - expected).abs().max() <= 1e-12 * expected.abs().max() + 1e-15 * largest, name


@each_layer
def test_maps_and_their_gradients_have_channels_last(layer):
    _, fused = plain_and_fused(layer)
    x = torch.randn(2, 6, 8, 6).double().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = fused(x)
    (gradient,) = torch.autograd.grad(y, [x], torch.randn(y.shape).double().contiguous(memory_format=torch.channels_last))
    for map_ in (y, gradient):
        assert map_.is_contiguous(memory_format=torch.channels_last) and not map_.is_contiguous()


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1)])
def test_maps_of_one_row_or_column_are_doubled(size):
    plain, fused = plain_and_fused("double")
    x = torch.randn(1, 6, *size).double()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)


def test_doubling_multiplies_four_ninths_and_makes_no_other_map():
    """Multiplications of forward and backward; and no tensor between as large as the result."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Largest(TorchDispatchMode):
        sizes: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.sizes += [t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor) and not func.is_view]
            return out

    flops, large = [], []
    for module in plain_and_fused("double"):
        x = torch.randn(2, 6, 16, 16).double().contiguous(memory_format=torch.channels_last).requires_grad_()
        with FlopCounterMode(display=False) as counter, Largest() as largest:
            largest.sizes = []
            y = module.forward(x)  # past the hooks of the counter, which take no autograd.grad
            torch.autograd.grad(y, [x, module.conv.weight], y.detach())
        convolution = counter.get_flop_counts()["Global"]
        flops.append(sum(n for op, n in convolution.items() if "convolution" in str(op)))
        large.append(sum(n >= y.numel() for n in largest.sizes))
    assert flops[1] / flops[0] == pytest.approx(4 / 9)
    assert large[1] == 1 < large[0], "the result alone"


def test_the_kernel_of_doubling_is_summed_before_it_is_rounded():
    """In bf16 under autocast: each sum of weights is rounded once, as a weight is."""
    _, fused = plain_and_fused("double")
    exact = fused._kernel(torch.float64)
    single = fused.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(single._kernel(torch.bfloat16), exact.float().bfloat16())


def test_buffers_of_fused_layers_are_not_saved():
    assert LAYERS["double"](Blocks(2, 0.0, True)).state_dict().keys() == LAYERS["double"](Blocks(2, 0.0, False)).state_dict().keys()
