"""The whole pipeline on 1,797 handwritten digits: VA-VAE, latents, LightningDiT, samples, scores, a page to look at.

Three arms with one budget show the paper's point in miniature: latents without VF alignment, with it, and with an
untrained encoder as control. Every stage is the command of that name; only the pretrained networks are stand-ins.
"""

import os
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from vavae_fast import artifacts
from vavae_fast.commands.demo_stages import (
    ARMS,
    SAMPLES,
    DemoPlan,
    Timeline,
    make_encoders,
    make_perceptual,
    train_arm_dit,
    train_arm_tokenizer,
)
from vavae_fast.config import LightningDiTConfig, TokenizerConfig, load_config
from vavae_fast.errors import require
from vavae_fast.experiments.pool import Done, Task, run_tasks
from vavae_fast.parsing import shipped_configs

EXAMPLE = "vavae-fast demo --out runs/demo"


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (default runs/demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--configs", type=Path, help="folder of demo.yaml and demo_tokenizer.yaml; default: the shipped ones")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs; the numbers mean nothing")


def plan(config: None, args: Namespace) -> DemoPlan:
    """Configs and folder; on a CPU one process a core, up to three, on a GPU one."""
    configs = args.configs or shipped_configs()
    require(args.seed >= 0, "--seed", args.seed, "0 or more")
    tokenizer = load_config(configs / "demo_tokenizer.yaml", kind=TokenizerConfig)
    dit = load_config(configs / "demo.yaml", kind=LightningDiTConfig)
    artifacts.require_writable(args.out)
    artifacts.require_space(args.out, 200 << 20)
    import torch

    processes = 1 if torch.cuda.is_available() else max(1, min(3, len(os.sched_getaffinity(0))))
    if args.quick:
        return DemoPlan(args.out, args.seed, configs, 4, (2, 4), 40, (2, 2), processes)
    few, more = dit.train.ckpt_every, dit.train.max_steps
    return DemoPlan(args.out, args.seed, configs, tokenizer.train.max_steps, (few, more), SAMPLES, (250, 250), processes)


def run(plan: DemoPlan) -> Path:
    """Make the stand-ins, run the arms side by side, judge, write the page."""
    plan.out.mkdir(parents=True, exist_ok=True)
    timeline = Timeline()  # of a demo that continues: of what was still to do
    print(f"demo  {plan.out}: {len(ARMS)} arms, {plan.processes} process(es)", flush=True)

    def finished(done: Done) -> None:
        timeline.add(dict(stage=done.name, seconds=done.seconds, memory_gb=done.memory_gb))
        print(f"demo  {done.name} done in {done.seconds:.0f} s", flush=True)

    run_tasks(_tasks(plan), plan.processes, finished)
    from vavae_fast.commands.demo_judge import judge, table, verdict
    from vavae_fast.commands.demo_page import write_overview, write_page

    metrics = judge(plan, timeline)
    write_overview(plan)
    write_page(plan, metrics, timeline)
    seconds = time.perf_counter() - timeline.started
    artifacts.write_json(plan.out / "manifest.json", artifacts.manifest("demo", seed=plan.seed, budgets=plan.budgets, seconds=seconds))
    print(_text_table(table(plan, metrics)))
    print("\n".join(verdict(plan, metrics)))
    print(f"demo  done in {seconds:.0f} s; open {plan.out / 'report.html'}", flush=True)
    return plan.out


def _text_table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows)


def _tasks(plan: DemoPlan) -> list[Task]:
    """Stand-ins, then tokenizer and LightningDiT of each arm; in the order in which they are to start."""
    tasks = [Task("perceptual", (), make_perceptual, (plan,)), Task("encoders", (), make_encoders, (plan,))]
    for arm in ARMS:
        needs = ("perceptual",) if arm == "no-vf" else ("perceptual", "encoders")
        tasks.append(Task(f"{arm}/tokenizer", needs, train_arm_tokenizer, (plan, arm)))
    return tasks + [Task(f"{arm}/lightningdit", (f"{arm}/tokenizer",), train_arm_dit, (plan, arm)) for arm in ARMS]
