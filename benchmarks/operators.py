"""One operator at one shape: correctness first, then time, side by side with eager, the compiled formula and other libraries."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.timing import Dynamo, FellBack, Play, Race, compiled, fresh_dynamo, play, rotation, tensor_bytes
from vavae_kernels.testing import numerics
from vavae_kernels.testing.spec import DTYPES, Inputs, Spec, specs

MODES = ("forward", "forward+backward")  # "backward" is their difference
SAME = 0.05  # a peer that computes the same: relative error of its first output against ours, in bf16


@dataclass(frozen=True)
class Case:
    """An operator at one of its shapes. The interpreter has small ones, a GPU the real ones of XL/1 and B/1."""

    spec: Spec
    shape: str
    variant: str
    real: bool = True

    @property
    def sizes(self) -> Mapping[str, int]:
        return (self.spec.real if self.real else self.spec.small)[self.shape]

    @property
    def first(self) -> bool:
        """Whether it is the published XL/1's: its operator's first shape and variant."""
        return self.variant == self.spec.variants[0] and self.shape == next(iter(self.spec.real))

    @property
    def dtypes(self) -> str:
        return self.spec.dtypes[0]

    @property
    def key(self) -> str:
        return f"ops/{self.spec.name}/{self.shape}/{self.variant or 'plain'}"

    def draw(self, device: torch.device) -> Inputs:
        return self.spec.inputs(self.sizes, DTYPES[self.dtypes], self.variant, device)


@dataclass(frozen=True)
class Settings:
    """rounds of every candidate, of `seconds` each after `warm_up` seconds; backend of torch.compile."""

    rounds: int = 5
    seconds: float = 0.05
    warm_up: float = 0.1
    backend: str = "inductor"


REHEARSAL = Settings(rounds=1, seconds=0.0, warm_up=0.0, backend="aot_eager")


def smallest(spec: Spec) -> str:
    """The small shape with the fewest elements, but some: what a rehearsal runs in the interpreter."""
    return min((name for name, sizes in spec.small.items() if 0 not in sizes.values()), key=lambda name: math.prod(spec.small[name].values()))


def rehearsal_cases() -> list[Case]:
    return [Case(spec, smallest(spec), spec.variants[0], real=False) for spec in specs().values()]


def cases() -> list[Case]:
    """Most valuable first: the published model's variant at XL/1, then the other shapes, then the other variants at XL/1."""
    found = specs().values()
    places = range(max(len(spec.real) for spec in found))
    shapes = [Case(spec, list(spec.real)[place], spec.variants[0]) for place in places for spec in found if place < len(spec.real)]
    return shapes + [Case(spec, next(iter(spec.real)), variant) for spec in found for variant in spec.variants[1:]]


class Wrong(AssertionError):
    """Outputs or gradients outside the numerics rule: no time of this case is shown."""


def worst_error(spec: Spec, draw: Callable[[], Inputs]) -> float:
    """Largest error of ours over what the numerics rule allows; `Wrong` where the rule is broken. `draw` gives fresh inputs."""
    found = numerics.errors(spec, draw())
    if not all(error.within for error in found) and (faults := numerics.faults(spec, draw)):
        raise Wrong(f"{spec.name}: " + "; ".join(faults))
    return max((error.ours / error.allowed for error in found if error.allowed), default=0.0)


class Comparison:
    """The race of one case in one mode, and the row that comes of it."""

    def __init__(self, case: Case, mode: str, device: torch.device, settings: Settings, dynamo: Dynamo):
        self.case, self.mode, self.settings, self.dynamo = case, mode, settings, dynamo
        self.left_out: dict[str, str] = {}
        sets = rotation(lambda: self._set(device), lambda one: tensor_bytes(one[0]), device)
        plain = peers.plain(case.spec)
        by_compiler = compiled(plain, settings.backend)
        functions: dict[str, Callable[[Inputs], Callable[[], Any]]] = {
            "ours": lambda inputs: lambda: case.spec.function(**inputs, impl="triton"),
            "eager": lambda inputs: lambda: plain(**inputs),
            "compile": lambda inputs: lambda: by_compiler(**inputs),
        }
        candidates = {name: [self._call(build(inputs), inputs, cotangents) for inputs, cotangents in sets] for name, build in functions.items()}
        with dynamo.compiles("compile"):
            candidates["compile"][0]()
        candidates |= self._peers(sets)
        self.graph_note = ""
        self.race = self._race(candidates, device)
        dynamo.settle()

    def _set(self, device: torch.device) -> tuple[Inputs, tuple[Tensor, ...]]:
        inputs = self.case.draw(device)
        return inputs, numerics.draw_cotangents(self.case.spec, inputs) if self.mode != "forward" else ()

    def _call(self, function: Callable[[], Any], inputs: Inputs, cotangents: tuple[Tensor, ...]) -> Callable[[], Any]:
        """No name is bound to a result: it is freed at once, as in a model."""
        if self.mode == "forward":
            return torch.no_grad()(function)
        wanted = [inputs[name] for name in self.case.spec.gradients if isinstance(inputs.get(name), Tensor) and inputs[name].requires_grad]

        def call():
            results = numerics.outputs(function())
            return torch.autograd.grad(results, wanted, [c.to(r.dtype) for c, r in zip(cotangents, results)], allow_unused=True)

        return call

    def _peers(self, sets: list) -> dict[str, list[Callable[[], Any]]]:
        """Those that are installed, take this case and compute the same; why the others do not run goes into the row."""
        found = {}
        inputs = sets[0][0]
        with torch.no_grad():
            expected = numerics.outputs(self.case.spec.reference(**inputs))[-1].double()
        for name, build in peers.peers(self.case.spec).items():
            try:
                with torch.set_grad_enabled(self.mode != "forward"):
                    calls = [self._call(build(one), one, cotangents) for one, cotangents in sets]
                    got = numerics.outputs(build(inputs)())[-1].detach().double()
                    for call in calls[:1]:
                        call()
            except (ImportError, NotImplementedError) as reason:
                self.left_out[name] = str(reason)
            except (RuntimeError, ValueError, TypeError, AttributeError) as fault:  # another library's: its fault is its row, not ours
                self.left_out[name] = f"{type(fault).__name__}: {str(fault).splitlines()[0][:120] if str(fault) else ''}"
            else:
                difference = ((got - expected).norm() / expected.norm()).item()
                if difference <= SAME:
                    found[name] = calls
                else:
                    self.left_out[name] = f"computes something else: relative difference {difference:.3g}"
        return found

    def _race(self, candidates: dict, device: torch.device) -> Race:
        s = self.settings
        try:
            return Race(candidates, device, s.seconds, s.warm_up)
        except RuntimeError as error:
            if isinstance(error, (torch.cuda.OutOfMemoryError, FellBack)):
                raise
            self.graph_note = f"not captured: {str(error).splitlines()[0][:120]}"
            return Race(candidates, device, s.seconds, s.warm_up, graph=False)

    def row(self, ceilings: Mapping[str, float]) -> dict[str, Any]:
        """What goes into the results file. ceilings: measured tbps of a copy and tflops of a matrix product, where there are."""
        self.dynamo.check()
        timings = self.race.timings
        seconds = {name: timing.median for name, timing in timings.items()}
        case = self.case
        forward, backward = case.spec.bytes(case.sizes, DTYPES[case.dtypes], case.variant)
        moved = forward if self.mode == "forward" else forward + backward
        rates: dict[str, Any] = {"bytes": moved, "tbps": moved / seconds["ours"] / 1e12}
        if ceilings.get("tbps"):
            rates["roofline"] = rates["tbps"] / ceilings["tbps"]
        if case.spec.flops is not None:
            rates["tflops"] = case.spec.flops(case.sizes) * (1.0 if self.mode == "forward" else 3.5) / seconds["ours"] / 1e12
        return dict(
            op=case.spec.name, shape=case.shape, variant=case.variant, dtypes=case.dtypes, mode=self.mode,
            us={name: round(1e6 * s, 3) for name, s in seconds.items()},
            spread={name: round(timing.spread, 4) for name, timing in timings.items()},
            ratio={name: round(self.race.ratio(name), 4) for name in seconds if name != "ours"},
            how="graph" if self.race.graph else "calls", left_out=self.left_out, note=self.graph_note, **rates,
        )  # fmt: skip


def measure(
    case: Case, device: torch.device, settings: Settings, ceilings: Mapping[str, float], last: Play = play
) -> list[dict[str, Any]]:
    """Rows of a case: forward, forward+backward, and backward as their difference. `Wrong` or `FellBack` instead of a bad row.

    last plays the rounds of the last mode that is timed: pytest-benchmark keeps its books of that one.
    """
    worst = worst_error(case.spec, lambda: case.draw(device))
    rows = []
    modes = MODES if case.spec.gradients else MODES[:1]
    for mode in modes:
        with fresh_dynamo() as dynamo:
            comparison = Comparison(case, mode, device, settings, dynamo)
            (last if mode == modes[-1] else play)(comparison.race.round, settings.rounds)
            rows.append(comparison.row(ceilings) | dict(worst=round(worst, 4)))
        del comparison
    return rows + ([backward(*rows, ceilings)] if len(rows) == 2 else [])


def backward(forward: dict[str, Any], both: dict[str, Any], ceilings: Mapping[str, float]) -> dict[str, Any]:
    """The backward pass as the difference of two medians, where every candidate has both."""
    us = {name: both["us"][name] - forward["us"][name] for name in forward["us"].keys() & both["us"].keys()}
    ratio = {name: round(value / us["ours"], 4) for name, value in us.items() if name != "ours"} if us["ours"] > 0 else {}
    moved = both["bytes"] - forward["bytes"]
    row = {name: both[name] for name in ("op", "shape", "variant", "dtypes", "how", "left_out", "note", "worst")}
    row |= dict(mode="backward", us={name: round(value, 3) for name, value in us.items()}, ratio=ratio, bytes=moved)
    if us["ours"] > 0:
        row["tbps"] = moved / us["ours"] / 1e6
        row |= {"roofline": row["tbps"] / ceilings["tbps"]} if ceilings.get("tbps") else {}
    return row


