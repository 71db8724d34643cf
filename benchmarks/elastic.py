"""What `train.deterministic: elastic` costs: the same training step, with and without it.

    torchrun --nproc-per-node N -m benchmarks.elastic [--rounds 7] [--size small]

prints medians of N processes' steps, ways in turn: without shards, and where there are several processes with all weights sharded.
On a CPU the seconds are the main process's own, not the clock's, which other work would lengthen.

On one device `benchmarks/gpu.sh` compares the published models' steps: kernels that are deterministic, the tree of sums and the norm of rows.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.steps import ARMS, Settings, Step, arguments, base_model, in_the_way_of, rehearsal
from vavae_fast.data.streams import LatentBatch
from vavae_fast.distributed import World, open_world
from vavae_fast.flow import create_transport
from vavae_fast.models import create_lightningdit
from vavae_fast.schema import OptimizerConfig
from vavae_fast.training.dit import DiTState, dit_step
from vavae_fast.training.elastic import ElasticReduction, deterministic_kernels, exact, require_workspace
from vavae_fast.training.guard import Guard
from vavae_fast.training.optimizer import trainable
from vavae_fast.training.parallel import process_mesh, shard
from vavae_kernels import AdamWEMA

SLOTS = 8
ONE_DEVICE = ("fused, one micro-batch", "fused, 8 micro-batches", "deterministic kernels, 8 micro-batches", "elastic, 8 slots")
SMALL = dict(hidden_size=192, depth=4, num_heads=4, patch_size=1, input_size=8, in_channels=4, num_classes=10, use_swiglu=True, use_rope=True,
             use_rmsnorm=True)  # fmt: skip

Call = Callable[[], Any]


@dataclass(frozen=True)
class ElasticStep(Step):
    """A whole step of one process, the batch in eight micro-batches (a rehearsal's in two)."""

    def compiles(self, arm: str) -> bool:
        return not arm.startswith("elastic")  # it runs the graphs of the deterministic kernels

    def fitting(self, device: torch.device) -> int:
        return self.batch  # halved by `compare` where an arm runs out of memory

    def makers(self, device: torch.device, settings: Settings) -> dict[str, Callable[[], Call]]:
        require_workspace()
        base = base_model(self.size, device)

        def make(arm: str) -> Call:
            model = in_the_way_of(ARMS["fused, compiled blocks"], base, self.size, settings.backend, None)
            slots = min(SLOTS, self.batch)
            state = training_state(model, World(0, 1, device), ElasticReduction(World(0, 1, device), slots) if arm.startswith("elastic") else None)
            kernels = {"elastic": lambda: exact(device, True), "deterministic kernels": lambda: deterministic_kernels(True)}
            return step_call(state, self.batch, 1 if arm == ONE_DEVICE[0] else slots, kernels.get(arm.split(",")[0], nullcontext))

        return {arm: lambda arm=arm: make(arm) for arm in self.arms}

    def facts(self, seconds: dict[str, float]) -> dict[str, Any]:
        return dict(images_per_second={name: round(self.batch / median, 2) for name, median in seconds.items()})


STEPS = (ElasticStep("elastic", "XL/1", 256, ONE_DEVICE), ElasticStep("elastic", "B/1", 256, ONE_DEVICE))
REHEARSED = (rehearsal(STEPS[0]),)


def training_state(model: torch.nn.Module, world: World, reduction: ElasticReduction | None) -> DiTState:
    settings = OptimizerConfig(lr=1e-4, max_grad_norm=1.0)
    optimizer = AdamWEMA(trainable(model).items(), lr=settings.lr, betas=(0.9, settings.beta2), weight_decay=0.0)
    return DiTState(
        model=model.train(), optimizer=optimizer, transport=create_transport(use_cosine_loss=True, use_lognorm=True), guard=Guard(world.device, 10),
        world=world, seed=0, settings=settings, max_steps=10**9, bf16=world.device.type == "cuda", ema_decay=0.9999, reduction=reduction,
    )  # fmt: skip


def step_call(state: DiTState, batch: int, parts: int, around: Callable[[], AbstractContextManager]) -> Call:
    """A training step on random latents, in `parts` micro-batches."""
    model, device = state.model, state.world.device
    side = int(model.pos_embed.shape[1] ** 0.5)
    latents = torch.randn(batch, model.x_embedder.proj.in_channels, side, side, device=device)
    labels, index = torch.randint(model.y_embedder.num_classes, (batch,), device=device), torch.arange(batch, device=device)
    micro_batches = [LatentBatch(*part) for part in zip(latents.chunk(parts), labels.chunk(parts), index.chunk(parts))]

    def call() -> None:
        with around():
            dit_step(state, 0, micro_batches)

    return call


# -- several processes --------------------------------------------------------------------------------------------------


def modes(world: World) -> tuple[str, ...]:
    """Values of train.shard that are compared."""
    return ("none", "full") if world.size > 1 else ("none",)


def arms(world: World, size: str, batch: int) -> dict[str, Call]:
    """Ways of one step of all processes, with weights of their own."""
    made = {}
    for mode in modes(world):
        for elastic in (False, True):
            torch.manual_seed(0)
            model = create_lightningdit("custom", **(SMALL if size == "small" else arguments(size))).to(world.device)
            mesh = process_mesh(world, mode)
            shard(model, mesh, bf16=world.device.type == "cuda")
            reduction = ElasticReduction(world, SLOTS, mesh) if elastic else None
            if elastic:
                reduction.attach(model)
            around = (lambda: exact(world.device, False)) if elastic else nullcontext
            made[f"{'elastic' if elastic else 'as ever'}, shard {mode}"] = step_call(
                training_state(model, world, reduction), batch // world.size, SLOTS // world.size, around
            )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", default="small", help="small, or a published one: S/1, B/1, L/1, XL/1")
    parser.add_argument("--batch", type=int, default=16, help="of all processes")
    options = parser.parse_args()
    require_workspace()
    with open_world() as world:
        if world.device.type == "cpu":
            torch.set_num_threads(1)
        calls = arms(world, options.size, options.batch)
        clock = time.process_time if world.device.type == "cpu" else time.perf_counter
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(options.rounds + 1):  # the first warms up
            for name, call in calls.items():
                world.barrier()
                began = clock()
                call()
                if world.device.type == "cuda":
                    torch.cuda.synchronize(world.device)
                world.barrier()
                seconds[name] += [clock() - began] if number else []
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        ratios = {}
        for mode in modes(world):
            pairs = zip(seconds[f"elastic, shard {mode}"], seconds[f"as ever, shard {mode}"])
            ratios[mode] = round(statistics.median(a / b for a, b in pairs), 3)
        if world.main:
            print(json.dumps(dict(processes=world.size, seconds={name: round(t, 4) for name, t in medians.items()}, elastic_over_as_ever=ratios)))


if __name__ == "__main__":
    main()
