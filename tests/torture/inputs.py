"""At least 10,000 malformed inputs: each answered by one line, or accepted as what an independent reader reads from it.

Bytes are mutated (flips, cuts, splices, repeats, wrong magics, numbers at the ends of their ranges), anywhere in a file or inside it with
its checksums made right; configs, labels and command lines are drawn by hypothesis. A warm, forked process works through many; it may take
1 GB more than it had and 30 s for each. What fails is kept: `<folder>/failing/` holds the bytes, the line says how they were made.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from hypothesis import strategies as st
from tiny import Tiny, files
from torture.boxed import Outcome, Wrong, boxed, command
from torture.families import Family, config, families, labels, parquet_family
from torture.mutations import generated, mutated
from torture.subjects import pipeline
from torture.tally import Effort, Tally
from torture.words import command_lines, configs, label_files

from vavae_fast.commands import bench_report, compare, demo, evaluate, extract, gallery, reproduce, sweep, train_tokenizer  # noqa: F401  before the fork

_READ = "accepted as an independent reader reads them"
_COMMANDS, _CONFIGS, _LABELS = 1200, 800, 500  # drawn by hypothesis, at size 1


def run(effort: Effort) -> list[Tally]:
    tiny = pipeline(effort.folder.parent / "pipeline")
    box = effort.folder / "box"
    box.mkdir()
    rows = [malformed(family, effort) for family in families(tiny, box)]
    parquet = parquet_family()
    rows.append(malformed(parquet, effort) if parquet else Tally("malformed parquet", remark="skipped: pyarrow is not installed"))
    rows.append(of_structure("YAML configs, by structure", configs(), _CONFIGS, ".yaml", config, effort))
    rows.append(of_structure("label files, by structure", label_files(), _LABELS, ".json", labels, effort))
    rows.append(lines(tiny, effort))
    return rows


def malformed(family: Family, effort: Effort) -> Tally:
    """Mutations of a family's files."""
    draw = effort.draw(f"inputs/{family.name}")
    inputs = []
    for _ in range(effort.count(family.share)):
        seed = draw.choice(family.seeds)
        inner = family.inside is not None and draw.random() < 0.5 and (family.name != "pt, weights" or seed.startswith(b"PK"))
        inputs.append(family.inside(draw, seed, family.seeds) if inner else mutated(draw, seed, family.seeds))
    return _tally(family.name, inputs, family.suffix, family.check, effort)


def of_structure(name: str, strategy: st.SearchStrategy, count: int, suffix: str, check: Callable[[Path], bool], effort: Effort) -> Tally:
    """What hypothesis draws."""
    examples = generated(strategy, effort.count(count), effort.draw(f"inputs/{name}").randrange(1 << 30))
    return _tally(name, [("hypothesis", example) for example in examples], suffix, check, effort)


def _tally(name: str, inputs: list[tuple[str, bytes]], suffix: str, check: Callable[[Path], bool], effort: Effort) -> Tally:
    place = effort.folder / "box" / f"input{suffix}"

    def work(one: tuple[str, bytes]) -> bool:
        place.write_bytes(one[1])
        return check(place)

    def keep(outcome: Outcome) -> str:
        kept = effort.folder / "failing" / f"{name.replace(' ', '_').replace(',', '')}-{outcome.index}{suffix}"
        kept.parent.mkdir(exist_ok=True)
        kept.write_bytes(inputs[outcome.index][1])
        return f"{inputs[outcome.index][0]}, kept as {kept.name}"

    return _count(name, boxed(work, inputs), keep, effort)


def lines(tiny: Tiny, effort: Effort) -> Tally:
    """Command lines, all dry runs: none may write a file."""
    name = "command lines"
    inputs = generated(command_lines(tiny), effort.count(_COMMANDS), effort.draw(f"inputs/{name}").randrange(1 << 30))
    inside = effort.folder / "lines"
    inside.mkdir()
    before = (files(tiny.root), [])

    def work(words: list[str]) -> bool:
        os.chdir(inside)
        try:
            return command(words)
        finally:
            if (files(tiny.root), files(inside)) != before:
                shutil.rmtree(inside)
                inside.mkdir()
                raise Wrong("a dry run wrote files")

    return _count(name, boxed(work, inputs), lambda outcome: repr(inputs[outcome.index])[:1500], effort, "done as dry runs that wrote nothing")


def _count(name: str, outcomes: Iterable[Outcome], describe: Callable[[Outcome], str], effort: Effort, accepted_as: str = _READ) -> Tally:
    tally = Tally(f"malformed {name}")
    refused = 0
    for outcome in outcomes:
        tally.tried += 1
        refused += outcome.refused and not outcome.fault
        if outcome.fault:
            tally.fail(outcome.kind, f"seed {effort.seed}, size {effort.size:g}, number {outcome.index}, {describe(outcome)}: {outcome.fault}")
    accepted = tally.tried - refused - tally.wrong - tally.hung
    tally.remark = f"{refused} refused in one line, {accepted} {accepted_as}"
    return tally
