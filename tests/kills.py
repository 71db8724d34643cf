"""SIGKILL at random moments: a run that is killed and started again ends in the bits of one that nobody disturbed.

    python tests/kills.py --processes 1 --kills 50 [--seed N] [--folder DIR]

Half of the kills wait for a checkpoint's temporary folder and strike while it is written, renamed, or older ones are removed; the
others strike anywhere, start-up included. Of several processes one or all are killed. The last line is JSON: the kills by moment.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from processes import begin, main, start, statuses, trained, words
from safetensors.torch import load_file

from vavae_fast.training.checkpoint import checkpoint_fault, checkpoints

STEPS = 20
SETTINGS = (f"train.max_steps={STEPS}", "train.ckpt_every=2", "train.keep_last=2", "train.log_every=5")


def campaign(folder: Path, processes: int, kills: int, seed: int) -> dict[str, int]:
    """`kills` kills over as many runs as it takes; exits with a message where a run does not end as it must. Returns counts."""
    begin(folder)
    settings = (*SETTINGS, *(("train.shard=full",) if processes > 1 else ()))
    began = time.monotonic()
    trained(folder, "undisturbed", processes, *settings)
    whole = time.monotonic() - began
    expected = exported(folder, "undisturbed")
    draw = random.Random(seed)
    counts = dict(kills=0, in_step=0, in_save=0, survivors=0, starts=0, runs=0)
    while counts["kills"] < kills:
        name = f"run{counts['runs']}"
        counts["runs"] += 1
        while True:
            counts["starts"] += 1
            if counts["kills"] >= kills:
                trained(folder, name, processes, *settings)
                break
            complete = disturbed(folder, name, processes, settings, draw, whole, counts)
            check_checkpoints(folder / name / "checkpoints")
            if complete:
                break
        if exported(folder, name) != expected:
            sys.exit(f"{name}: not the bits of the undisturbed run, after {counts}, seed {seed}\n{(folder / f'{name}.txt').read_text()}")
    return counts


def disturbed(folder: Path, name: str, processes: int, settings: tuple[str, ...], draw: random.Random, whole: float, counts: dict) -> bool:
    """One start and, unless it ends first, one kill. Whether the run came to its end."""
    said = folder / f"{name}.txt"
    children = start(processes, lambda: main(words(folder, name, *settings)), said)
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


def check_checkpoints(folder: Path) -> None:
    """What has a checkpoint's name is whole, at any moment; and there are no more than retention leaves and one that is new."""
    faults = {path.name: fault for path in checkpoints(folder) if (fault := checkpoint_fault(path)) is not None}
    if faults or len(checkpoints(folder)) > 3:
        sys.exit(f"{folder}: {faults or [path.name for path in checkpoints(folder)]}")


def exported(folder: Path, name: str) -> list[tuple[str, bytes]]:
    """Name and bytes of every exported tensor, of the EMA and the model."""
    content = []
    for which in ("ema", "model"):
        out = folder / f"{name}.{which}.safetensors"
        with contextlib.redirect_stdout(None):
            status = main(["export", "--run", str(folder / name), "--step", str(STEPS), "--weights", which, "--out", str(out)])
        if status != 0:
            sys.exit(f"{name}: no checkpoint of step {STEPS} to export")
        content += [(f"{which} {key}", value.numpy().tobytes()) for key, value in sorted(load_file(out).items())]
    return content


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(campaign(given.folder or Path(temporary) / "kills", given.processes, given.kills, given.seed)))
