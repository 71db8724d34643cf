"""What this device can do: copy bandwidth and matrix rate, the ceilings of every other number; and once a device, its unknowns.

The unknowns are those that the predictions of the training step rest on: matrix products of the model's own shapes, attention by
backend at its head dimensions, fp8, the tokenizer's convolutions. Rates are in TFLOP/s and TB/s, read plus written.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import Race, Timing

BF16 = torch.bfloat16
MODELS = {"XL/1": (1152, 16, 72, 3072), "B/1": (768, 12, 64, 2048)}  # width, heads, head dimension, MLP hidden
Row = dict[str, Any]


class Rates:
    """Times one thing after the other and turns seconds into rates. tiny: sizes for a CPU."""

    def __init__(self, device: torch.device, tiny: bool):
        self.device, self.tiny = device, tiny

    def size(self, real: int) -> int:
        """A dimension of a matrix: a sixteenth of the real one on a CPU."""
        return real // 16 if self.tiny else real

    def draw(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        """Random data: a matrix product of zeros runs faster than one of anything else."""
        return torch.randn(*shape, device=self.device).to(dtype)

    def row(self, name: str, call: Callable[[], Any], flops: int = 0, moved: int = 0, seconds: float = 0.04, rounds: int = 5) -> Row:
        race = Race({name: [call]}, self.device, 0.0 if self.tiny else seconds, 0.0 if self.tiny else 0.05, graph=False)
        for _ in range(2 if self.tiny else rounds):
            race.round()
        timing: Timing = race.timings[name]
        row: Row = dict(name=name, us=round(1e6 * timing.median, 2), spread=round(timing.spread, 4))
        if flops:
            row["tflops"] = round(flops / timing.median / 1e12, 3)
        if moved:
            row["tbps"] = round(moved / timing.median / 1e12, 4)
        return row


def ceilings(rates: Rates) -> Iterator[Row]:
    """copy: 2 GiB to 2 GiB; matmul: 8192³ in bf16, briefly and, since a hot GPU lowers its clocks, for seconds."""
    yield _copy(rates)
    n = 128 if rates.tiny else 8192
    a, b = rates.draw(n, n), rates.draw(n, n)
    yield rates.row("matmul", lambda: a @ b, flops=2 * n**3, seconds=0.1)
    yield rates.row("matmul sustained", lambda: a @ b, flops=2 * n**3, seconds=0.5)


def bounds(rows: Iterable[Row]) -> dict[str, float]:
    """What other rates are shares of: tbps of the copy, tflops of the matrix product."""
    found = {row["name"]: row for row in rows if "name" in row}
    return {unit: found[name][unit] for name, unit in (("copy", "tbps"), ("matmul", "tflops")) if unit in found.get(name, {})}


def _copy(rates: Rates) -> Row:
    source = rates.draw((1 << 18) if rates.tiny else (1 << 30))
    target = torch.empty_like(source)
    return rates.row("copy", lambda: target.copy_(source), moved=2 * source.numel() * source.element_size(), seconds=0.1)


def matrix_products(rates: Rates) -> Iterator[Row]:
    """The four linear layers of a block: forward with bias, gradient of the input, gradient of the weight."""
    tokens = 8 if rates.tiny else 65536
    for model, (d, _, _, hidden) in MODELS.items():
        for layer, *sizes in (("qkv", d, 3 * d), ("proj", d, d), ("w12", d, 2 * hidden), ("w3", hidden, d)):
            k, n = map(rates.size, sizes)
            x, w, g, bias = rates.draw(tokens, k), rates.draw(n, k), rates.draw(tokens, n), rates.draw(n)
            flops = 2 * tokens * k * n
            yield rates.row(f"{model} {layer} forward", lambda x=x, w=w, bias=bias: F.linear(x, w, bias), flops)
            yield rates.row(f"{model} {layer} dgrad", lambda g=g, w=w: g @ w, flops)
            yield rates.row(f"{model} {layer} wgrad", lambda g=g, x=x: g.t() @ x, flops)


def attention_backends(rates: Rates) -> Iterator[Row]:
    """PyTorch's attention by backend on strided views of packed qkv, as the model has them. A backend that refuses is a row too."""
    batch, tokens = (1, 16) if rates.tiny else (256, 256)
    for model, (_, heads, head_dim, _) in MODELS.items():
        flops = 4 * batch * heads * tokens * tokens * head_dim
        qkv = rates.draw(batch, tokens, 3, heads, head_dim)
        q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4))
        for backend in (None, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
            name = f"{model} {'default' if backend is None else backend.name.lower().removesuffix('_attention')}"

            def forward(q=q, k=k, v=v, backend=backend):
                with nullcontext() if backend is None else sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v)

            try:
                cotangent = torch.randn_like(forward())
                yield rates.row(f"{name} forward", torch.no_grad()(forward), flops)
                both = lambda f=forward, q=q, k=k, v=v, c=cotangent: torch.autograd.grad(f(), (q, k, v), c)
                yield rates.row(f"{name} forward+backward", both, int(3.5 * flops))
            except RuntimeError as refusal:
                yield dict(name=name, refused=str(refusal).splitlines()[0][:160])


def fp8_products(rates: Rates) -> Iterator[Row]:
    """torch._scaled_mm by tensor and by row."""
    e4m3, tokens = torch.float8_e4m3fn, 256 if rates.tiny else 65536
    shapes = (("qkv", tokens, 1152, 3456), ("w12", tokens, 1152, 6144), ("w3", tokens, 3072, 1152), ("8192³", 8192, 8192, 8192))
    for layer, *sizes in shapes:
        m, k, n = map(rates.size, sizes)
        x, w = rates.draw(m, k).to(e4m3), rates.draw(n, k).to(e4m3)
        one = torch.ones((), device=rates.device)
        scales = {"by tensor": (one, one), "by row": (torch.ones(m, 1, device=rates.device), torch.ones(1, n, device=rates.device))}
        for kind, (sx, sw) in scales.items():
            for fast in (True, False):
                name = f"{layer} {kind}{', fast accumulation' if fast else ''}"

                def call(x=x, w=w, sx=sx, sw=sw, fast=fast):
                    return torch._scaled_mm(x, w.t(), scale_a=sx, scale_b=sw, out_dtype=BF16, use_fast_accum=fast)

                try:
                    yield rates.row(name, call, 2 * m * k * n)
                except (RuntimeError, ValueError, NotImplementedError) as refusal:
                    yield dict(name=name, refused=str(refusal).splitlines()[0][:160])


def convolutions(rates: Rates) -> Iterator[Row]:
    """The tokenizer's 3 x 3 convolutions, in bf16 and TF32, by memory format."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        for channels, side in ((128, 256), (256, 128), (512, 64), (512, 16)):
            batch, side, channels = (1, side // 16, channels // 8) if rates.tiny else (16, side, channels)
            flops = 2 * batch * side * side * channels * channels * 9
            for label, dtype, layout in (("bf16 NHWC", BF16, torch.channels_last), ("TF32 NCHW", torch.float32, torch.contiguous_format)):
                x = rates.draw(batch, channels, side, side, dtype=dtype).to(memory_format=layout).requires_grad_()
                w = rates.draw(channels, channels, 3, 3, dtype=dtype).to(memory_format=layout).requires_grad_()
                y = F.conv2d(x, w, padding=1)
                g, name = torch.randn_like(y), f"{channels} channels, {side} px, {label}"
                yield rates.row(f"{name} forward", torch.no_grad()(lambda x=x, w=w: F.conv2d(x, w, padding=1)), flops)
                for what, inputs in (("dgrad", [x]), ("wgrad", [w])):
                    call = lambda y=y, inputs=inputs, g=g: torch.autograd.grad(y, inputs, g, retain_graph=True)
                    yield rates.row(f"{name} {what}", call, flops)
    finally:
        torch.backends.cudnn.benchmark = before


UNKNOWNS = {"gemm": matrix_products, "attention": attention_backends, "fp8": fp8_products, "convolution": convolutions}
