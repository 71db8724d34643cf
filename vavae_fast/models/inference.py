"""A trained network made ready to be called many times without gradients. But for fp8, nothing here changes a result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vavae_fast.models.autoencoder import AutoencoderKL
from vavae_fast.models.autoencoder_layers import FusedUpsample
from vavae_fast.models.compilation import Regions, compile_forward
from vavae_fast.models.fp8 import convert_to_fp8
from vavae_fast.models.lightningdit import LightningDiT

_MOST_GRAPHS = 8  # each has its buffers and XL/1's thousand launches; guidance needs two a batch size
_WARM_UP = 3  # calls before a capture: kernels are compiled and tuned, libraries allocate their workspaces


def predictor(model: LightningDiT, device: torch.device, precision: str, regions: Regions = "none", graphs: bool = True) -> Callable[..., Tensor]:
    """predict(x (n, C, H, W), t (n,), y (n,)) -> (n, C, H, W) float32, by `model`, which is changed for it and moved to `device`.

    precision: "bf16" products, "fp8" products of the blocks' linear layers besides, else those of `matmul_precision`. regions are
    compiled; `graphs`: on a GPU, calls are replayed from CUDA graphs.
    """
    model.to(device)
    if precision == "fp8":
        convert_to_fp8(model)
    rounds = _rounds(model, precision)
    compile_forward(model, regions)

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with _autocast(device, rounds):
            return model(x, t, y).float()

    return Replayed(predict) if graphs and device.type == "cuda" else predict


def decoder(tokenizer: AutoencoderKL, device: torch.device, precision: str) -> Callable[[Tensor], Tensor]:
    """decode(z (n, C, h, w)) -> (n, 3, H, W) float32, by `tokenizer`, which is changed for it and moved to `device`."""
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    rounds = _rounds(tokenizer.to(device, memory_format=layout), precision)

    def decode(z: Tensor) -> Tensor:
        with _autocast(device, rounds):
            return tokenizer.decode(z).float()

    return decode


def _rounds(model: nn.Module, precision: str) -> bool:
    """Whether products are of bfloat16 (fp8's neighbours too); the weights then are."""
    if precision in ("bf16", "fp8"):
        round_weights(model)
    return precision in ("bf16", "fp8")


def _autocast(device: torch.device, rounds: bool) -> torch.autocast:
    """Without autocast's cache, which keeps tensors of a capture's memory pool: no weight is left to round."""
    return torch.autocast(device.type, torch.bfloat16, enabled=rounds, cache_enabled=False)


def round_weights(model: nn.Module) -> nn.Module:
    """Make the weights of linear layers and convolutions bfloat16, in place: what autocast would make of them at each use.

    Under `torch.autocast(bfloat16)` the results keep their bits; a forward pass of LightningDiT-XL no longer reads 2.7 GB of float32
    weights and writes 1.35 GB of rounded ones. Norms, embeddings and positions stay as they are.
    """
    folded = {module.conv for module in model.modules() if isinstance(module, FusedUpsample)}  # rounded after weights are summed
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module not in folded:
            for p in module.parameters(recurse=False):
                p.data = p.data.to(torch.bfloat16)
    return model


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Of float32 products and convolutions inside: "tf32", as the reference samples on a GPU; anything else: float32 all through."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"  # not cudnn.flags, which also resets what it is not given: cuDNN would be off
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Replayed:
    """model(*tensors) -> tensor, captured as a CUDA graph at the first call with inputs of certain shapes and replayed from then on.

    Launching XL/1's thousand kernels takes the host longer than a small batch takes the GPU. Graphs share one memory pool, and the
    result is a copy of theirs. No gradients; the model must not wait for the device, nor change between calls. The graphs of the
    shapes met last are kept.
    """

    def __init__(self, model: Callable[..., Tensor]):
        self._model = model
        self._graphs: dict[tuple, tuple[list[Tensor], Tensor, Callable[[], None]]] = {}
        self._pool = None

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple((tuple(x.shape), x.dtype) for x in inputs)
        graph = self._graphs.pop(key, None) or self._capture([x.clone() for x in inputs])
        self._graphs[key] = graph  # last in the order of use
        if len(self._graphs) > _MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        held, result, replay = graph
        for own, given in zip(held, inputs):
            own.copy_(given)
        replay()
        return result.clone()

    def _capture(self, held: list[Tensor]) -> tuple[list[Tensor], Tensor, Callable[[], None]]:
        """The buffers that a graph reads, the one it writes, and what runs it."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._model(*held)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = self._model(*held)
        self._pool = self._pool or graph.pool()
        return held, result, graph.replay
