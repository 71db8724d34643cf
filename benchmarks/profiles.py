"""Where a step's device time goes: kernels by class, from torch.profiler."""

import re
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import synchronize

# First match wins; names as Inductor (whose names hold those of the operators it fused), cuDNN, cuBLAS and PyTorch give them.
CLASSES: tuple[tuple[str, str], ...] = (
    ("compiled elementwise and norms", r"^triton_|^cpp_fused"),
    ("attention", r"flash|fmha|sdpa|attention|cudnn_generated_fort"),
    ("gemm", r"gemm|nvjet|cutlass|cublas|xmma|splitk|wgmma|addmm|_mm\b|\bmm\b|linear|bmm"),
    ("optimizer", r"multi_tensor_apply|multitensor|foreach|adam|lerp"),
    ("copy and cat", r"memcpy|memset|copy|catarray|\bcat\b|fill"),
    ("reduction", r"reduce|\bsum\b|\bmean\b|softmax|norm"),
    ("elementwise", r"elementwise|vectorized|distribution|aten::|index|embedding"),
)


def our_kernels() -> set[str]:
    """Names of the Triton kernels of vavae_kernels and of the pieces that they are made of."""
    import pkgutil
    from importlib import import_module

    from vavae_kernels import ops

    modules = [import_module(f"{ops.__name__}.{info.name}") for info in pkgutil.iter_modules(ops.__path__)]
    functions = [getattr(value, "fn", None) for module in modules for value in vars(module).values()]
    return {f.__name__ for f in functions if callable(f) and f.__module__.startswith("vavae_kernels")}


def kernel_class(name: str, ours: set[str]) -> str:
    """"ours: <kernel>" or a class of `CLASSES`, else "other"."""
    if name in ours or "adamw_ema" in name:  # csrc's is a C++ name, with its arguments
        return f"ours: {name if name in ours else 'adamw_ema'}"
    lowered = name.lower()
    return next((label for label, pattern in CLASSES if re.search(pattern, lowered)), "other")


def by_class(step: Callable[[], Any], device: torch.device, most: int = 20) -> dict[str, Any]:
    """ms of device time by class in one call of `step`, the longest kernels, and the call's own time on the device."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    step()
    synchronize(device)
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        synchronize(device)
    own = (lambda event: event.self_device_time_total) if cuda else (lambda event: event.self_cpu_time_total)
    events = sorted((event for event in profile.key_averages() if own(event) > 0), key=own, reverse=True)
    ours = our_kernels()
    totals: dict[str, float] = {}
    for event in events:
        label = kernel_class(event.key, ours)
        totals[label] = totals.get(label, 0.0) + own(event) / 1e3
    return dict(
        ms={label: round(value, 3) for label, value in sorted(totals.items(), key=lambda item: -item[1])},
        total_ms=round(sum(totals.values()), 3),
        launches=sum(event.count for event in events),
        top=[[event.key[:80], round(own(event) / 1e3, 3), event.count] for event in events[:most]],
    )
