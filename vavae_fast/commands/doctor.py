"""Say what works on this machine, what is missing, which operators are fused and why not, and how to get the rest."""

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass

EXAMPLE = "vavae-fast doctor"

# distribution, module, what it is for, how to get it
OPTIONAL = (
    ("triton", "triton", "fused operators", "comes with CUDA builds of torch"),
    ("timm", "timm", "DINOv2, MAE and other foundation models", "pip install 'vavae-fast[encoders]'"),
    ("nvidia-dali-cuda130", "nvidia.dali", "image decoding on the GPU", "pip install 'vavae-fast[dali]'"),
    ("flash-attn", "flash_attn", "attention backend", "pip install 'vavae-fast[flash]' --no-build-isolation"),
    ("xformers", "xformers", "attention backend", "pip install 'vavae-fast[xformers]'"),
    ("torchao", "torchao", "train.fp8", "pip install 'vavae-fast[fp8]'"),
    ("tensorboard", "tensorboard", "log.to=[tensorboard]", "pip install 'vavae-fast[log]'"),
    ("scikit-learn", "sklearn", "uniformity metrics", "pip install 'vavae-fast[analyze]'"),
    ("scipy", "scipy", "uniformity metrics", "pip install 'vavae-fast[analyze]'"),
    ("pyarrow", "pyarrow", "parquet datasets", "pip install 'vavae-fast[data]'"),
    ("huggingface-hub", "huggingface_hub", "hub", "pip install 'vavae-fast[hub]'"),
    ("pytest-benchmark", "pytest_benchmark", "pytest benchmarks/", "pip install 'vavae-fast[bench]'"),
)


def arguments(parser: ArgumentParser) -> None:
    pass


@dataclass(frozen=True)
class DoctorPlan:
    """Nothing to check beforehand."""

    def describe(self) -> str:
        return "prints a report about this machine; writes nothing"


def plan(config: None, args: Namespace) -> DoctorPlan:
    return DoctorPlan()


def run(plan: DoctorPlan) -> None:
    print("\n".join(report()))


def report() -> list[str]:
    """The lines of the report."""
    import torch

    lines = [
        f"system      {platform.system()} {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} CPUs, "
        f"{shutil.disk_usage('.').free / 1e9:.0f} GB free here",
        f"torch       {torch.__version__}, {_gpus(torch)}",
        f"collectives {', '.join(_collectives(torch)) or 'none'}",
    ]
    for distribution, module, purpose, cure in OPTIONAL:
        found = _found(module)
        state = importlib.metadata.version(distribution) if found and _has_metadata(distribution) else ("present" if found else "missing")
        lines.append(f"{distribution:<20} {state:<12} {purpose}" + ("" if found else f"; {cure}"))
    lines.append(f"{'apex (NVIDIA)':<20} {_apex():<12} a baseline of the benchmarks, never needed")
    lines.append(f"{'nvcc':<20} {_nvcc()}")
    lines += [f"{'misfit':<11} {line}" for line in _misfits()]
    lines += ["", "operators   " + _operators(torch)]
    lines += ["ready: " + ("GPU and CPU" if torch.cuda.is_available() else "CPU; no CUDA GPU was found")]
    return lines


def _gpus(torch) -> str:
    if not torch.cuda.is_available():
        return f"built for CUDA {torch.version.cuda}, no GPU found" if torch.version.cuda else "built for the CPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"CUDA {torch.version.cuda}, {len(names)} x {names[0]}"


def _collectives(torch) -> list[str]:
    import torch.distributed as dist

    if not dist.is_available():
        return []
    return [name for name, there in (("nccl", dist.is_nccl_available()), ("gloo", dist.is_gloo_available())) if there]


def _operators(torch) -> str:
    """Which path `fused=True` takes here."""
    import vavae_kernels

    others = ("patch", "AdamWEMA", "attention", "register_backend", "backend_table")
    names = ", ".join(name for name in vavae_kernels.__all__ if name not in others)
    if not torch.cuda.is_available():
        return f"reference path (PyTorch), no CUDA GPU: {names}"
    if not _found("triton"):
        return f"reference path (PyTorch), Triton is missing (pip install triton): {names}"
    return f"Triton kernels: {names}"


def _found(module: str) -> bool:
    """Whether a module is there, without importing it or the packages around it."""
    name, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:
        return False
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return False
        name = f"{name}.{part}"
        spec = importlib.machinery.PathFinder.find_spec(name, spec.submodule_search_locations)
    return spec is not None


def _has_metadata(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _nvcc() -> str:
    from vavae_kernels import _extension

    try:
        return f"{'present':<12} compiles AdamWEMA's step: {_extension.nvcc()}"
    except _extension.BuildError:
        return f"{'missing':<12} compiles AdamWEMA's step, else torch's fused AdamW runs; put CUDA's compiler on PATH, or set CUDA_HOME"


def _apex() -> str:
    """The package index has another project of this name; NVIDIA's has multi-tensor optimizers."""
    if not _found("apex"):
        return "missing"
    return "present" if _found("apex.multi_tensor_apply") else "not NVIDIA's"


def _misfits() -> list[str]:
    """Packages that do not fit each other, a line each."""
    from vavae_kernels import _versions

    triton = _versions.found_version("triton")
    apex = "apex is the package index's, another project than NVIDIA's: pip uninstall apex" if _apex() == "not NVIDIA's" else None
    found = (_versions.triton_misfit(triton) if triton else None, _versions.torchvision_misfit(), apex)
    return [line for line in found if line]
