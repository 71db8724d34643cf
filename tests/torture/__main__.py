"""The torture campaigns: every fault that the engine promises to survive, tried, counted.

    python tests/torture [CAMPAIGN[.PART] ...] [--size X] [--seed N] [--json FILE] [--markdown FILE] [--folder DIR]

Without names all of them. Size 1 tries what the project promises; 0.05 is a quick look, 10 a night. Each campaign runs in a process of
its own. With --folder, a run that was stopped goes on: campaigns that ended there, of the same size and seed, are not run again.
The exit status is 1 when anything was lost, wrong or hung in our own rows.
"""

import argparse
import ctypes
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # tests/, where `torture` and what the tests share lie

from torture.markdown import commit, page  # noqa: E402
from torture.tally import Effort, Ran, Tally  # noqa: E402

CAMPAIGNS = ("kills", "bits", "disk", "processes", "numbers", "inputs", "hostility")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN[.PART]", help=f"of {', '.join(CAMPAIGNS)}; a part is a function of its module")
    parser.add_argument("--size", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="the table as a page")
    parser.add_argument("--folder", type=Path, help="keep what the campaigns write here")
    given = parser.parse_args()
    unknown = [name for name in given.campaigns if name.split(".")[0] not in CAMPAIGNS]
    if unknown:
        parser.error(f"unknown campaign {unknown[0]}; known: {', '.join(CAMPAIGNS)}")
    results: dict[str, Ran] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in given.campaigns or CAMPAIGNS:
            results[name] = once(name, given.seed, given.size, folder)
            show(name, results[name])
    if given.json:
        rows = [{"campaign": name, **asdict(tally)} for name, ran in results.items() for tally in ran.rows]
        given.json.write_text(json.dumps({"size": given.size, "seed": given.seed, "rows": rows}, indent=1) + "\n")
    if given.markdown:
        given.markdown.write_text(page(results, given.size, given.seed), encoding="utf-8")
    return int(not all(tally.clean for ran in results.values() for tally in ran.rows))


def once(name: str, seed: int, size: float, folder: Path) -> Ran:
    """What came of a campaign, as kept in `folder`, or of a run now, whose files lie in a new folder there."""
    kept, made_of = folder / f"{name}.json", {"seed": seed, "size": size}
    if kept.exists() and (was := json.loads(kept.read_text())) and all(was[key] == value for key, value in made_of.items()):
        return Ran([Tally(**row) for row in was["rows"]], was["seconds"], was["commit"])
    began, code = time.monotonic(), commit()
    tallies = apart(name, Effort(seed, size, Path(tempfile.mkdtemp(dir=folder, prefix=f"{name}-"))))
    ran = Ran(tallies, time.monotonic() - began, code)
    kept.write_text(json.dumps({**made_of, **ran._asdict(), "rows": [asdict(tally) for tally in tallies]}, indent=1) + "\n")
    return ran


def apart(name: str, effort: Effort) -> list[Tally]:
    """Run a campaign in a process of its own, whose threads, mounts and imports end with it; one that breaks is a row too."""
    campaign, _, part = name.partition(".")
    result = effort.folder / "tallies.json"
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with this process
        try:
            run = getattr(importlib.import_module(f"torture.{campaign}"), part or "run")
            result.write_text(json.dumps([asdict(tally) for tally in run(effort)]))
        except BaseException:  # noqa: B036  said here, counted by the parent
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0 if result.exists() else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        return [Tally(**row) for row in json.loads(result.read_text())]
    return [Tally(f"the campaign {name}", tried=1, wrong=1, failures=[f"--seed {effort.seed} --size {effort.size:g}: it broke, see above"])]


def show(name: str, ran: Ran) -> None:
    """A campaign's rows; of our own, the failures in full."""
    print(f"{name}  {ran.seconds:.0f} s", flush=True)
    for tally in ran.rows:
        counts = f"{tally.tried:>7,} tried {tally.lost:>5} lost {tally.wrong:>5} wrong {tally.hung:>5} hung"
        print(f"  {tally.fault:<98}{counts}{'  ' + tally.remark if tally.remark else ''}")
        for failure in () if tally.reference else tally.failures:
            print(f"    {failure}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
