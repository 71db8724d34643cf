"""Two metrics files side by side: the values, and everything in which what made them differs."""

from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.commands.report import flat
from vavae_fast.errors import BadInput, is_number

_FACTS = ("kind", "format", "command", "time", "versions", "protocol", "made_by", "judged")  # of a metrics file; all else are values
_NOT_COMPARED = ("command", "time", "protocol.warnings")
# Values of two files whose entries here differ do not measure the same thing.
_PROTOCOL = tuple(f"protocol.{name}" for name in (
    "name", "protocol", "inception_sha256", "reference_sha256", "fid_name", "fd_sha256", "fd_features", "vgg_sha256", "lpips_sha256",
    "fingerprint", "image_size", "precision_recall_k", "inception_score_split",
))  # fmt: skip
_Z = 1.96  # of a 95 % interval


def describe(first: Path, second: Path) -> str:
    """A table of both files' values, then what differs in how they were made, most important first."""
    a, b = _read(first), _read(second)
    lines = [f"{'':<22}{'A':>12}{'B':>12}{'B - A':>12}   A = {first}, B = {second}"]
    values = [{key: value for key, value in one.items() if key not in _FACTS and not key.endswith("_standard_error")} for one in (a, b)]
    for name in dict.fromkeys((*values[0], *values[1])):
        was, now = (one.get(name) for one in values)
        known = is_number(was) and is_number(now)
        lines.append(f"{name:<22}{_value(was):>12}{_value(now):>12}" + (f"{now - was:>+12.4f}{_within_error(name, a, b)}" if known else ""))
    facts = [dict(flat({key: value for key, value in one.items() if key in _FACTS})) for one in (a, b)]
    names = [name for name in dict.fromkeys((*_PROTOCOL, *facts[0], *facts[1])) if not name.startswith(_NOT_COMPARED)]
    different = [(name, facts[0].get(name, "–"), facts[1].get(name, "–")) for name in names if facts[0].get(name) != facts[1].get(name)]
    lines.append("made alike, as far as the files say" if not different else f"{len(different)} differences in what made them:")
    lines += [f"  {'! ' if name in _PROTOCOL else '  '}{name}: {was} -> {now}" for name, was, now in different]
    if any(name in _PROTOCOL for name, *_ in different):
        lines.append("!: the values are not of the same measurement")
    return "\n".join(lines)


def _value(value: float | None) -> str:
    """A value that is not finite (PSNR of equal images) is null in the file; one that was not asked for is not there."""
    return f"{value:.4f}" if is_number(value) else "–"


def _within_error(name: str, a: dict[str, Any], b: dict[str, Any]) -> str:
    errors = [one.get(f"{name}_standard_error") for one in (a, b)]
    if None in errors:
        return ""
    bound = _Z * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    return f"   {'within' if abs(b[name] - a[name]) <= bound else 'beyond'} the 95 % error of the difference, {bound:.4f}"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput(f"{path}: no such file; --compare takes two files that evaluate --json wrote")
    found = artifacts.read_json(path)
    if not isinstance(found, dict) or found.get("kind") != "metrics":
        raise BadInput(f"{path}: not the metrics of evaluate --json; give a file that it wrote")
    return found
