"""Files made to harm whoever opens them: nothing of them is run, nothing is written outside the target, memory is bounded, pages show text.

Each payload is met in a forked process that may take 1 GB more and 30 s, by the commands and readers that people would give it to.
"""

import shutil
from collections.abc import Callable

from torture.arena import Arena, meet
from torture.boxed import boxed
from torture.payloads_data import ARCHIVES, DATA, IMAGES
from torture.payloads_pages import PAGES
from torture.payloads_torch import CHECKPOINTS, CLAIMS, pickles
from torture.subjects import pipeline
from torture.tally import Effort, Tally

from vavae_fast.commands import analyze, compare, evaluate, export, extract, train_tokenizer  # noqa: F401  imported before the fork
from vavae_fast.experiments import pages  # noqa: F401  imported before the fork

Payloads = dict[str, Callable[[Arena], None]]
GROUPS: dict[str, Callable[[], Payloads]] = {
    "pickles that run code": pickles,
    "PyTorch files that claim or unfold to terabytes": lambda: CLAIMS,
    "checkpoint folders": lambda: CHECKPOINTS,
    "archives": lambda: ARCHIVES,
    "images": lambda: IMAGES,
    "configs, tensors, arrays, labels": lambda: DATA,
    "pages, cards, terminals": lambda: PAGES,
}


def run(effort: Effort) -> list[Tally]:
    arena = Arena(pipeline(effort.folder.parent / "pipeline"), effort.folder / "box", effort.folder / "outside")
    (arena.outside / "precious").mkdir(parents=True)
    for name in ("canary", "secret", "precious/file"):
        (arena.outside / name).write_text("as it was")
    shutil.copy(next(arena.tiny.images.glob("*/*.png")), arena.outside / "secret.png")
    return [hostile(name, payloads(), arena, effort) for name, payloads in GROUPS.items()]


def hostile(group: str, payloads: Payloads, arena: Arena, effort: Effort) -> Tally:
    """Every payload of a group once; of a smaller size some of them."""
    tally = Tally(f"hostile {group}")
    names = list(payloads)
    if effort.size < 1:
        names = effort.draw(f"hostility/{group}").sample(names, effort.count(len(names)))

    def work(name: str) -> bool:
        shutil.rmtree(arena.box, ignore_errors=True)
        arena.box.mkdir()
        return meet(arena, payloads[name])

    for outcome in boxed(work, names):
        tally.tried += 1
        if outcome.fault:
            tally.fail(outcome.kind, f"{names[outcome.index]}: {outcome.fault}")
    tally.remark = "nothing run, nothing written outside, at most 1 GB" if tally.clean else ""
    return tally
