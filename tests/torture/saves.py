"""SIGKILL and power cuts at every I/O event of a save: of our checkpoints, and of what one would use instead.

A killed process leaves what it did before; of what a power cut leaves, `power_cut` makes the least that POSIX promises. In a save of
ours whole groups of tensors, retention, and every litter that an earlier kill can have left, take part.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torture.io_events import Event, Watch, ended
from torture.tally import Effort, Tally

from vavae_fast.distributed import World
from vavae_fast.training.checkpoint import checkpoint_fault, checkpoints, latest_checkpoint, load_checkpoint, step_folder, sweep
from vavae_fast.training.saver import Retention, Saver, save_checkpoint, snapshot

GROUPS = ("model", "ema", "optimizer", "optimizer_disc", "guard", "projection", "discriminator")
KEEP = Retention(last=2)
ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Scheme:
    """A way to save, in one situation."""

    name: str
    before: Callable[[Path], None]  # what lies in the folder when the save begins
    save: Callable[[Path], None]
    verdict: Callable[[Path, bool], tuple[str, str] | None]  # folder, whether the save had ended -> None, or "lost" or "wrong", and how


# -- what is done to each ---------------------------------------------------------------------------------------------


def every_event(schemes: list[Scheme], effort: Effort, tally: Tally, loss: str = "none") -> None:
    """Kill each scheme's save at its events, all at size 1, within a write after some part of it too, and once when it has ended.

    loss: "none", "content" or "names", see `power_cut`.
    """
    draw = effort.draw(tally.fault)
    with in_memory(effort.folder) as folder:
        for scheme in schemes:
            events = _saved(scheme, folder / "saves").events
            points = [(at, torn) for at, event in enumerate(events, 1) for torn in ((0.0, draw.random()) if event.name == "write" else (0.0,))]
            for at, torn in [*sorted(draw.sample(points, min(len(points), effort.count(len(points))))), (len(events) + 1, 0.0)]:
                _one(scheme, folder / "saves", at, torn, loss, tally)


@contextmanager
def in_memory(otherwise: Path) -> Iterator[Path]:
    """A folder where a sync takes no time, for what is done a thousand times; without one a folder in `otherwise`."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else otherwise) as folder:
        yield Path(folder)


def _one(scheme: Scheme, folder: Path, at: int, torn: float, loss: str, tally: Tally) -> None:
    there: set[str] = set()
    watch = _saved(scheme, folder, at, torn, there)
    tally.tried += 1
    if loss != "none":
        power_cut(watch.events, there, names=loss == "names")
    found = scheme.verdict(folder, not watch.killed)
    if found is not None:
        last = watch.events[-1] if watch.events else None
        tally.fail(found[0], f"{scheme.name}, killed at event {at}{f', {torn:.3f} of it done' if torn else ''}, after {last}: {found[1]}")


def _saved(scheme: Scheme, folder: Path, at: int | None = None, torn: float = 0.0, there: set[str] | None = None) -> Watch:
    """A save in a child; `there`: filled with the names before it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    scheme.before(folder)
    if there is not None:
        there.update(map(str, folder.rglob("*")))
    watch = Watch(folder, at, torn)
    child = os.fork()
    if child == 0:
        watch.join()
        scheme.save(folder)
        os._exit(0)
    watch.attend(lambda: ended(child))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (-9 if watch.killed else 0), f"{scheme.name}: a save left with {code}"
    return watch


def power_cut(events: list[Event], there: set[str], names: bool) -> None:
    """Undo what was not synced: content always; with `names` new names and renames too, of which a file system may lose either or none.

    there: the names before. A file's content counts as lost whole. What was removed stays removed. A name that a rename wrote over
    does not come back, so with `names` no event may do that to what was there before.
    """
    unsynced: set[str] = set()  # files whose content is not
    pending: list[tuple[str, str]] = []  # names that are not: (as it was, "" for what is new, as it is)
    known = set(there)
    for event in events:
        if event.name == "write" or event.truncates:
            unsynced.add(event.path)
        if event.name in ("open", "mkdir") and event.path not in known:
            known.add(event.path)
            pending.append(("", event.path))
        elif event.name == "sync":
            unsynced.discard(event.path)
            pending = [(old, new) for old, new in pending if os.path.dirname(new) != event.path]
        elif event.name == "rename":
            unsynced, known = ({_moved(path, event) for path in paths} for paths in (unsynced, known))
            pending = [(old, _moved(new, event)) for old, new in pending] + [(event.path, event.to)]
    for path in unsynced:
        if os.path.isfile(path):
            os.truncate(path, 0)
    for old, new in reversed(pending) if names else ():
        if os.path.exists(new):
            if old:
                os.rename(new, old)
            else:
                shutil.rmtree(new) if os.path.isdir(new) else os.unlink(new)


def _moved(path: str, rename: Event) -> str:
    return rename.to + path[len(rename.path) :] if path == rename.path or path.startswith(rename.path + "/") else path


# -- our checkpoints --------------------------------------------------------------------------------------------------


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """What the checkpoint of `step` holds."""
    generator = torch.Generator().manual_seed(step)
    return {group: {f"block.{i}.weight": torch.randn(8, 8, generator=generator) for i in range(3)} for group in GROUPS}


def _write(folder: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(folder, step, snapshot(tensors(step)), {})


def _save(folder: Path, step: int) -> None:
    """As a run does: in the background, then retention."""
    with Saver(folder, ALONE, {}, KEEP, lambda line: None) as saver:
        saver.save(step, tensors(step))
        saver.finish()


def _litter(folder: Path) -> None:
    """What kills at the worst moments leave: a half-written save, a half-removed checkpoint."""
    _write(folder, 2, 4, 6)
    step_folder(folder, 6).rename(folder / "step_00000006.tmp")
    (folder / "step_00000006.tmp" / "manifest.json").unlink()
    _write(folder, 1)
    step_folder(folder, 1).rename(folder / "step_00000001.del")
    (folder / "step_00000001.del" / "model.safetensors").unlink()


def _damaged(folder: Path) -> None:
    _write(folder, 2, 4, 6)
    (step_folder(folder, 6) / "model.safetensors").write_bytes(b"damaged")


def _resume(folder: Path) -> None:
    sweep(folder)
    assert latest_checkpoint(folder, lambda line: None) == step_folder(folder, 4)
    _save(folder, 6)


def _go_back(folder: Path) -> None:
    with Saver(folder, ALONE, {}, KEEP, lambda line: None) as saver:
        assert saver.rewind(5) == step_folder(folder, 4)
        saver.save(6, tensors(6))
        saver.finish()


def ours(power: bool) -> list[Scheme]:
    """`power`: a cut may leave a removed checkpoint's name with a part of its files, so a name alone says nothing there."""

    def verdict(newest: int):
        return lambda run, ended: _verdict(run / "checkpoints", 6 if ended else newest, named_is_whole=not power)

    def inside(action: Callable[..., None], *words: int) -> Callable[[Path], None]:
        return lambda run: action(run / "checkpoints", *words)

    return [
        Scheme("the first save", lambda run: None, inside(_save, 6), verdict(0)),
        Scheme("a save after which an older checkpoint goes", inside(_write, 2, 4), inside(_save, 6), verdict(4)),
        Scheme("a start among litter, and a save", inside(_litter), inside(_resume), verdict(4)),
        Scheme("a save over a damaged checkpoint", inside(_damaged), inside(_resume), verdict(4)),
        Scheme("back to an older checkpoint, and a save", inside(_write, 2, 4, 6), inside(_go_back), verdict(4)),
    ]


def _verdict(folder: Path, newest: int, named_is_whole: bool) -> tuple[str, str] | None:
    """What a run that is started again finds: at least the checkpoint of step `newest`, litter that it can sweep, room for the next save."""
    folder.mkdir(exist_ok=True)
    litter = [path.name for path in folder.iterdir() if path.suffix in (".tmp", ".del")]
    if len(litter) > 2:
        return "wrong", f"{len(litter)} folders of litter: {litter}"
    sweep(folder)
    if strange := [path.name for path in folder.iterdir() if path not in checkpoints(folder) and path.suffix != ".damaged"]:
        return "wrong", f"the sweep leaves {strange}"
    faults = {path.name: fault for path in checkpoints(folder) if (fault := checkpoint_fault(path)) is not None}
    if named_is_whole and {name for name in faults if not (folder / name / "model.safetensors").read_bytes() == b"damaged"}:
        return "wrong", f"named and not whole: {faults}"
    path = latest_checkpoint(folder, lambda line: None)
    step = 0 if path is None else int(path.name[5:])
    if step < newest:
        return "lost", f"the newest whole checkpoint is {path}, that of step {newest} was saved; {faults}"
    if path is not None and not _holds(path, step):
        return "wrong", f"{path} verifies and does not hold what was saved"
    _save(folder, step + 2)
    if not _holds(step_folder(folder, step + 2), step + 2):
        return "lost", f"the next save, of step {step + 2}, did not hold what it was given"
    whole = [path.name for path in checkpoints(folder) if checkpoint_fault(path) is None]
    if len(whole) > KEEP.last or any(folder.glob("*.tmp")) or any(folder.glob("*.del")):
        return "wrong", f"the next save leaves {sorted(path.name for path in folder.iterdir())}"
    return None


def _holds(path: Path, step: int) -> bool:
    groups, expected = load_checkpoint(path)[0], tensors(step)
    return groups.keys() == expected.keys() and all(equal(groups[group], expected[group]) for group in expected)


def equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
