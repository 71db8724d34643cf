"""What makes inference faster leaves its results alone."""

import pytest
import torch

from vavae_fast.models import AutoencoderKL, LightningDiT
from vavae_fast.models.inference import Replayed, matmul_precision, round_weights

DIT = dict(input_size=4, patch_size=1, in_channels=4, hidden_size=64, depth=2, num_heads=4, num_classes=5, use_swiglu=True, use_rope=True,
           use_rmsnorm=True)  # fmt: skip


def shaken(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval().requires_grad_(False)


def networks(fused):
    x, t, y = torch.randn(3, 4, 4, 4), torch.rand(3), torch.tensor([0, 4, 5])
    yield shaken(LightningDiT(**DIT, fused=fused)), lambda model: model(x, t, y)
    yield shaken(LightningDiT(**DIT | dict(use_rmsnorm=False, use_swiglu=False), use_qknorm=True, fused=fused)), lambda model: model(x, t, y)
    vae = dict(embed_dim=4, ch=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), resolution=16, z_channels=4)
    z, images = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16) * 2 - 1
    yield shaken(AutoencoderKL(**vae, fused=fused)), lambda model: model.decode(z)
    yield shaken(AutoencoderKL(**vae, fused=fused)), lambda model: model.encode(images).mean


@pytest.mark.parametrize("fused", [False, True])
def test_weights_rounded_once_give_the_bits_of_autocast(fused):
    for model, call in networks(fused):
        with torch.autocast("cpu", torch.bfloat16):
            before = call(model)
            round_weights(model)
            after = call(model)
        assert torch.equal(before, after), type(model).__name__
        dtypes = {type(m).__name__: p.dtype for m in model.modules() for p in m.parameters(recurse=False)}
        assert dtypes.pop("Linear", torch.bfloat16) == dtypes.pop("Conv2d", torch.bfloat16) == torch.bfloat16
        assert set(dtypes.values()) == {torch.float32}


class RecordedGraph:
    """Stands for a CUDA graph: the same buffers, the same work again."""

    captures = 0

    def __init__(self, model, held):
        RecordedGraph.captures += 1
        self.model, self.held, self.result = model, held, model(*held)

    def replay(self):
        self.result.copy_(self.model(*self.held))


def test_a_replay_sees_each_call_s_inputs_and_gives_a_result_of_its_own(monkeypatch):
    RecordedGraph.captures = 0

    def capture(self, held):
        graph = RecordedGraph(self._model, held)
        return held, graph.result, graph.replay

    monkeypatch.setattr(Replayed, "_capture", capture)
    model = shaken(LightningDiT(**DIT))
    replayed, kept = Replayed(model), []
    for count in (2, 4, 2, 4, 2):
        inputs = torch.randn(count, 4, 4, 4), torch.rand(count), torch.randint(6, (count,))
        before = [x.clone() for x in inputs]
        found = replayed(*inputs)
        with torch.no_grad():
            kept.append((found, model(*inputs)))
        assert all(torch.equal(a, b) for a, b in zip(inputs, before))
    assert all(torch.equal(found, expected) for found, expected in kept), "no later call has written into an earlier result"
    assert RecordedGraph.captures == 2, "one capture a shape"
    for count in range(5, 12):
        replayed(torch.randn(count, 4, 4, 4), torch.rand(count), torch.randint(6, (count,)))
    assert len(replayed._graphs) == 8 and RecordedGraph.captures == 9
    replayed(*inputs)
    assert RecordedGraph.captures == 9, "the shape used last before those seven is still there"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_graphs_on_a_gpu():
    model = shaken(LightningDiT(**DIT)).cuda()
    replayed = Replayed(model)
    for count in (2, 4, 2, 4):
        inputs = torch.randn(count, 4, 4, 4, device="cuda"), torch.rand(count, device="cuda"), torch.randint(6, (count,), device="cuda")
        with torch.inference_mode():
            torch.testing.assert_close(replayed(*inputs), model(*inputs))


def test_precision_is_set_for_a_while():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with matmul_precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    with matmul_precision("fp32"):
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize("precision", ["tf32", "fp32", "bf16"])
def test_precision_leaves_cudnn_as_it_was(precision, monkeypatch):
    """torch.backends.cudnn.flags(allow_tf32=…) turns cuDNN off: images would be decoded by convolutions several times as slow."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with matmul_precision(precision):
        assert torch.backends.cudnn.enabled and torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.enabled and torch.backends.cudnn.benchmark
