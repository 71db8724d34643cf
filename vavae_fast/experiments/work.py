"""Work whose result is kept by the hash of all that it is a function of, so that experiments share what is the same for them."""

import hashlib
import json
import subprocess
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from vavae_fast import artifacts
from vavae_fast.commands.invoke import run_command
from vavae_fast.errors import BadInput
from vavae_fast.parsing import apply_overrides, read_yaml

FORMAT = 1  # of results: another number makes every one anew


@dataclass(frozen=True)
class Lab:
    """Where results lie, and how a command is run: in this process, or by a launcher such as torchrun."""

    out: Path
    launcher: tuple[str, ...] = ()

    def folder(self, work: "Work") -> Path:
        return self.out / "arms" / work.key

    def result(self, work: "Work") -> dict[str, Any] | None:
        """What `perform` wrote: scores, seconds, versions; None while the work is not done."""
        path = self.folder(work) / "result.json"
        return artifacts.read_json(path) if path.is_file() else None

    def run(self, command: str, *words: Any) -> None:
        """A command of this package; what goes wrong is an exception."""
        words = tuple(map(str, words))
        if not self.launcher:
            run_command(command, list(words))
        elif status := subprocess.run([*self.launcher, "-m", "vavae_fast", command, *words]).returncode:
            raise BadInput(f"vavae-fast {command} {' '.join(words)}: ended with status {status}; see what it said above")


class Work:
    """A piece of work. `facts` name everything that its result is a function of, beside the work that it `needs`."""

    kind: ClassVar[str]
    cpu_seconds: float | None  # predicted, of one core; None: not known for this scale

    def needs(self) -> "tuple[Work, ...]":
        return ()

    def facts(self) -> dict[str, Any]:
        raise NotImplementedError

    def do(self, lab: Lab) -> dict[str, Any]:
        """Do it in `lab.folder(self)`, or go on where it stopped; returns its scores, ready for JSON."""
        raise NotImplementedError

    @cached_property
    def key(self) -> str:
        """Kind and hash: the name of its folder."""
        told = dict(format=FORMAT, kind=self.kind, needs=[work.key for work in self.needs()], **self.facts())
        return f"{self.kind}-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]}"


def perform(lab: Lab, work: Work) -> None:
    """Do `work` and write its result.json, by which it counts as done; work that is done is left alone."""
    if lab.result(work) is not None:
        return
    lab.folder(work).mkdir(parents=True, exist_ok=True)
    started, before = time.perf_counter(), time.process_time()
    scores = work.do(lab)
    spent = dict(seconds=time.perf_counter() - started, cpu_seconds=time.process_time() - before)
    told = artifacts.manifest("arm", key=work.key, needs=[other.key for other in work.needs()], facts=work.facts(), scores=scores, **spent)
    artifacts.write_json(lab.folder(work) / "result.json", told)


def in_order(works: "list[Work]") -> "list[Work]":
    """`works` and all that they need, each once, after what it needs itself."""
    found: dict[str, Work] = {}

    def add(work: Work) -> None:
        for other in work.needs():
            add(other)
        found.setdefault(work.key, work)

    for work in works:
        add(work)
    return list(found.values())


def given_keys(config: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What a config file and overrides say: the hash of an arm holds this and no defaults, so that a new key leaves old arms valid."""
    return apply_overrides(read_yaml(config), overrides)
