"""Processes that are killed, power that goes: at every I/O event of a save, and at any time in every stage.

Parts: `saves`, `stages`, and `baselines`, the same on other ways to save.
"""

import logging
from typing import Any

import torch
from torture import io_events
from torture import saves as fire
from torture.tally import Effort, Tally

POWER = {"content": "what was not synced is empty", "names": "neither its content nor its name is there"}


def run(effort: Effort) -> list[Tally]:
    return [*saves(effort), *stages(effort), *baselines(effort)]


def saves(effort: Effort) -> list[Tally]:
    """Every I/O event of a save in every situation that an earlier kill can leave."""
    rows = [Tally("SIGKILL at every I/O event of a save, one process")]
    rows += [Tally(f"power cut at every I/O event of a save: {what}") for what in POWER.values()]
    if skipped(rows):
        return rows
    for row, loss in zip(rows, ("none", *POWER)):
        fire.every_event(fire.ours(power=loss != "none"), effort, row, loss)
    return rows


def stages(effort: Effort) -> list[Tally]:
    """Two ranks that train, then each stage: killed and started again until they end, in the bits of the undisturbed."""
    from torture.restarts import killed_and_started_again
    from torture.stages import STAGES, TRAIN, TRAIN_SHARDED, prepared

    plan = [(stage, 2, 50, Tally(f"SIGKILL, SIGTERM at random moments on two ranks: {stage.name}")) for stage in (TRAIN, TRAIN_SHARDED)]
    plan += [
        (stage, processes, 20, Tally(f"SIGKILL, SIGTERM at random moments of a stage: {stage.name}, {counted(processes)}"))
        for stage in STAGES
        for processes in stage.processes
    ]
    plan = some(plan, effort, "stages")
    rows = [row for *_, row in plan]
    if not skipped(rows):
        torch.set_num_threads(1)
        folder = prepared(effort.folder / "stages")
        for stage, processes, kills, row in plan:
            killed_and_started_again(stage, folder, processes, effort.count(kills), effort.draw(row.fault), row)
    return rows


def baselines(effort: Effort) -> list[Tally]:
    """The same kills, cuts and flipped bits on other ways to save. What they lose is no failure of ours."""
    from torture.baselines import BASELINES, flipped_bits, scheme

    logging.disable()  # a traceback for each of hundreds of faults, otherwise
    rows = []
    for baseline in BASELINES:
        killed = Tally(f"{baseline.name}: SIGKILL at every I/O event", reference=True)
        cut = Tally(f"{baseline.name}: power cut at every I/O event, {POWER['content']}", reference=True)
        flipped = Tally(f"{baseline.name}: one bit flipped", reference=True)
        if not skipped([killed, cut]):
            fire.every_event([scheme(baseline)], effort, killed)
            fire.every_event([scheme(baseline)], effort, cut, loss="content")
        flipped_bits(baseline, effort, flipped)
        rows += [killed, cut, flipped]
    return rows


def some(things: list[Any], effort: Effort, name: str) -> list[Any]:
    """All from size 0.2 on; below, as many as there is time for."""
    chosen = effort.draw(name).sample(range(len(things)), min(len(things), effort.count(5 * len(things))))
    return [things[k] for k in sorted(chosen)]


def counted(processes: int) -> str:
    return f"{processes} process{'es' if processes > 1 else ''}"


def skipped(rows: list[Tally]) -> bool:
    """Whether I/O events cannot be seen here, which the rows then say."""
    reason = io_events.missing()
    for row in rows:
        row.remark = f"not tried: {reason}" if reason else ""
    return reason is not None
