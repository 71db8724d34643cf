"""Which torch, Triton and torchvision fit; what does not is one line with its cure. Nothing is imported to find out."""

import re
import warnings
from importlib.util import find_spec
from pathlib import Path

OLDEST_TORCH = (2, 11)
OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 9)  # torch 2.11 brings 3.6; 3.9 is the newest that the kernels were tested with


def require_torch() -> None:
    """ImportError if the torch that would be imported is too old; one that is absent, or tells no version, is left to its own import."""
    version = found_version("torch")
    if version is not None and _release(version) < OLDEST_TORCH:
        raise ImportError(f"torch {version} is too old, {_dotted(OLDEST_TORCH)} or newer is needed: pip install 'torch>={_dotted(OLDEST_TORCH)}'")


def triton_misfit(version: str) -> str | None:
    """Why kernels are not known to run on this Triton, and what to do; None if they are."""
    if OLDEST_TRITON <= _release(version) <= NEWEST_TRITON:
        return None
    oldest, newest = map(_dotted, (OLDEST_TRITON, NEWEST_TRITON))
    return f"Triton {version}: the kernels were tested with {oldest} to {newest}; reinstall torch, which brings the one that fits it"


def require_triton(version: str) -> None:
    """ImportError if this Triton is too old for the kernels; a warning if it is newer than any that they were tested with."""
    misfit = triton_misfit(version)
    if misfit is not None and _release(version) < OLDEST_TRITON:
        raise ImportError(misfit)
    if misfit is not None:
        warnings.warn(misfit, stacklevel=3)


def torchvision_misfit() -> str | None:
    """Why the torchvision that is installed does not fit the torch that is, and what to do; None if it does, or one of them is absent."""
    torch, torchvision = found_version("torch"), found_version("torchvision")
    if torch is None or torchvision is None:
        return None
    major, minor = _release(torch)
    fitting = (0, minor + 15)  # 0.15 came with 2.0, and each with the next since
    if major != 2 or _release(torchvision) == fitting:
        return None
    return f"torchvision {torchvision} is not the one for torch {torch}: pip install 'torchvision=={_dotted(fitting)}.*'"


def found_version(package: str) -> str | None:
    """What `<package>/version.py`, or its `__init__.py`, gives as `__version__`; None if there is no such package, or it gives none."""
    try:
        spec = find_spec(package)
    except ValueError:  # a module that was put in place by hand
        return None
    if spec is None or spec.origin is None:
        return None
    for file in (Path(spec.origin).with_name("version.py"), Path(spec.origin)):
        if file.is_file() and (line := re.search(r"^__version__\b[^'\"\n]*['\"](\d+\.\d+[^'\"]*)", file.read_text(encoding="utf-8"), re.MULTILINE)):
            return line[1]
    return None


def _release(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu" and of "2.13.0a0+git1234567"."""
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    return int(major), int(minor)


def _dotted(release: tuple[int, int]) -> str:
    return "{}.{}".format(*release)
