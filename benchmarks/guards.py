"""What the bench refuses to fall under: `guards.yaml`, read strictly, and how a measurement is judged by it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from benchmarks import optimizers, sampling, steps, tokenizer_steps
from benchmarks.records import Row
from vavae_kernels.testing.spec import Spec, specs

FILE = Path(__file__).with_name("guards.yaml")
MODES = ("forward", "backward", "forward+backward", "step")
BASELINES = ("eager", "compile", "roofline", *list(optimizers.CANDIDATES)[1:])

Least = Mapping[str, float]  # baseline -> the least ratio to it; "roofline" -> the least share of the copy bandwidth


@dataclass(frozen=True)
class Counted:
    """The most that a call may do at its operator's first real shape; forward, backward.

    launches: kernels and PyTorch operations. bytes: touched, over the byte model, the larger of both passes. allocated: MB a
    sample, results included.
    """

    launches: tuple[float, float]
    bytes: float
    allocated: tuple[float, float]


@dataclass(frozen=True)
class OnHost:
    """What needs no GPU and belongs to no operator: latents_over_plain, the latent stream's speed over plain reading of the same files;
    images_over_plain, that of decoding and cropping photos over a plain loader; adamw_bytes, the most bytes a parameter that a step of
    csrc's host build moves; of evaluation, the speed of the Fréchet distance over SciPy's and torch-fidelity's way, that of mean and
    covariance, and that of precision and recall."""

    latents_over_plain: float
    images_over_plain: float
    adamw_bytes: float
    frechet_over_scipy: float
    frechet_over_fidelity: float
    statistics_over_fidelity: float
    manifolds_over_fidelity: float


@dataclass(frozen=True)
class Guards:
    """counted: by operator. ops: operator -> "shape, variant" -> mode -> least ratios. steps: name -> least ratios."""

    counted: Mapping[str, Counted]
    ops: Mapping[str, Mapping[str, Mapping[str, Least]]]
    steps: Mapping[str, Least]
    host: OnHost

    def faults(self, rows: Iterable[Row]) -> list[str]:
        """A line for each guard that a measured row falls under, or that its row cannot answer."""
        return [fault for row in rows for fault in self._faults(row)]

    def _faults(self, row: Row) -> list[str]:
        least: Least = {}
        if row.get("section") == "steps":
            least = self.steps.get(row["name"], {})
        elif row.get("section") == "ops":
            least = self.ops[row["op"]].get(case_name(row["shape"], row["variant"]), {}).get(row["mode"], {})
        return [fault for what, value in least.items() if (fault := _fault(row, what, value))]


def case_name(shape: str, variant: str) -> str:
    return f"{shape}, {variant}" if variant else shape


def _fault(row: Row, what: str, least: float) -> str | None:
    found = row.get("roofline") if what == "roofline" else row["ratio"].get(what)
    if found is None:
        reason = row.get("left_out", {}).get(what, "it was not measured")
        return f"{row['key']}: no {what} to hold the guard of {least} against: {reason}"
    unit = "of the copy bandwidth" if what == "roofline" else f"x {what}"
    return None if found >= least else f"{row['key']}: {found:.3f} {unit}, the guard is {least}"


class GuardError(ValueError):
    """A guards file that cannot be meant: one line."""


def read(path: Path = FILE) -> Guards:
    """The guards of a file. `GuardError` where it has an unknown key, lacks an operator, or holds what is no number above 0."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise GuardError(f"{path}: {' '.join(str(error).split())}") from error
    file = _Reader(path)
    top = file.table(content, "", ("ops", "steps", "host"))
    known = specs()
    counted, ops = {}, {}
    for name, guard in file.table(top["ops"], "ops", (*known, checked_apart), "an operator has no guard").items():
        allowed = ("gpu",) if name == checked_apart else (*_names(Counted), "gpu")
        guard = file.table(guard, f"ops.{name}", allowed)
        if name != checked_apart:
            counted[name] = Counted(*(file.numbers(guard[key], f"ops.{name}.{key}") for key in _names(Counted)))
        ops[name] = file.cases(guard["gpu"], f"ops.{name}.gpu", known.get(name))
    named = [step.name for step in (*steps.STEPS, *sampling.STEPS, *tokenizer_steps.STEPS)]
    baselines = (*steps.BASELINES, *sampling.BASELINES, *tokenizer_steps.BASELINES)
    by_step = {name: file.least(value, f"steps.{name}", baselines) for name, value in file.some(top["steps"], "steps", named)}
    host = {key: file.number(value, f"host.{key}") for key, value in file.table(top["host"], "host", _names(OnHost)).items()}
    return Guards(counted, ops, by_step, OnHost(**host))


checked_apart = "adamw_ema"  # csrc's operator has no spec: its counted bytes are `host.adamw_bytes`


def _names(record: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(record))


class _Reader:
    """Checks of a file's parts, each with the place where it stands."""

    def __init__(self, path: Path):
        self.path = path

    def fail(self, place: str, message: str) -> GuardError:
        return GuardError(f"{self.path}: {place or 'the file'}: {message}")

    def some(self, value: Any, place: str, known: Iterable[str]) -> list[tuple[str, Any]]:
        """Items of a table whose keys are among `known`."""
        known = list(known)
        if not isinstance(value, dict) or not value:
            raise self.fail(place, f"expected a table, found {value!r}")
        for key in value:
            if key not in known:
                raise self.fail(place, f"unknown key {key!r}; known: {', '.join(known)}")
        return list(value.items())

    def table(self, value: Any, place: str, known: Iterable[str], why: str = "a key is missing") -> dict[str, Any]:
        """A table of exactly the keys `known`."""
        known = list(known)
        found = dict(self.some(value, place, known))
        missing = [key for key in known if key not in found]
        if missing:
            raise self.fail(place, f"{why}: {', '.join(missing)}; add {place + '.' if place else ''}{missing[0]}")
        return found

    def number(self, value: Any, place: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise self.fail(place, f"expected a number, 0 or more, found {value!r}")
        return float(value)

    def numbers(self, value: Any, place: str) -> Any:
        """A number, or [forward, backward]."""
        if place.endswith(".bytes"):
            return self.number(value, place)
        if not isinstance(value, list) or len(value) != 2:
            raise self.fail(place, f"expected [forward, backward], found {value!r}")
        return tuple(self.number(part, place) for part in value)

    def least(self, value: Any, place: str, known: Iterable[str]) -> dict[str, float]:
        return {what: self.number(least, f"{place}.{what}") for what, least in self.some(value, place, known)}

    def cases(self, value: Any, place: str, spec: Spec | None) -> dict[str, dict[str, dict[str, float]]]:
        known = [case_name(shape, variant) for shape in spec.real for variant in spec.variants] if spec else ["XL/1"]
        found: dict[str, dict[str, dict[str, float]]] = {}
        for case, modes in self.some(value, place, known):
            by_mode = self.some(modes, f"{place}.{case}", MODES)
            found[case] = {mode: self.least(least, f"{place}.{case}.{mode}", BASELINES) for mode, least in by_mode}
        return found
