"""Kernels compiled for GPUs that are not here: registers, stack, shared memory and spills of what the launchers really launch.

    python -m vavae_kernels.testing.offline [--ops NAME ...] [--targets 80 90 100 120] [--json FILE] [--all-configs]

Each operator's forward and backward run dry at their real shapes, every launch is recorded, and each distinct one is compiled
with Triton's own ptxas for the argument types and alignments that it had. Tensors are fake: nothing is computed or allocated.
Needs Triton without TRITON_INTERPRET.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import _compat
from .._compat import triton
from .._launch import Config, Launch, compiling_for, forced, watched
from .numerics import outputs
from .spec import DTYPES, Spec, specs

TARGETS = (80, 90, 100, 120)
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip
SHARED_LIMIT = {80: 163, 90: 227, 100: 227, 120: 99}  # KiB that one program can have


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target. spills: local loads and stores in the machine code; stack and shared in bytes.

    shipped: its configuration is the one that the launcher chooses, not one that the bench tries.
    """

    op: str
    kernel: str
    target: int
    case: str
    config: Config
    shipped: bool
    registers: int
    stack: int
    spills: int
    shared: int

    def faults(self, registers: int) -> list[str]:
        """What is wrong with it, given the most registers it may use."""
        limit = SHARED_LIMIT[self.target] * 1024
        faults = []
        if self.registers > registers:
            faults.append(f"{self.registers} registers, at most {registers}")
        if self.stack or self.spills:
            faults.append(f"{self.stack} bytes of stack, {self.spills} local accesses, expected none")
        if self.shared > limit:
            faults.append(f"{self.shared} bytes of shared memory, at most {limit}")
        return [f"{self.op}: {self.kernel} sm_{self.target} {self.case} {self.config}: {fault}" for fault in faults]


def launches(spec: Spec, shape: str, dtypes: str, variant: str) -> list[Launch]:
    """Every launch of one forward and backward of `spec` at a real shape, recorded and not run."""
    recorded: list[Launch] = []
    with FakeTensorMode(), watched(recorded.append, run=False):
        inputs = spec.inputs(spec.real[shape], DTYPES[dtypes], variant, torch.device("cpu"))
        results = outputs(spec.function(**inputs, impl="triton"))
        if spec.gradients:
            torch.autograd.backward(results, [torch.empty_like(result) for result in results])
    return recorded


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types, constants and alignment of a launch's arguments, by the rules of Triton's own specialisation."""
    types, constants, attributes = {}, dict(launch.constexprs), {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if name in launch.constexprs or value is None or (type(value) is int and value == 1):
            types[name] = "constexpr"
            constants.setdefault(name, value)
        elif isinstance(value, Tensor):
            types[name] = POINTERS[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif type(value) is int:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            raise TypeError(f"{launch.name}: argument {name} is a {type(value).__name__}; make it a constexpr")
    return types, constants, attributes


def compile_launch(launch: Launch, target: int) -> tuple[int, int, int, int]:
    """-> registers, stack, spills, shared of `launch`'s kernel for sm_<target>."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = signature(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    options = dict(num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True)
    binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))
    return registers, stack, len(re.findall(r"\b(?:LDL|STL)\b", code)), binary.metadata.shared


def compiled(spec: Spec, targets: tuple[int, ...] = TARGETS, all_configs: bool = False, cases: str = "all") -> Iterator[Compiled]:
    """Every distinct kernel of `spec` at its real shapes, for each target; with `all_configs` also those worth trying.

    cases "first" takes the first dtypes and variant alone: what the published model runs.
    """
    first = cases == "first"
    seen = set()
    calls = product(spec.real, spec.dtypes[:1] if first else spec.dtypes, spec.variants[:1] if first else spec.variants)
    for (shape, dtypes, variant), forcing, target in product(calls, _configurations(spec, all_configs), targets):
        with forced(forcing) if forcing else nullcontext(), compiling_for(target):
            recorded = launches(spec, shape, dtypes, variant)
        for launch in recorded:
            if forcing and launch.name not in forcing:
                continue
            config = forcing.get(launch.name, Config((), launch.warps, launch.stages))
            identity = (launch.name, str(signature(launch)), launch.warps, launch.stages, target)
            if identity in seen:
                continue
            seen.add(identity)
            case = f"{shape} {dtypes} {variant}".strip()
            yield Compiled(spec.name, launch.name, target, case, config, not forcing, *compile_launch(launch, target))


def _configurations(spec: Spec, every: bool) -> list[dict[str, Config]]:
    tried = [{kernel: config} for kernel, configs in spec.configs.items() for config in configs] if every else []
    return [{}, *tried]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="example: python -m vavae_kernels.testing.offline --ops swiglu")
    parser.add_argument("--ops", nargs="*", default=sorted(specs()), choices=sorted(specs()), metavar="NAME")
    parser.add_argument("--targets", nargs="*", type=int, default=TARGETS, choices=TARGETS)
    parser.add_argument("--cases", choices=("first", "all"), default="all")
    parser.add_argument("--all-configs", action="store_true", help="also the launch configurations that the bench tries")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if _compat.TRITON_VERSION is None or _compat.INTERPRETED:
        print("offline compilation needs Triton, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    rows, faults = [], []
    for name in options.ops:
        spec = specs()[name]
        for kernel in compiled(spec, tuple(options.targets), options.all_configs, options.cases):
            rows.append(asdict(kernel))
            faults += kernel.faults(spec.registers) if kernel.shipped else []
            c = kernel.config
            print(f"{kernel.kernel:28s} sm_{kernel.target:<4d} {kernel.case:32s} {str(c.tile):12s} warps {c.warps} stages {c.stages}"
                  f"  registers {kernel.registers:3d}  stack {kernel.stack}  spills {kernel.spills}  shared {kernel.shared}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
