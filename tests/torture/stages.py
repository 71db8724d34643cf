"""The stages in miniature, one after the other, each from what the one before left: what is killed, and what must come out."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from processes import main, start, statuses
from tiny import Tiny, contents, prepare

from vavae_fast.commands import build, evaluate, extract, reconstruction, report, sample, train, train_tokenizer, watch, watch_tokenizer  # noqa: F401
from vavae_fast.config import load_config
from vavae_fast.data import shards
from vavae_fast.training import dit, loop, one_pass  # noqa: F401  imported before the fork, like the commands
from vavae_fast.training.checkpoint import checkpoint_fault, checkpoints, step_folder

Files = dict[str, bytes]
STEPS = 20
SETTINGS = (f"train.max_steps={STEPS}", "train.ckpt_every=2", "train.keep_last=2")
TOKENIZER_STAGES = ("stages=[{name: a, steps: 8}, {name: b, steps: 6, disc_start: 1, vf_weight: 0.05},"
                    " {name: c, steps: 6, disc_start: 3, cos_margin: 0.5, proj_fix: true}]")  # fmt: skip
TOKENIZER_ENDS = (8, 14)
LISTENING = "listening"
BLOCK_SECONDS = 0.03  # what a slowed disk takes for a block of latents


@dataclass(frozen=True)
class Stage:
    """One command, and what it makes under a name of its own."""

    name: str
    words: Callable[[Path, str], list[str]]  # folder, name -> the command line that starts it, or goes on with it, and writes to folder / name
    made: Callable[[Path], Files]  # what is there of the artifact; all of it when it has come to its end
    fault: Callable[[Path, Files], str | None]  # whether something half-made has a final name, at any moment; files: those to be made
    slow: Callable[[], None] = lambda: None  # called in the process, so that there is time to strike
    processes: tuple[int, ...] = (1, 2)  # how many it is tried with
    before: Callable[[Path, Path], None] = lambda folder, place: None  # folder, folder / name: puts there what it starts from


def prepared(folder: Path) -> Path:
    """Images, stand-ins, a tokenizer of random weights, latents and a trained LightningDiT in `folder`."""
    tiny = prepare(folder)
    torch.save({"state_dict": build.autoencoder(load_config(tiny.root / "tokenizer.yaml")).state_dict()}, folder / "vae.pt")
    for stage, name in ((EXTRACT, "latents"), (TRAIN, "dit")):
        run_to_the_end(stage, folder, name, 1)
    return folder


def run_to_the_end(stage: Stage, folder: Path, name: str, processes: int) -> None:
    """Start it, or go on with it; it must come to its end."""
    codes = statuses(start(processes, lambda: main(stage.words(folder, name)), said(folder, name)))
    if codes != [0] * processes:
        raise RuntimeError(f"{name}: exit codes {codes}\n{said(folder, name).read_text()}")


def said(folder: Path, name: str) -> Path:
    return folder / f"{name}.txt"


def slowed(stage: Stage, folder: Path, name: str) -> int:
    """In a child: the command, with time to strike; it says when it begins to listen to signals."""
    enter = loop.StopSignal.__enter__

    def heard(stop):
        enter(stop)
        print(LISTENING, flush=True)
        return stop

    loop.StopSignal.__enter__ = heard
    stage.slow()
    return main(stage.words(folder, name))


# -- training ---------------------------------------------------------------------------------------------------------


def _saved(kept: tuple[int, ...]) -> Callable[[Path], Files]:
    """Every tensor file in the last checkpoint and in those that stay."""

    def made(run: Path) -> Files:
        folders = [step_folder(run / "checkpoints", step) for step in (*kept, STEPS)]
        return {f"{folder.name}/{name}": data for folder in folders for name, data in contents(folder, "*.safetensors").items()}

    return made


def _checkpoint_fault(run: Path, files: Files) -> str | None:
    """What has a checkpoint's name is whole; there are no more than retention leaves, and one that is new."""
    found = checkpoints(run / "checkpoints")
    faults = {path.name: fault for path in found if (fault := checkpoint_fault(path)) is not None}
    return f"{faults or [path.name for path in found]}" if faults or len(found) > 3 + len(TOKENIZER_ENDS) else None


def _train(*more: str) -> Callable[[Path, str], list[str]]:
    return lambda folder, name: ["train", *Tiny(folder).dit(folder, name, *SETTINGS, f"vae.ckpt_path={folder / 'vae.pt'}", *more)]


def _train_tokenizer(folder: Path, name: str) -> list[str]:
    return ["train-tokenizer", *Tiny(folder).tokenizer(folder, name, *SETTINGS, TOKENIZER_STAGES, "train.fused=true")]


TOKENIZER = Stage("tokenizer", _train_tokenizer, _saved(TOKENIZER_ENDS), _checkpoint_fault)
TRAIN = Stage("train", _train(), _saved(()), _checkpoint_fault, processes=(1,))  # and two, more often
TRAIN_SHARDED = Stage("train-sharded", _train("train.shard=full"), _saved(()), _checkpoint_fault)


# -- the others -------------------------------------------------------------------------------------------------------


def _only(made: Callable[[Path], Files]) -> Callable[[Path, Files], str | None]:
    """No file that `made` finds may differ from what it is to be."""

    def fault(place: Path, files: Files) -> str | None:
        wrong = [name for name, data in made(place).items() if files.get(name) != data]
        return f"{wrong} are not the undisturbed bytes" if wrong else None

    return fault


def _extracted(out: Path) -> Files:
    """Everything but the manifest, which says when it was made; of that, the shards' hashes."""
    found = {path.name: path.read_bytes() for path in sorted(out.glob("latents*")) if path.suffix != ".tmp"}
    if (out / "manifest.json").exists():
        found["manifest.json"] = json.dumps(json.loads((out / "manifest.json").read_text())["shards"]).encode()
    return found


def _extract(folder: Path, name: str) -> list[str]:
    return ["extract", "--config", str(folder / "tokenizer.yaml"), "--checkpoint", str(folder / "vae.pt"), "--images", str(folder / "images"),
            "--out", str(folder / name), "--shard-size", "3", "--batch", "2"]  # fmt: skip


def _slow_shards() -> None:
    append = shards.ShardWriter.append

    def slow(shard, block):
        time.sleep(BLOCK_SECONDS)
        append(shard, block)

    shards.ShardWriter.append = slow


def _drawn(out: Path) -> Files:
    found = {name: data for pattern in ("samples.npz", "*.png") for name, data in contents(out, pattern).items()}
    if (out / "manifest.json").exists():
        manifest = json.loads((out / "manifest.json").read_text())
        found["manifest.json"] = json.dumps([manifest["facts"], manifest["sha256"]], sort_keys=True).encode()
    return found


def _sample(folder: Path, name: str) -> list[str]:
    return ["sample", *Tiny(folder).dit(folder, "dit", f"vae.ckpt_path={folder / 'vae.pt'}", "sample.fid_num=18"), "--checkpoint",
            str(folder / "dit"), "--out", str(folder / name), "--png"]  # fmt: skip


def _slow_parts() -> None:
    write = sample._write_part

    def slow(*words):
        time.sleep(BLOCK_SECONDS)
        return write(*words)

    sample._write_part = slow


def _evaluate(folder: Path, name: str) -> list[str]:
    out = folder / name
    return ["evaluate", "--reconstruction", "--config", str(folder / "tokenizer.yaml"), "--checkpoint", str(folder / "vae.pt"), "--images",
            str(folder / "images"), "--metrics", "psnr,ssim", "--batch", "1", "--json", str(out / "scores.json"),
            "--picture", str(out / "picture.png")]  # fmt: skip


def _scored(out: Path) -> Files:
    found = contents(out, "picture.png")
    if (out / "scores.json").exists():
        scores = json.loads((out / "scores.json").read_text())
        found["scores.json"] = json.dumps([scores["psnr"], scores["ssim"]]).encode()
    return found


def _held_often() -> None:
    reconstruction.SAVED_EVERY = 0.0


def _report(folder: Path, name: str) -> list[str]:
    return ["report", str(folder / name)]


def _run_to_report(folder: Path, place: Path) -> None:
    place.mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "manifest.json", "config.yaml"):
        shutil.copy(folder / "dit" / name, place / name)


def _reported(place: Path) -> Files:
    """The page, which shows the folder's name."""
    return {name: data.replace(place.name.encode(), b"NAME") for name, data in contents(place, "report.html").items()}


EXTRACT = Stage("extract", _extract, _extracted, _only(_extracted), _slow_shards)
SAMPLE = Stage("sample", _sample, _drawn, _only(_drawn), _slow_parts)
EVALUATE = Stage("evaluate", _evaluate, _scored, _only(_scored), _held_often)
REPORT = Stage("report", _report, _reported, _only(_reported), before=_run_to_report, processes=(1,))
STAGES = (TOKENIZER, EXTRACT, TRAIN, SAMPLE, EVALUATE, REPORT)
