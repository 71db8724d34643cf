"""The torture campaigns: every fault that the engine promises to survive, tried, counted.

    python tests/torture [CAMPAIGN ...] [--size X] [--seed N] [--json FILE] [--folder DIR]

Without names all of them. Size 1 tries what the project promises; 0.05 is a quick look, 10 a night. The exit status is 1 when anything
was lost, wrong or hung in our own rows.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])  # tests/, where `torture` and what the tests share lie

from torture.tally import Effort, Tally  # noqa: E402

CAMPAIGNS = ("kills", "bits", "disk", "processes", "numbers", "inputs", "hostility")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=f"of {', '.join(CAMPAIGNS)}")
    parser.add_argument("--size", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="keep what the campaigns write here")
    given = parser.parse_args()
    unknown = sorted(set(given.campaigns) - set(CAMPAIGNS))
    if unknown:
        parser.error(f"unknown campaign {unknown[0]}; known: {', '.join(CAMPAIGNS)}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in given.campaigns or CAMPAIGNS:
            folder = (given.folder or Path(temporary)) / name
            folder.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            tallies = importlib.import_module(f"torture.{name}").run(Effort(given.seed, given.size, folder))
            rows += [{"campaign": name, **asdict(tally)} for tally in tallies]
            show(name, tallies, time.monotonic() - began)
    if given.json:
        given.json.write_text(json.dumps({"size": given.size, "seed": given.seed, "rows": rows}, indent=1) + "\n")
    return int(any(not row["reference"] and (row["lost"] or row["wrong"] or row["hung"]) for row in rows))


def show(name: str, tallies: list[Tally], seconds: float) -> None:
    """A campaign's rows, and its failures in full."""
    print(f"{name}  {seconds:.0f} s", flush=True)
    for tally in tallies:
        counts = f"{tally.tried:>7,} tried {tally.lost:>5} lost {tally.wrong:>5} wrong {tally.hung:>5} hung"
        print(f"  {tally.fault:<70}{counts}{'  ' + tally.remark if tally.remark else ''}")
        for failure in tally.failures:
            print(f"    {failure}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
