"""SIGKILL at random moments: a run that is killed and started again ends in the bits of one that nobody disturbed.

    python tests/kills.py [--engine dit|tokenizer] --processes 1 --kills 50 [--seed N] [--folder DIR]

The tokenizer's run has three stages, and the GAN starts within each. What is compared is the last checkpoint, whole: weights, both
optimizers, BatchNorm's statistics, the guard's window; and those at the ends of stages. Half of the kills wait for a checkpoint's
temporary folder and strike while it is written, renamed, or older ones are removed; the others strike anywhere, start-up included. Of
several processes one or all are killed. The last line is JSON: the kills by moment.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny
from processes import begin, main, start, statuses, words

from vavae_fast.commands import train_tokenizer, watch_tokenizer  # noqa: F401  imported before the fork
from vavae_fast.training import one_pass  # noqa: F401  imported before the fork
from vavae_fast.training.checkpoint import checkpoint_fault, checkpoints, step_folder

STEPS = 20
# A line a save: the guard's window holds means of lines, and a run continued within one would have another mean.
SETTINGS = (f"train.max_steps={STEPS}", "train.ckpt_every=2", "train.keep_last=2", "train.log_every=2")
STAGES = ("stages=[{name: a, steps: 8}, {name: b, steps: 6, disc_start: 1, vf_weight: 0.05},"
          " {name: c, steps: 6, disc_start: 3, cos_margin: 0.5, proj_fix: true}]")  # fmt: skip
ENDS = (8, 14)


@dataclass(frozen=True)
class Engine:
    """What is killed."""

    prepare: Callable[[Path], object]
    words: Callable[[Path, str, int], list[str]]  # folder, run, processes -> those that start or continue the run
    kept: tuple[int, ...] = ()  # steps whose checkpoints stay beside the last two


def dit_words(folder: Path, name: str, processes: int) -> list[str]:
    return words(folder, name, *SETTINGS, *(("train.shard=full",) if processes > 1 else ()))


def tokenizer_words(folder: Path, name: str, processes: int) -> list[str]:
    return ["train-tokenizer", *tiny.Tiny(folder).tokenizer(folder, name, *SETTINGS, STAGES, "train.fused=true")]


ENGINES = {"dit": Engine(lambda folder: None, dit_words), "tokenizer": Engine(tiny.prepare, tokenizer_words, ENDS)}


def campaign(engine: Engine, folder: Path, processes: int, kills: int, seed: int) -> dict[str, int]:
    """`kills` kills over as many runs as it takes; exits with a message where a run does not end as it must. Returns counts."""
    begin(folder)
    engine.prepare(folder)
    began = time.monotonic()
    undisturbed(engine, folder, "undisturbed", processes)
    whole = time.monotonic() - began
    expected = saved(engine, folder / "undisturbed")
    draw = random.Random(seed)
    counts = dict(kills=0, in_step=0, in_save=0, survivors=0, starts=0, runs=0)
    while counts["kills"] < kills:
        name = f"run{counts['runs']}"
        counts["runs"] += 1
        while True:
            counts["starts"] += 1
            if counts["kills"] >= kills:
                undisturbed(engine, folder, name, processes)
                break
            complete = disturbed(engine, folder, name, processes, draw, whole, counts)
            check_checkpoints(engine, folder / name / "checkpoints")
            if complete:
                break
        if saved(engine, folder / name) != expected:
            sys.exit(f"{name}: not the bits of the undisturbed run, after {counts}, seed {seed}\n{(folder / f'{name}.txt').read_text()}")
    return counts


def undisturbed(engine: Engine, folder: Path, name: str, processes: int) -> None:
    """Start or continue a run, which must come to its end."""
    said = folder / f"{name}.txt"
    codes = statuses(start(processes, lambda: main(engine.words(folder, name, processes)), said))
    if codes != [0] * processes:
        sys.exit(f"{name}: exit codes {codes}\n{said.read_text()}")


def disturbed(engine: Engine, folder: Path, name: str, processes: int, draw: random.Random, whole: float, counts: dict) -> bool:
    """One start and, unless it ends first, one kill. Whether the run came to its end."""
    said = folder / f"{name}.txt"
    children = start(processes, lambda: main(engine.words(folder, name, processes)), said)
    aimed = draw.random() < 0.5
    deadline = time.monotonic() + draw.uniform(0, 0.7 * whole)  # later ones would often find the run at its end
    while time.monotonic() < deadline and running(children):
        time.sleep(0.001)
    while aimed and running(children) and not in_save(folder / name):
        time.sleep(0.0005)
    if aimed:
        time.sleep(draw.uniform(0, 0.02))
    if not running(children):
        codes = statuses(children)
        if codes != [0] * processes:
            sys.exit(f"{name}: exit codes {codes} without a kill\n{said.read_text()}")
        return True
    struck = children if draw.random() < 0.5 else [draw.choice(children)]
    moment = "in_save" if in_save(folder / name) else "in_step"
    for child in struck:
        os.kill(child, signal.SIGKILL)
    stop_others(children)
    codes = statuses(children)
    if -signal.SIGKILL not in codes:  # it came to its end in this very moment
        return codes == [0] * processes
    if codes.count(-signal.SIGKILL) > len(struck):
        sys.exit(f"{name}: the others did not end within 30 s of a kill\n{said.read_text()}")
    counts["kills"] += 1
    counts[moment] += 1
    counts["survivors"] += processes - len(struck)
    return False


def stop_others(children: list[int]) -> None:
    """As torchrun does when one process has ended: SIGTERM to the others, a moment later, and after 30 s SIGKILL."""
    time.sleep(0.1)
    for number, patience in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 0.0)):
        left = [child for child in children if not ended(child)]
        for child in left:
            os.kill(child, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not all(map(ended, left)):
            time.sleep(0.01)


def ended(child: int) -> bool:
    """Whether a process has ended; leaves it to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def running(children: list[int]) -> bool:
    return not any(map(ended, children))


def in_save(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.tmp")) or any((run / "checkpoints").glob("*.del"))


def check_checkpoints(engine: Engine, folder: Path) -> None:
    """What has a checkpoint's name is whole, at any moment; and there are no more than retention leaves and one that is new."""
    faults = {path.name: fault for path in checkpoints(folder) if (fault := checkpoint_fault(path)) is not None}
    if faults or len(checkpoints(folder)) > 3 + len(engine.kept):
        sys.exit(f"{folder}: {faults or [path.name for path in checkpoints(folder)]}")


def saved(engine: Engine, run: Path) -> dict[str, bytes]:
    """The bytes of every tensor file in the last checkpoint and in those that stay."""
    folders = [step_folder(run / "checkpoints", step) for step in (*engine.kept, STEPS)]
    content = {f"{folder.name}/{name}": value for folder in folders for name, value in tiny.contents(folder, "*.safetensors").items()}
    if not all(any(name.startswith(folder.name) for name in content) for folder in folders):
        sys.exit(f"{run}: lacks one of {[folder.name for folder in folders]}")
    return content


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="dit")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(campaign(ENGINES[given.engine], given.folder or Path(temporary) / "kills", given.processes, given.kills, given.seed)))
