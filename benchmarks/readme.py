"""Writes the README's measured numbers from benchmarks/results/: python benchmarks/readme.py [--check].

A result file is what a run left (runs/demo/metrics.json) with the machine and the commit that made it: `--record` copies one in.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS, README = ROOT / "benchmarks" / "results", ROOT / "README.md"
BEGIN, END = "<!-- measured: benchmarks/readme.py writes this -->", "<!-- /measured -->"
ARMS = {"no-vf": "none", "vf": "self-supervised stand-in", "random": "untrained encoder (control)"}


def record(run: Path) -> Path:
    """runs/demo -> benchmarks/results/demo-<device>.json."""
    metrics = json.loads((run / "metrics.json").read_text())
    seconds = json.loads((run / "manifest.json").read_text())["seconds"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    keep = {key: metrics[key] for key in ("time", "versions", "seed", "protocol", "arms", "held_out", "shown", "stages")}
    result = dict(commit=commit, device=_device(), seconds=round(seconds, 1), **keep)
    path = RESULTS / f"demo-{'gpu' if 'CUDA' in result['device'] else 'cpu'}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _device() -> str:
    import os

    import torch

    if torch.cuda.is_available():
        return f"CUDA {torch.cuda.get_device_name()}"
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores"


def measured() -> str:
    """The Markdown between the marks."""
    parts = []
    for path in sorted(RESULTS.glob("demo-*.json")):
        parts.append(_demo(json.loads(path.read_text())))
    parts.append("**On a GPU: not yet measured.** That is training and sampling speed, memory, the operators, and every figure on ImageNet "
                 "(FID, rFID, IS). No figure of the paper is repeated here as ours.")  # fmt: skip
    return "\n\n".join(parts)


def _demo(result: dict) -> str:
    budgets = list(result["arms"]["vf"]["lightningdit"])
    rows = ["| VF alignment | held-out PSNR | " + " | ".join(f"{b} steps: in class / Fréchet" for b in budgets) + " | guided: in class |",
            "|---|---|" + "---|" * (len(budgets) + 1)]  # fmt: skip
    for arm, name in ARMS.items():
        scores = result["arms"][arm]
        cells = [f"{100 * s['unguided']['agreement']:.1f} % / {s['unguided']['frechet']:.1f}" for s in scores["lightningdit"].values()]
        guided = scores["lightningdit"][budgets[-1]]["guided"]["agreement"]
        rows.append(f"| {name} | {scores['reconstruction']['psnr']:.1f} dB | {' | '.join(cells)} | {100 * guided:.1f} % |")
    held = result["held_out"]
    return (
        f"**The demo** (`make demo`, seed {result['seed']}, {result['device']}, torch {result['versions']['torch']}, "
        f"commit {result['commit']}, {result['time'][:10]}): {result['seconds']:.0f} s without installation. One tokenizer budget, one LightningDiT "
        f"budget, three kinds of latents; unguided samples unless it says guided. Real held-out digits have a Fréchet distance of "
        f"{held['frechet']:.1f}.\n\n"
        + "\n".join(rows)
        + "\n\nThis shows that the pipeline works and what aligned latents do at this size. It is one seed of a toy; stand-ins replace every "
        "pretrained network, and the untrained control tells how much of the gain needs a trained encoder."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    parser.add_argument("--record", type=Path, metavar="RUN", help="first copy in the result of a demo run")
    args = parser.parse_args()
    if args.record:
        print(record(args.record))
    text = README.read_text()
    head, rest = text.split(BEGIN)
    new = f"{head}{BEGIN}\n\n{measured()}\n\n{END}{rest.split(END)[1]}"
    if args.check:
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
