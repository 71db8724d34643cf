"""AdamW with an EMA of the weights over all parameters of a model: ours, the best of PyTorch, and the public training loop's."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Play, Race, play
from vavae_fast.models import create_lightningdit
from vavae_kernels import AdamWEMA
from vavae_kernels._compat import INTERPRETED

HYPER = dict(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)
DECAY = 0.9999
KEY = "ops/adamw_ema/XL/1/step"
BYTES_A_PARAMETER = 38  # p, g, m, v, ema read and p, m, v, ema written in fp32, and the bf16 copy

Step = Callable[[], Any]
Candidate = Callable[[list[Tensor], bool], Step]  # copy: whether a step also refreshes a bf16 copy of the weights


def ours(parameters: list[Tensor], copy: bool = False) -> Step:
    """The compiled kernel or an error, never its substitute; the host build of it in a rehearsal."""
    compiled = parameters[0].is_cuda or INTERPRETED
    return AdamWEMA(parameters, **HYPER, ema_decay=DECAY, impl="triton" if compiled else "auto", bf16_copy=copy).step


def fused_and_foreach(parameters: list[Tensor], copy: bool = False) -> Step:
    """torch.optim.AdamW(fused=True), then one _foreach_lerp_ and one _foreach_copy_: few launches, each state read twice."""
    optimizer = torch.optim.AdamW(parameters, **HYPER, fused=True, capturable=parameters[0].is_cuda)
    weights = [p.detach() for p in parameters]
    ema, copies = [w.clone() for w in weights], [w.to(torch.bfloat16) for w in weights] if copy else []

    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(ema, weights, 1 - DECAY)
        if copies:
            torch._foreach_copy_(copies, weights)

    return step


def foreach_and_loop(parameters: list[Tensor], copy: bool = False) -> Step:
    """The public loop: AdamW(foreach), two small kernels for the EMA of each parameter, and autocast's casts."""
    optimizer = torch.optim.AdamW(parameters, **HYPER, foreach=True)
    weights = [p.detach() for p in parameters]
    ema = [w.clone() for w in weights]

    def step() -> None:
        optimizer.step()
        for average, w in zip(ema, weights):
            average.mul_(DECAY).add_(w, alpha=1 - DECAY)
        for w in weights if copy else ():
            w.to(torch.bfloat16)

    return step


CANDIDATES: Mapping[str, Candidate] = {
    "ours": ours, "fused AdamW, foreach EMA": fused_and_foreach, "foreach AdamW, EMA loop": foreach_and_loop,
}  # fmt: skip


def parameter_shapes(model: str | None) -> list[tuple[int, ...]]:
    """Shapes of a model's trained parameters; a few small ones for None."""
    if model is None:
        return [(64, 32), (32,), (7, 3), (1,)]
    with torch.device("meta"):
        return [tuple(p.shape) for p in create_lightningdit(model).parameters() if p.requires_grad]


def draw(shapes: list[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    parameters = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


def error(device: torch.device, steps: int = 5) -> float:
    """Error of ours after some steps against fp64 over what the numerics rule allows: 1 or less is right."""
    start = draw(parameter_shapes(None), device)

    def after(make: Candidate, dtype: torch.dtype, where: torch.device) -> list[Tensor]:
        parameters = [p.detach().to(where, dtype, copy=True).requires_grad_() for p in start]
        for p, q in zip(parameters, start):
            p.grad = q.grad.to(where, dtype)
        step = make(parameters, False)
        for _ in range(steps):
            step()
        return [p.detach().double().cpu() for p in parameters]

    exact = after(foreach_and_loop, torch.float64, torch.device("cpu"))
    mine, theirs = after(ours, torch.float32, device), after(fused_and_foreach, torch.float32, device)
    worst = 0.0
    for e, m, t in zip(exact, mine, theirs):
        band = torch.finfo(torch.float32).eps * e.abs().max()
        worst = max(worst, ((m - e).abs().max() / (2 * ((t - e).abs().max() + band))).item())
    return worst


def measure(
    model: str | None, device: torch.device, rounds: int, seconds: float, ceilings: Mapping[str, float], last: Play = play
) -> dict[str, Any]:
    """The row of one step, bf16 copy included, over all parameters of `model`; AssertionError, and no time, where ours is not right."""
    found = error(device)
    if not found <= 1:
        raise AssertionError(f"adamw_ema: error {found:.3g} times what the rule allows")
    parameters = draw(parameter_shapes(model), device)  # shared: a step's time does not depend on their values
    race = Race({name: [make(parameters, True)] for name, make in CANDIDATES.items()}, device, seconds, warm_up=min(seconds, 0.1), graph=False)
    last(race.round, rounds)
    timings = race.timings
    moved = BYTES_A_PARAMETER * sum(p.numel() for p in parameters)
    tbps = moved / timings["ours"].median / 1e12
    return dict(
        op="adamw_ema", shape="XL/1", variant="", dtypes="fp32", mode="step",
        us={name: round(1e6 * t.median, 3) for name, t in timings.items()},
        spread={name: round(t.spread, 4) for name, t in timings.items()},
        ratio={name: round(race.ratio(name), 4) for name in timings if name != "ours"},
        how="calls", left_out={}, note="", worst=round(found, 4), bytes=moved, tbps=tbps,
        **({"roofline": tbps / ceilings["tbps"]} if ceilings.get("tbps") else {}),
    )  # fmt: skip
