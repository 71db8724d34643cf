"""One bit turned in each kind of file that we read: found by a hash and named, or harmless: the reader gives exactly what was written.

A checkpoint's flip must also leave the one before it to continue from. What no reader can know is left out: a bit of a config that the
user wrote, where no run has kept it yet; a bit of a file of others that brings no checksum, as a safetensors file of weights.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tiny import Tiny, copy
from torture.boxed import Wrong, boxed, command
from torture.mutations import single_flip
from torture.subjects import STEP, drawing, manifest, newest_checkpoint, pipeline, samples, statistics, weights, whole_latents
from torture.tally import Effort, Tally

from vavae_fast.commands.runs import check_run_folder, run_config
from vavae_fast.config import load_config
from vavae_fast.errors import BadInput
from vavae_fast.training.checkpoint import step_folder

FLIPS = 300


@dataclass(frozen=True)
class Kind:
    """One kind of file: a folder of its own, the files in it that are flipped, and what reads them: gives a result, or BadInput."""

    name: str
    files: list[Path]
    read: Callable[[], object]
    folder: str = ""  # the folder that the line may name in place of the file: of a manifest that is gone, nothing else is left to name


def run(effort: Effort) -> list[Tally]:
    tiny = pipeline(effort.folder.parent / "pipeline")
    return [flipped(kind, effort) for kind in kinds(tiny, effort.folder)]


def kinds(tiny: Tiny, folder: Path) -> list[Kind]:
    """All of them, on copies of their own."""
    dit = copy(tiny.dit_run, folder / "dit")
    newest = step_folder(dit / "checkpoints", STEP)
    latents, told = copy(tiny.latents, folder / "latents"), copy(tiny.latents, folder / "told")
    drawn = folder / "samples.npz"
    shutil.copy(tiny.root / "samples" / "samples.npz", drawn)
    for name in ("dit.pt", "vae.pt"):
        shutil.copy(tiny.root / name, folder / name)
    resumed = copy(tiny.dit_run, folder / "resumed" / "dit")
    raw = copy(tiny.root / "draw", folder / "draw")
    return [
        Kind("checkpoint shard", sorted(newest.glob("*.safetensors")), lambda: newest_checkpoint(dit)),
        Kind("checkpoint manifest", [newest / "manifest.json"], lambda: newest_checkpoint(dit), newest.name),
        Kind("latent shard", sorted(latents.glob("*.safetensors")), lambda: whole_latents(latents)),
        Kind("latents' manifest", [told / "manifest.json"], lambda: whole_latents(told)),
        Kind("latents' statistics", [latents / "latents_stats.pt"], lambda: statistics(latents / "latents_stats.pt")),
        Kind("samples", [drawn], lambda: samples(drawn)),
        Kind("samples' manifest", [tiny.root / "samples" / "manifest.json"], lambda: manifest(tiny.root / "samples" / "manifest.json")),
        Kind("raw draws", sorted((raw / "parts").iterdir()), lambda: continued(tiny, raw), "continued"),
        Kind("a run's config", [resumed / "config.yaml"], lambda: (run_config(resumed), resumable(tiny, resumed))),
        Kind("a run's manifest", [resumed / "manifest.json"], lambda: manifest(resumed / "manifest.json")),
        Kind("weights, .pt", [folder / "dit.pt", folder / "vae.pt"], lambda: [weights(folder / name) for name in ("dit.pt", "vae.pt")]),
    ]


def continued(tiny: Tiny, raw: Path) -> object:
    """The images that the interrupted draw in `raw` comes to; in a copy, because it removes its parts."""
    out = raw.with_name("continued")
    shutil.rmtree(out, ignore_errors=True)
    copy(raw, out)
    command(drawing(tiny, out))
    return samples(out / "samples.npz"), (out / "samples.npz").read_bytes()


def resumable(tiny: Tiny, run: Path) -> None:
    """As `train` asks before it continues the run: is the config that it is given the one that the run keeps?"""
    _, path, *overrides = tiny.dit(run.parent, run.name)
    check_run_folder(run, load_config(path, tuple(overrides)), "auto", ())


def flipped(kind: Kind, effort: Effort) -> Tally:
    """`FLIPS` bits, each alone, and the file as it was after each."""
    tally = Tally(f"one bit flipped: {kind.name}")
    draw = effort.draw(f"bits/{kind.name}")
    flips = [(path := draw.choice(kind.files), draw.randrange(8 * path.stat().st_size)) for _ in range(effort.count(FLIPS))]
    expected: list[object] = []  # read by the child, once

    def work(flip: tuple[Path, int]) -> bool:
        if not expected:
            expected.append(kind.read())
        path, bit = flip
        data = path.read_bytes()
        path.write_bytes(single_flip(data, bit))
        try:
            if kind.read() != expected[0]:
                raise Wrong("read as something else, and nothing said")
        except BadInput as error:
            if path.name not in str(error) and not (kind.folder and kind.folder in str(error)):
                raise Wrong(f"the line does not name it: {error}") from None
            return True
        finally:
            path.write_bytes(data)
        return False

    harmless = 0
    for outcome in boxed(work, flips):
        path, bit = flips[outcome.index]
        tally.tried += 1
        harmless += not outcome.refused and not outcome.fault
        if outcome.fault:
            tally.fail(outcome.kind, f"seed {effort.seed}, {path.name} bit {bit} (byte {bit // 8}): {outcome.fault}")
    caught = tally.tried - harmless - tally.wrong - tally.hung
    tally.remark = f"{caught} found and named, {harmless} harmless: read back exactly as written"
    return tally

