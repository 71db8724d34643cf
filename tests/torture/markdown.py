"""The table of a torture run as a page: what was tried, on what, what became of it; other schemes in a table of their own."""

import importlib.metadata
import os
import platform
import subprocess
import time

from torture.tally import Ran, Tally

HEAD = "| fault | tried | lost | wrong | hung | |\n|---|---:|---:|---:|---:|---|"


def page(results: dict[str, Ran], size: float, seed: int) -> str:
    """results: what came of each campaign."""
    rows = [(name, tally) for name, ran in results.items() for tally in ran.rows]
    ours, others = ([row for row in rows if row[1].reference is reference] for reference in (False, True))
    took = ", ".join(f"{name} {ran.seconds:,.0f} s at commit `{ran.commit}`" for name, ran in results.items())
    tried, clean = sum(tally.tried for _, tally in ours), all(tally.clean for _, tally in ours)
    parts = [
        "# What was tried to break it\n",
        f"Made by `make torture SIZE={size:g} SEED={seed}`{'' if clean else ', **with failures**'}: {tried:,} faults. {_made_on()}\n",
        f"It took: {took}.\n",
        "Lost: what was there before the fault cannot be had again. Wrong: anything else than promised. Hung: no answer in time.\n",
        _table(ours),
    ]
    if others:
        parts += ["\n## The same on other ways to save\n", "Here wrong means that other numbers are loaded and nothing is said.\n", _table(others)]
    return "\n".join(parts) + "\n"


def _table(rows: list[tuple[str, Tally]]) -> str:
    lines, before = [HEAD], None
    for name, tally in rows:
        lines += [f"| **{name}** | | | | | |"] if name != before else []
        before = name
        cells = (tally.fault, f"{tally.tried:,}", f"{tally.lost:,}", f"{tally.wrong:,}", f"{tally.hung:,}", tally.remark)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _made_on() -> str:
    """Date, machine, versions."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "safetensors", "numpy", "pillow")}
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    machine = f"{platform.system()} on {platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    return f"{time.strftime('%Y-%m-%d')}, {machine}, Python {platform.python_version()}, {used}."


def commit() -> str:
    """Of the working tree, and whether it differs from it."""
    asked = (["git", "rev-parse", "--short=12", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changes = (subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() for words in asked)
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git repository)"
    return f"{commit}{' with changes' if changes else ''}"
