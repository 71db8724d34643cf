"""`csrc`, compiled on first use into a cache of the user and loaded through ctypes.

Plain shared libraries with a C interface: no headers of PyTorch, so a build takes seconds and serves every version of it. Tensors
go in as addresses, streams as integers.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

# Fused multiply-adds only where the source writes them: host and device then give the same bits.
_SHARED = ("-std=c++17", "-shared")
_HOST = (*_SHARED, "-O3", "-fPIC", "-ffp-contract=off")
_CUDA = (*_SHARED, "-O3", "-Xcompiler", "-fPIC", "-fmad=false")


class BuildError(RuntimeError):
    """No library of `csrc` could be had: one line with the cause."""


@cache
def library(name: str, device: torch.device) -> ctypes.CDLL:
    """The library of csrc/<name>.cu for a CUDA device, of csrc/<name>.cpp for the CPU; compiled if the cache has none. `BuildError`."""
    try:
        return ctypes.CDLL(str(build(name, target_of(device))))
    except OSError as error:
        raise BuildError(f"csrc/{name} cannot be loaded: {error}") from error


def target_of(device: torch.device) -> str:
    """"cpu", or the architecture of a CUDA device as nvcc calls it: "sm_90"."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "cpu"


def sources() -> Path:
    """The folder csrc: inside the package where a wheel was installed, at the top of the repository in a checkout."""
    package = Path(__file__).parent
    return package / "csrc" if (package / "csrc").is_dir() else package.parents[1] / "csrc"


def command(name: str, target: str) -> list[str]:
    """The compiler's command line for csrc/<name> and `target`, up to the output file. `BuildError` where no compiler is found."""
    if target == "cpu":
        return [*_host_compiler(), *_HOST, str(sources() / f"{name}.cpp")]
    if torch.version.hip:
        raise BuildError("csrc is CUDA C++ and this PyTorch is built for ROCm")
    architecture = target.removeprefix("sm_")
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    return [nvcc(), *_CUDA, code, str(sources() / f"{name}.cu")]


def nvcc() -> str:
    """Path of CUDA's compiler: of CUDA_HOME or CUDA_PATH if set, else on PATH, else /usr/local/cuda. `BuildError` if there is none."""
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    on_path = [found] if (found := shutil.which("nvcc")) else []
    for candidate in (*(f"{home}/bin/nvcc" for home in homes), *on_path, "/usr/local/cuda/bin/nvcc"):
        if os.access(candidate, os.X_OK):
            return candidate
    raise BuildError("no nvcc: put CUDA's compiler on PATH, or set CUDA_HOME")


def _host_compiler() -> list[str]:
    """The words of CXX if it is set, else the first C++ compiler on PATH."""
    given = shlex.split(os.environ.get("CXX", ""))
    found = next((path for path in map(shutil.which, given[:1] or ("c++", "g++", "clang++")) if path), None)
    if found is None:
        raise BuildError("no C++ compiler: " + (f"CXX={os.environ['CXX']} is not on PATH" if given else "install g++ or clang++, or set CXX"))
    return [found, *given[1:]]


def build(name: str, target: str) -> Path:
    """The compiled library's file, from the cache or made now.

    The key is all that decides its content: sources, command and version of the compiler, machine. It is compiled beside its place
    and renamed, so that ranks that build at once neither wait for nor disturb each other.
    """
    compile_it = command(name, target)
    folder = cache_folder()
    file = folder / f"{name}-{target}-{_key(compile_it)}.so"
    if file.is_file():
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _run([*compile_it, "-o", f"{scratch}/{file.name}"])
            os.replace(f"{scratch}/{file.name}", file)
    except OSError as error:
        raise BuildError(f"csrc/{name} cannot be written to {folder}: {error}; set TORCH_EXTENSIONS_DIR") from error
    return file


def cache_folder() -> Path:
    """$TORCH_EXTENSIONS_DIR/vavae_kernels, else vavae_kernels in $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):
        raise BuildError("no home folder to keep compiled libraries in: set XDG_CACHE_HOME")
    return Path(root) / "vavae_kernels"


def _key(compile_it: list[str]) -> str:
    """Sixteen digits of a hash of everything that a build depends on."""
    source = Path(compile_it[-1])
    content = hashlib.sha256()
    for part in (*compile_it[:-1], source.name, platform.machine(), _run([compile_it[0], "--version"])):
        content.update(part.encode() + b"\0")
    for file in (source, *sorted(source.parent.glob("*.h"))):
        content.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return content.hexdigest()[:16]


def _run(arguments: list[str]) -> str:
    """What a compiler prints; `BuildError` with its first complaint where it fails."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{arguments[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        complaint = next((line for line in said if "error" in line.lower()), said[0] if said else "no message")
        raise BuildError(f"{arguments[0]} failed with exit code {done.returncode}: {complaint.strip()}")
    return done.stdout
