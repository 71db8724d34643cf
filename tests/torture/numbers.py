"""Numbers that are not finite, overflow, leap or fade: what a step must not move stays bit for bit, and no step waits for the device."""

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path

import processes
import torch
from processes import main, start, words
from torture import engines
from torture.engines import ENGINES, Engine, HostSync, NoHostSync, gradient, put
from torture.tally import Effort, Tally

from vavae_fast.data.streams import LatentBatch
from vavae_fast.distributed import World, open_world
from vavae_fast.training import dit, loop
from vavae_fast.training.checkpoint import checkpoint_fault, checkpoints, load_checkpoint
from vavae_fast.training.parallel import local_rows
from vavae_fast.training.saver import SaveFailed, save_checkpoint, snapshot

ALONE = World(0, 1, torch.device("cpu"))
NOT_FINITE = (math.nan, math.inf, -math.inf)
OVERFLOWS = (1e20, -1e20, 3e38)  # finite, and their squares are not in fp32
PLACES = ("a gradient", "a gradient that overflows the norm", "the input", "a weight")
FORMS = {  # of a state: overrides
    "plain": (),
    "fused": ("train.fused=true",),
    "clipped, two micro-batches": ("{clip}=0.5", "train.micro_batch_size={micro}"),
}


def run(effort: Effort) -> list[Tally]:
    torch.set_num_threads(1)
    folder = effort.folder / "data"
    engines.prepare(folder)
    steps = [(one_rank, name, form) for name in ENGINES for form in FORMS]
    others = [(two_ranks, name) for name in (*ENGINES, SHARDED)] + [(whole_run, *named) for named in RUNS.items()]
    if effort.size < 0.1:  # a quick look: others with each seed
        steps, others = ([effort.draw(name).choice(plan)] for name, plan in (("steps", steps), ("others", others)))
    return [row for part, *what in steps + others for row in part(effort, folder, *what)]


# -- a step of one process ---------------------------------------------------------------------------------------------


def one_rank(effort: Effort, folder: Path, name: str, form: str) -> list[Tally]:
    rows = []
    engine = ENGINES[name](folder, ALONE, *overrides(name, form, 1))
    for number in range(2):
        engine.train(number)  # there are moments
    for place in PLACES:
        row = Tally(f"{name}, {form}: {'' if 'over' in place else 'NaN, infinity in '}{place}")
        rows.append(row)
        draw = effort.draw(row.fault)
        for trial in range(effort.count(20)):
            row.tried += 1
            fault = spoilt_step(engine, place, draw)
            if fault is not None:
                row.fail("wrong", f"--seed {effort.seed}, trial {trial} of {row.fault}: {fault}")
    return rows


def overrides(engine: str, form: str, processes: int) -> list[str]:
    clip = "optimizer.max_grad_norm" if engine == "LightningDiT" else "max_grad_norm"
    sizes = {"clip": clip, "micro": engines.BATCH // 2 // processes}
    null = [f"{clip}=null"] if form == "plain" else []
    return ["train.max_steps=2000", f"train.global_batch_size={engines.BATCH}", *null, *(word.format(**sizes) for word in FORMS[form])]


def spoilt_step(engine: Engine, place: str, draw: random.Random) -> str | None:
    """A step with one number spoilt, then a good one. What is wrong with the state in between, or afterwards; None: nothing."""
    number = draw.randrange(2, 1000)
    value = draw.choice(OVERFLOWS if "overflows" in place else NOT_FINITE)
    name, parameter = draw.choice(engine.trained())
    where = draw.randrange(1 << 30)
    what = f"{value} at {where} of {'the input' if place == 'input' else name}, step {number}"
    micro_batches = engine.micro_batches(number)
    guard, whole, healthy = engine.state.guard, engine.bits(), parameter.detach().clone()
    sound = copied(engine)
    if place == "the input":
        micro_batches = spoilt_input(engine, micro_batches, where, value)
    elif place == "a weight":
        put(parameter, where, value)
    before, skipped = engine.bits(), int(guard.skipped)
    try:
        with gradient(engine, lambda: put(parameter.grad, where, value) if "gradient" in place else None), NoHostSync():
            engine.train(number, micro_batches)
    except HostSync as sync:
        return f"{what}: waits for the device, {sync}"
    finally:
        restore_input(engine)
    moved, taken = differing(engine.bits(), before), int(guard.skipped) == skipped
    if place == "a weight" and taken:
        return hidden_weight(engine, sound, what)
    if moved is not None:
        return f"{what}: {moved} moved"
    if int(guard.skipped) != skipped + 1:
        return f"{what}: counted as {int(guard.skipped) - skipped} skipped steps"
    with torch.no_grad():
        parameter.copy_(healthy)
    return goes_on_as_if_nothing_had_been(engine, whole, number + 1, what)


def goes_on_as_if_nothing_had_been(engine: Engine, whole: dict[str, bytes], number: int, what: str) -> str | None:
    """The next good step, from the state after the fault and from a copy of the one before it."""
    if (other := differing(engine.bits(), whole)) is not None:
        return f"{what}: {other} is not what it was"
    copy = copied(engine)
    engine.train(number)
    after = engine.bits()
    if (stands := differing(after, whole)) is None or not all(t.isfinite().all() for t in engine.tensors().values()):
        return f"{what}: the next step {'moves nothing' if stands is None else 'is not finite'}"
    engine.state.load_groups(copy, "the state before")
    engine.train(number)
    moved = differing(engine.bits(), after)
    return None if moved is None else f"{what}: {moved} goes on otherwise than without it"


def copied(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    return {group: {name: t.clone() for name, t in tensors.items()} for group, tensors in engine.state.groups().items()}


def hidden_weight(engine: Engine, sound: dict, what: str) -> str | None:
    """An infinity may hide: behind the clamp of the latent's log-variance gradients are finite, and zero there. It must not be saved."""
    try:
        save_checkpoint(Path(os.devnull), 1, snapshot(engine.state.groups()), {})
    except SaveFailed as error:
        engine.state.load_groups(sound, "the state before")
        return None if "holds NaN or infinity" in str(error) else f"{what}: {error}"
    return f"{what}: the step was taken, and its state would be saved"


def spoilt_input(engine: Engine, micro_batches: list, where: int, value: float) -> list:
    """A latent's number; an image's bytes are finite, so it is one of its features'."""
    if isinstance(micro_batches[0], LatentBatch):
        put(micro_batches[where % len(micro_batches)].latents, where, value)
        return micro_batches
    real, calls = engine.state.foundation, []

    def features(images):
        found = real(images).clone()
        calls.append(found)
        if len(calls) == 1 + where % engine.accumulation:
            put(found, where, value)
        return found

    features.real = real
    engine.state.foundation = features
    return micro_batches


def restore_input(engine: Engine) -> None:
    if hasattr(getattr(engine.state, "foundation", None), "real"):
        engine.state.foundation = engine.state.foundation.real


def differing(now: dict[str, bytes], before: dict[str, bytes]) -> str | None:
    """The first tensor that is not what it was."""
    return next((name for name in before if now[name] != before[name]), None) if now.keys() == before.keys() else "the list of tensors"


# -- the same on two ranks ---------------------------------------------------------------------------------------------

SHARDED = "LightningDiT, sharded"


def two_ranks(effort: Effort, folder: Path, name: str) -> list[Tally]:
    """Of two processes one plants; both must stand still."""
    row = Tally(f"{name}, two ranks: NaN, infinity, overflow in one rank's gradient")
    said, found = folder / f"{name}.txt", folder / f"{name}.json"
    codes = processes.statuses(start(2, lambda: _two_ranks(effort, folder, name, row.fault, found), said))
    if codes != [0, 0]:
        row.tried = 1
        row.fail("wrong", f"--seed {effort.seed}, {row.fault}: exit codes {codes}: {said.read_text()[-1000:]}")
        return [row]
    row.tried, faults = json.loads(found.read_text())
    for fault in faults:
        row.fail("wrong", f"--seed {effort.seed}, {row.fault}: {fault}")
    return [row]


def _two_ranks(effort: Effort, folder: Path, name: str, fault: str, found: Path) -> int:
    with open_world() as world:
        more = ("train.shard=full",) if name == SHARDED else ()
        engine = ENGINES[name.partition(",")[0]](folder, world, *overrides(name.partition(",")[0], "plain", 2), *more)
        for number in range(2):
            engine.train(number)
        draw, faults = effort.draw(fault), []
        for trial in range(effort.count(40, least=2)):
            wrong = world.gathered(_spoilt_on_one(engine, world, draw))
            faults += [f"trial {trial}, rank {rank}: {what}" for rank, what in enumerate(wrong or ()) if what is not None]
        if world.main:
            found.write_text(json.dumps([trial + 1, faults]))
    return 0


def _spoilt_on_one(engine: Engine, world: World, draw: random.Random) -> str | None:
    number, rank = draw.randrange(2, 1000), draw.randrange(2)
    value, where = draw.choice(NOT_FINITE + OVERFLOWS), draw.randrange(1 << 30)
    name, parameter = draw.choice(engine.trained())
    what = f"{value} at {where} of {name} of rank {rank}, step {number}"
    before, skipped = engine.bits(), int(engine.state.guard.skipped)
    empty = held_by(parameter, world, rank) == 0
    with gradient(engine, lambda: put(parameter.grad, where, value) if world.rank == rank else None):
        engine.train(number)
    moved = differing(engine.bits(), before)
    if empty:
        return None if moved is not None else f"{what}: nothing was planted, and nothing moved"
    if moved is not None or int(engine.state.guard.skipped) != skipped + 1:
        return f"{what}: {moved} moved, {int(engine.state.guard.skipped) - skipped} steps counted as skipped"
    engine.train(number + 1)
    return None if differing(engine.bits(), before) is not None else f"{what}: the next step moves nothing"


def held_by(parameter: torch.nn.Parameter, world: World, rank: int) -> int:
    """How many numbers of a parameter `rank` holds: of a sharded one with few rows perhaps none."""
    return world.from_main(world.gathered(local_rows(parameter.detach()).numel()))[rank]


# -- whole runs --------------------------------------------------------------------------------------------------------


def whole_run(effort: Effort, folder: Path, name: str, trial: Callable[[Path, str, random.Random], int]) -> list[Tally]:
    """What becomes of a run and its checkpoints."""
    row = Tally(name)
    for number in range(effort.count(5)):
        row.tried += 1
        said = folder / f"{trial.__name__}{number}.txt"
        draw = effort.draw(f"{name} {number}")
        (status,) = processes.statuses(start(1, lambda: trial(folder, f"{trial.__name__}{number}", draw), said))  # noqa: B023  it ends within
        if status:
            row.fail("wrong", f"--seed {effort.seed}, {name}, trial {number}: {said.read_text()[-1500:]}")
    return [row]


def _spoilt_at(step: int, spoil) -> None:
    """In this process, call `spoil(state)` before the step `step`, the first time it comes."""
    real, pending = dit.dit_step, [step]

    def spoiling(state, number, micro_batches):
        if pending and number == pending[0]:
            pending.clear()
            spoil(state)
        return real(state, number, micro_batches)

    dit.dit_step = spoiling


def _nan_weight(folder: Path, name: str, draw: random.Random) -> int:
    step, value = draw.randrange(5, 25), draw.choice(NOT_FINITE)

    def spoil(state):
        parameters = [p for p in state.model.parameters() if p.requires_grad]
        put(draw.choice(parameters), draw.randrange(1 << 30), value)

    settings = words(folder, name, "train.max_steps=60", "train.ckpt_every=4", "train.keep_last=2", "train.max_skipped=10")
    undisturbed = dit.dit_step
    _spoilt_at(step, spoil)
    assert main(settings) == 2, "it went on"
    dit.dit_step = undisturbed
    found = checkpoints(folder / name / "checkpoints")
    assert found and all(checkpoint_fault(path) is None for path in found)
    for path in found:
        groups, manifest = load_checkpoint(path)
        assert all(t.isfinite().all() for tensors in groups.values() for t in tensors.values()), f"{path} is not finite"
    assert manifest["step"] == step // 4 * 4, f"the newest checkpoint is of step {manifest['step']}, the fault of {step}"
    assert main(settings) == 0
    assert main(words(folder, f"{name}_undisturbed", "train.max_steps=60", "train.ckpt_every=4", "train.keep_last=2")) == 0
    return _same_end(folder, name, f"{name}_undisturbed", 60)


def _same_end(folder: Path, name: str, other: str, step: int) -> int:
    (one, _), (two, _) = (load_checkpoint(folder / run / "checkpoints" / f"step_{step:08d}") for run in (name, other))
    for group in ("model", "ema", "optimizer"):
        for key, value in one[group].items():
            assert torch.equal(value, two[group][key]), f"{group}/{key} is not that of {other}"
    return 0


def _leap(folder: Path, name: str, draw: random.Random) -> int:
    """From step 25 on or later a batch brings a loss that is five times what it is; its gradient is none to be followed."""
    step, every = draw.randrange(25, 45), draw.choice((4, 7))
    real = dit.flow_terms
    bad = set(range(8 * step, 8 * step + 8))

    def leaping(state, number, batch):
        terms = real(state, number, batch)
        return {key: 5 * value for key, value in terms.items()} if bad & set(batch.index.tolist()) else terms

    settings = ("train.max_steps=60", f"train.ckpt_every={every}", "train.log_every=1")
    dit.flow_terms = leaping
    assert main(words(folder, name, *settings)) == 0
    dit.flow_terms = real
    log = (folder / name / "log.txt").read_text()
    back = step // every * every
    assert "leapt to " in log and f"at step {step + 1}: back to " in log and f"step_{back:08d}, and past" in log, log[-600:]
    assert main(words(folder, f"{name}_before", f"train.max_steps={back}", *settings[1:])) == 0
    _passing_over(step + 1 - back)
    assert main(words(folder, f"{name}_before", *settings)) == 0
    return _same_end(folder, name, f"{name}_before", 60)


def _passing_over(steps: int) -> None:
    """In this process a run that continues leaves out the batches of so many steps."""
    real = loop.resume

    def resume(state, *rest):
        start = real(state, *rest)
        state.guard.passed_over += steps
        return start

    loop.resume = resume


def _slow_death(folder: Path, name: str, draw: random.Random) -> int:
    step, scale, patience = draw.randrange(12, 40), draw.choice((0.0, 1e-6, 1e-12)), draw.choice((15, 30))

    def dying(state):
        for p in state.model.parameters():
            if p.requires_grad:
                p.register_hook(lambda gradient: gradient * scale)

    _spoilt_at(step, dying)
    every = draw.choice((1, 5))
    overrides = ("train.max_steps=200", f"train.max_faint={patience}", f"train.log_every={every}", "optimizer.lr=1.0e-12")
    assert main(words(folder, name, *overrides)) == 2, "it went on"
    said = (folder / f"{name}.txt").read_text()
    ended = int(said.partition("steps up to step ")[2].partition(",")[0])
    assert "no longer learns" in said and step + patience <= ended <= step + patience + 2 * every, f"from step {step}, ended at {ended}"
    return 0


def _converges(folder: Path, name: str, draw: random.Random) -> int:
    """The one thing to learn is to say 0, of a loss that is the square of what is said: it and its gradients fall by many orders of magnitude."""
    real = dit.flow_terms

    def zero(state, number, batch):
        t = torch.full((len(batch.labels),), 0.5)
        said = state.model(batch.latents, t, batch.labels)
        return {"loss": said.square().mean() + 0 * real(state, number, batch)["loss"]}

    dit.flow_terms = zero

    def move(state):
        with torch.no_grad():
            for p in state.model.parameters():
                p.add_(0.3 * torch.randn_like(p)) if p.requires_grad else None

    _spoilt_at(0, move)
    rate = draw.choice((1e-3, 3e-3))
    assert main(words(folder, name, "train.max_steps=400", "train.max_faint=20", f"optimizer.lr={rate}", "optimizer.decay_fraction=1.0")) == 0
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 1e-3 * lines[0]["loss"], f"it did not converge: {lines[0]['loss']} to {lines[-1]['loss']}"
    return 0


RUNS = {
    "a weight turns NaN in a run: it ends, and goes on from a checkpoint of before": _nan_weight,
    "the loss leaps: back to a checkpoint of before, past the batches": _leap,
    "gradients die: the run ends within the promised steps": _slow_death,
    "a run that fits its data to nothing left is not taken for dead": _converges,
}
