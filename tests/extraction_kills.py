"""SIGKILL and SIGTERM at random moments of an extraction: started again, it ends in the bytes of one that nobody disturbed.

    python tests/extraction_kills.py --processes 1 --kills 20 [--seed N] [--folder DIR]

Half of the signals strike while a shard is being written; the others anywhere, start-up included. Of several processes one or all are
struck; by SIGTERM, all leave with 0 and without a trace of what was not whole. After every signal each shard that has its name is
whole. The last line is JSON: the kills by moment, and how many processes SIGTERM has stopped in their work.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from kills import ended, running, stop_others
from processes import main, start, statuses
from tiny import prepare

from vavae_fast.commands import build, extract  # noqa: F401  imported before the fork
from vavae_fast.config import load_config
from vavae_fast.data import shards
from vavae_fast.training import loop

IMAGES, SHARD_SIZE = 16, 3  # the last shard is short
BLOCK_SECONDS = 0.03  # what the slowed disk takes for a block
LISTENING = "listening"


def campaign(folder: Path, processes: int, kills: int, seed: int) -> dict[str, int]:
    """`kills` kills over as many extractions as it takes; exits with a message where one does not end as it must. Returns counts."""
    torch.set_num_threads(1)
    begin(folder)
    began = time.monotonic()
    extracted(folder, "undisturbed", processes)
    whole = time.monotonic() - began
    expected = contents(folder / "undisturbed")
    draw = random.Random(seed)
    counts = dict(kills=0, elsewhere=0, in_write=0, stopped=0, starts=0, extractions=0)
    while counts["kills"] < kills:
        name = f"latents{counts['extractions']}"
        counts["extractions"] += 1
        complete = False
        while not complete:
            counts["starts"] += 1
            if counts["kills"] < kills:
                complete = disturbed(folder, name, processes, draw, whole, counts)
            else:
                extracted(folder, name, processes)
                complete = True
            wrong = [path for path, data in contents(folder / name).items() if expected.get(path) != data]
            if wrong:
                sys.exit(f"{name}: {wrong} are not the undisturbed bytes, after {counts}, seed {seed}")
        if contents(folder / name) != expected or any((folder / name).glob("*.tmp")):
            sys.exit(f"{name}: not what the undisturbed extraction left, after {counts}, seed {seed}")
    return counts


def begin(folder: Path) -> None:
    """Images, config and a tokenizer of random weights."""
    tiny = prepare(folder)
    tokenizer = build.autoencoder(load_config(tiny.root / "tokenizer.yaml"))
    torch.save({"state_dict": tokenizer.state_dict()}, folder / "vae.pt")


def extracting(folder: Path, name: str) -> int:
    """In a forked process: the command, on a disk slow enough to be struck; it says when it begins to listen to signals."""
    append, enter = shards.ShardWriter.append, loop.StopSignal.__enter__

    def slow_append(shard, block):
        time.sleep(BLOCK_SECONDS)
        append(shard, block)

    def heard_enter(stop):
        enter(stop)
        print(LISTENING, flush=True)
        return stop

    shards.ShardWriter.append, loop.StopSignal.__enter__ = slow_append, heard_enter
    return main(["extract", "--config", str(folder / "tokenizer.yaml"), "--checkpoint", str(folder / "vae.pt"), "--images",
                 str(folder / "images"), "--out", str(folder / name), "--shard-size", str(SHARD_SIZE), "--batch", "2"])  # fmt: skip


def extracted(folder: Path, name: str, processes: int) -> None:
    """An extraction that must end well."""
    said = folder / f"{name}.txt"
    codes = statuses(start(processes, lambda: extracting(folder, name), said))
    if codes != [0] * processes:
        sys.exit(f"{name}: exit codes {codes}\n{said.read_text()}")


def disturbed(folder: Path, name: str, processes: int, draw: random.Random, whole: float, counts: dict[str, int]) -> bool:
    """One start and, unless it ends first, one signal. Whether the extraction came to its end."""
    said = folder / f"{name}.txt"
    listened = said.read_text().count(LISTENING) if said.exists() else 0
    children = start(processes, lambda: extracting(folder, name), said)
    aimed, deadline = draw.random() < 0.5, time.monotonic() + draw.uniform(0, whole)
    while time.monotonic() < deadline and running(children):
        time.sleep(0.001)
    while aimed and running(children) and not in_write(folder / name):
        time.sleep(0.0005)
    number, moment = draw.choice((signal.SIGKILL, signal.SIGTERM)), "in_write" if in_write(folder / name) else "elsewhere"
    listening = said.exists() and said.read_text().count(LISTENING) == listened + processes
    if running(children):
        for child in children if draw.random() < 0.5 else [draw.choice(children)]:
            os.kill(child, number)
        if number == signal.SIGKILL:
            stop_others(children)
        else:
            leave(children)
    codes = statuses(children)
    if -signal.SIGKILL in codes and number == signal.SIGKILL:
        counts["kills"] += 1
        counts[moment] += 1
        return False
    if -signal.SIGTERM in codes and number == signal.SIGTERM and not listening:
        return False
    complete = (folder / name / "manifest.json").exists()
    if complete and number == signal.SIGTERM:  # a process with nothing left to do no longer listens
        codes = [0 if code == -signal.SIGTERM else code for code in codes]
    if codes != [0] * processes or in_write(folder / name):
        sys.exit(f"{name}: exit codes {codes} after {number}\n{said.read_text()}")
    counts["stopped"] += 0 if complete else processes
    return complete


def leave(children: list[int]) -> None:
    """Give them time to; those that wait for one that had not begun to listen are stopped."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not all(map(ended, children)):
        time.sleep(0.01)
        if any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT).si_status for child in filter(ended, children)):
            stop_others(children)


def in_write(out: Path) -> bool:
    return any(out.glob("*.tmp"))


def contents(out: Path) -> dict[str, bytes]:
    """Everything but the manifest, which says when it was made; of that, the shards' hashes."""
    found = {path.name: path.read_bytes() for path in sorted(out.glob("latents*")) if path.suffix != ".tmp"}
    if (out / "manifest.json").exists():
        found["manifest.json"] = json.dumps(json.loads((out / "manifest.json").read_text())["shards"]).encode()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(campaign(given.folder or Path(temporary) / "kills", given.processes, given.kills, given.seed)))
