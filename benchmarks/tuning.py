"""Launch configurations worth trying, tried: each kernel's, side by side inside its operator at a real shape."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.operators import Case, Settings
from benchmarks.timing import Race, rotation, tensor_bytes
from vavae_kernels._launch import Config, forced, questions
from vavae_kernels.testing import numerics
from vavae_kernels.testing.spec import DTYPES

MOST = 8  # configurations of an operator that are tried
WORTH = 1.02  # how much faster than the shipped one another must be to be proposed


def as_json(config: Config) -> dict[str, Any]:
    """As `configs/<device>.json` writes it."""
    return dict(tile=list(config.tile), warps=config.warps, stages=config.stages)


def tune(case: Case, device: torch.device, settings: Settings, most: int = MOST) -> Iterator[dict[str, Any]]:
    """A row for each kernel of `case` that has configurations to try: two or more of each, `most` of all of them where they are few.

    A wrong or refused configuration is named and not timed.
    """
    sets = rotation(lambda: case.draw(device), tensor_bytes, device)
    cotangents = numerics.draw_cotangents(case.spec, sets[0])

    def forward(inputs):
        with torch.no_grad():
            case.spec.function(**inputs, impl="triton")

    def both(inputs):
        results = numerics.outputs(case.spec.function(**inputs, impl="triton"))
        wanted = [inputs[n] for n in case.spec.gradients if isinstance(inputs.get(n), Tensor) and inputs[n].requires_grad]
        torch.autograd.grad(results, wanted, list(cotangents))

    asked: dict[str, tuple[str, Callable]] = {}
    for run in (forward, both) if case.spec.gradients else (forward,):
        with questions() as answers:
            run(sets[0])
        for kernel, key in answers:
            asked.setdefault(kernel, (key, run))
    tried = {kernel: configs for kernel, configs in case.spec.configs.items() if kernel in asked}
    for kernel, configs in tried.items():
        yield _row(case, kernel, *asked[kernel], configs[: max(2, most // len(tried))], sets, device, settings)


def _row(case: Case, kernel: str, key: str, run: Callable, configs: tuple[Config, ...], sets: list, device: torch.device, settings: Settings):
    left_out, calls = {}, {}
    by_name = {f"{config.tile} {config.warps} {config.stages}": config for config in configs}
    for name, config in by_name.items():
        fault = _fault(case, kernel, config, device)
        if fault:
            left_out[name] = fault
        else:
            calls[name] = [lambda inputs=inputs, config=config: _run_with(kernel, config, run, inputs) for inputs in sets]
    row = dict(op=case.spec.name, kernel=kernel, launch_key=key, shape=case.shape, left_out=left_out)
    if not calls:
        return row | dict(us={}, best=None)
    race = Race(calls, device, settings.seconds / 2, settings.warm_up / 4)
    for _ in range(settings.rounds):
        race.round()
    timings = race.timings
    best = min(timings, key=lambda name: timings[name].median)
    shipped = next(iter(by_name))
    worth = shipped not in timings or race.ratio(shipped, best) >= WORTH
    return row | dict(
        us={name: round(1e6 * t.median, 3) for name, t in timings.items()}, spread={name: round(t.spread, 4) for name, t in timings.items()},
        shipped=shipped, best=best, proposed=as_json(by_name[best]) if worth and best != shipped else None, how="graph" if race.graph else "calls",
    )  # fmt: skip


def _run_with(kernel: str, config: Config, run: Callable, inputs: dict) -> None:
    with forced({kernel: config}):
        run(inputs)


def _fault(case: Case, kernel: str, config: Config, device: torch.device) -> str | None:
    """Why a configuration cannot be used: outside the numerics rule at the real width, or refused by the compiler."""
    sizes = {**case.sizes, "B": min(case.sizes["B"], 2)} if "B" in case.sizes else case.sizes
    try:
        with forced({kernel: config}):
            wrong = numerics.faults(case.spec, lambda: case.spec.inputs(sizes, DTYPES[case.dtypes], case.variant, device))
    except Exception as refusal:  # the compiler's, the driver's or ours: an experiment that fails is left out
        return f"{type(refusal).__name__}: {str(refusal)[:120]}"
    return wrong[0] if wrong else None
