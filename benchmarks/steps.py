"""Training steps and single blocks of LightningDiT in every way to run them, on the same weights; `sampling` has its sampling.

An arm is a way: plain or fused operators, eager, compiled by block (what the public code does) or as a whole, or the public
repository's own modules. Plain arms step with torch.optim.AdamW(fused=True) and a foreach EMA, fused arms with AdamWEMA; all see
the same parameters, autocast to bf16 and random data, and draw their own noise and times.
"""

import importlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import optimizers
from benchmarks.profiles import by_class
from benchmarks.timing import Dynamo, Play, Race, captured, fresh_dynamo, play
from vavae_fast.flow import create_transport
from vavae_fast.models import create_lightningdit
from vavae_fast.models._torchvision import import_timm
from vavae_fast.models.lightningdit import LIGHTNINGDIT_SIZES, FusedLightningDiTBlock, LightningDiTBlock
from vavae_fast.models.lightningdit_cost import activation_bytes_per_image, flops_per_image, parameter_count
from vavae_fast.models.lightningdit_layers import Attention, FusedAttention, FusedSwiGLUFFN, RotaryEmbedding2D, SwiGLUFFN

TINY = dict(hidden_size=32, depth=1, num_heads=2, patch_size=1, input_size=4, in_channels=8, num_classes=10)
CLASSES = 1000


@dataclass(frozen=True)
class Arm:
    """compile: "" for eager, "blocks" or "model"; reference: the modules of the public repository, which compile themselves;
    attention: a backend's name."""

    fused: bool = False
    compile: str = ""
    reference: bool = False
    attention: str = "auto"


ARMS: Mapping[str, Arm] = {
    "eager": Arm(),
    "compiled blocks": Arm(compile="blocks"),
    "compiled model": Arm(compile="model"),
    "fused": Arm(fused=True),
    "fused, compiled blocks": Arm(fused=True, compile="blocks"),
    "fused, compiled model": Arm(fused=True, compile="model"),
    "fused, one attention kernel, compiled blocks": Arm(fused=True, compile="blocks", attention="fused"),
    "public code": Arm(reference=True),
}
EAGER_ARMS = ("eager", "fused")


def arguments(size: str) -> dict[str, Any]:
    """Constructor arguments of "XL/1", "B/1", … on 256 px, or of "tiny"."""
    if size == "tiny":
        return dict(TINY)
    known = LIGHTNINGDIT_SIZES[f"LightningDiT-{size}"]
    return dict(known, input_size=16, in_channels=32, num_classes=CLASSES)


def config(size: str, fused: bool = False, attention: str = "auto") -> dict[str, Any]:
    return dict(arguments(size), use_swiglu=True, use_rope=True, use_rmsnorm=True, fused=fused, attention=attention)


@contextmanager
def _imports_of(folder: Path, backend: str):
    """The public repository's imports inside; its decorators compile as they are written, `backend` being the default.

    Its RMSNorm stands in a file of Llama code whose fairscale layers nobody uses: empty modules stand for fairscale where it is missing.
    """
    parallel = "fairscale.nn.model_parallel"
    names = ["fairscale", "fairscale.nn", parallel, f"{parallel}.initialize", f"{parallel}.layers"]
    made = [name for name in names if importlib.util.find_spec("fairscale") is None and name not in sys.modules]
    for name in made:
        sys.modules[name] = types.ModuleType(name)
    for layer in ("ColumnParallelLinear", "ParallelEmbedding", "RowParallelLinear"):
        if made:
            setattr(sys.modules[names[-1]], layer, nn.Linear)
    sys.path.insert(0, str(folder))
    try:
        with mock.patch("torch.compile", partial(torch.compile, backend=backend)):
            yield
    finally:
        sys.path.remove(str(folder))
        for name in made:
            del sys.modules[name]


def reference_class(folder: Path, backend: str = "inductor") -> type[nn.Module]:
    """The LightningDiT class of a checkout of the public repository. ImportError names what it needs."""
    if not (folder / "models" / "lightningdit.py").is_file():
        raise ImportError(f"{folder} holds no models/lightningdit.py: VAVAE_REFERENCE is the folder of a LightningDiT checkout")
    import_timm()  # past a torchvision that does not fit
    with _imports_of(folder, backend):
        return importlib.import_module("models.lightningdit").LightningDiT


def base_model(size: str, device: torch.device) -> nn.Module:
    """The plain model with every weight random: adaLN-Zero would leave half of its matrix products with zeros, which run faster."""
    with torch.device(device):
        model = create_lightningdit("custom", **config(size))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and not parameter.any():
                    parameter.normal_(std=0.02)
    return model.train()


def in_the_way_of(arm: Arm, base: nn.Module, size: str, backend: str, reference: Path | None) -> nn.Module:
    """A model of the same parameters as `base`, run in the arm's way. ImportError names what an arm needs."""
    if arm.attention == "fused" and not base.pos_embed.is_cuda:
        raise ImportError("the single attention kernel needs a GPU")
    if arm.reference:
        if reference is None:
            raise ImportError("VAVAE_REFERENCE is not set")
        public = reference_class(reference, backend)
        ours = ("fused", "attention")
        build = lambda: public(use_qknorm=False, wo_shift=False, **{key: value for key, value in config(size).items() if key not in ours})
    else:
        build = lambda: create_lightningdit("custom", **config(size, arm.fused, arm.attention))
    with torch.device("meta"):
        model = build()
    model.load_state_dict(base.state_dict(keep_vars=True), assign=True)
    options = dict(dynamic=False, fullgraph=True, backend=backend)
    if arm.compile == "blocks":
        for part in (*model.blocks, model.t_embedder, model.final_layer):
            part.compile(**options)
    elif arm.compile == "model":
        model.compile(**options)
    return model.train(base.training)


class TrainingStep:
    """One step: noise, times, loss, backward, AdamW and EMA. Calling it runs it."""

    def __init__(self, arm: Arm, model: nn.Module, batch: int, device: torch.device):
        c, side = model.x_embedder.proj.in_channels, int(model.pos_embed.shape[1] ** 0.5)
        self.model, self.device = model, device
        self.transport = create_transport(use_cosine_loss=True, use_lognorm=True, fused=arm.fused)
        self.latents = torch.randn(batch, c, side, side, device=device)
        self.labels = torch.randint(model.y_embedder.num_classes, (batch,), device=device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        make = optimizers.ours if arm.fused else optimizers.fused_and_foreach
        self.update = make(self.parameters)

    def __call__(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        with torch.autocast(self.device.type, torch.bfloat16):
            terms = self.transport.training_losses(self.model, self.latents, dict(y=self.labels))
        (terms["loss"].mean() + terms["cos_loss"].mean()).backward()
        self.update()


class BlockStep:
    """Forward and backward of one block inside the chain: residual fp32, y and gate bf16, as autocast gives them."""

    def __init__(self, block: nn.Module, run: Callable[..., Any], width: int, heads: int, batch: int, tokens: int, device: torch.device):
        self.block, self.run, self.device = block, run, device
        bf16 = torch.bfloat16
        residual = torch.randn(batch, tokens, width, device=device)
        y, gate = torch.randn(batch, tokens, width, device=device).to(bf16), torch.randn(batch, width, device=device).to(bf16)
        c = torch.randn(batch, width, device=device)
        fused = isinstance(block, FusedLightningDiTBlock)
        self.inputs = [x.requires_grad_() for x in ((residual, y, gate, c) if fused else (residual, c))]
        self.rope = RotaryEmbedding2D(width // heads, int(tokens**0.5)).to(device)
        self.wanted = [*self.inputs, *block.parameters()]
        self.cotangents: list[Tensor] | None = None

    def __call__(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            result = self.run(*self.inputs, self.rope)
        results = result if isinstance(result, tuple) else (result,)
        if self.cotangents is None:
            self.cotangents = [torch.randn_like(r) for r in results]
        torch.autograd.grad(results, self.wanted, self.cotangents)


# A fused block with one operator taken back: what each is worth inside the compiled block.
WITHOUT: Mapping[str, tuple[type[nn.Module], type[nn.Module], type[nn.Module]]] = {
    "compiled": (LightningDiTBlock, Attention, SwiGLUFFN),
    "fused, compiled": (FusedLightningDiTBlock, FusedAttention, FusedSwiGLUFFN),
    "without gate_add_norm_modulate": (LightningDiTBlock, FusedAttention, FusedSwiGLUFFN),
    "without qk_norm_rope_attention": (FusedLightningDiTBlock, Attention, FusedSwiGLUFFN),
    "without swiglu": (FusedLightningDiTBlock, FusedAttention, SwiGLUFFN),
}


def block_calls(size: str, batch: int, device: torch.device, backend: str) -> dict[str, BlockStep]:
    """Every way of `WITHOUT`, compiled, and the fused and plain block in eager mode."""
    known = arguments(size)
    width, heads = known["hidden_size"], known["num_heads"]
    steps = {}
    for name, (block_class, attention, mlp) in WITHOUT.items():
        with torch.device(device):
            block = block_class(width, heads, 4.0, False, True, True, False)
        block.attn.__class__, block.mlp.__class__ = attention, mlp  # the same parameters, run the other way
        options = (width, heads, batch, (known["input_size"] // known["patch_size"]) ** 2, device)
        steps[name] = BlockStep(block, torch.compile(block, dynamic=False, fullgraph=True, backend=backend), *options)
        if name in ("compiled", "fused, compiled"):
            steps["eager" if name == "compiled" else "fused"] = BlockStep(block, block, *options)
    return steps


# -- comparison ------------------------------------------------------------------------------------------------------


def fitting_batch(size: str, wanted: int, arms: Sequence[str], device: torch.device) -> int:
    """`wanted`, halved until weights, states and activations of the hungriest arm fit on the device, as far as can be counted."""
    if device.type != "cuda" or size == "tiny":
        return wanted
    total = torch.cuda.get_device_properties(device).total_memory
    state = parameter_count(config(size)) * (8 + 12 * len(arms))  # weight and gradient are shared; moments and EMA are an arm's own
    eager = activation_bytes_per_image(config(size))
    image = eager if "eager" in arms else 0.65 * eager  # Inductor recomputes what is cheap; measured peaks stand in the rows
    while wanted > 8 and state + wanted * image > 0.9 * total:
        wanted //= 2
    return wanted


@dataclass(frozen=True)
class Step:
    """What is compared: "train" or "block" of a size at a batch, in which ways, captured in CUDA graphs or not."""

    what: str
    size: str
    batch: int
    arms: tuple[str, ...]
    graph: bool = False
    label: str = ""

    @property
    def name(self) -> str:
        """As guards.yaml and the README have it: "train XL/1, batch 32, CUDA graph"."""
        return f"{self.what} {self.size}, batch {self.batch}" + (", CUDA graph" if self.graph else "") + (f", {self.label}" if self.label else "")

    def compiles(self, arm: str) -> bool:
        """Whether a way must compile a graph, or is no measurement."""
        return arm not in EAGER_ARMS

    @property
    def needs(self) -> float:
        """Seconds without which gpu.sh does not begin it."""
        return 240 if "compiled model" in self.arms else 90

    def lacking(self, device: torch.device, settings: "Settings") -> str | None:
        """Why it is no comparison here, if it is none."""
        needs_reference = any(arm.startswith("public code") for arm in self.arms)
        return "VAVAE_REFERENCE names no checkout of the public LightningDiT" if needs_reference and settings.reference is None else None

    def timed(self, settings: "Settings") -> "Settings":
        """`settings` as they suit it."""
        return settings

    def images(self, arm: str) -> float:
        """What a call of a way makes: seconds of different ways are compared for as many images."""
        return self.batch

    def fitting(self, device: torch.device) -> int:
        """The largest batch that can fit, as far as can be counted."""
        return fitting_batch(self.size, self.batch, self.arms, device) if self.what == "train" else self.batch

    def makers(self, device: torch.device, settings: "Settings") -> dict[str, Callable[[], Callable[[], Any]]]:
        """What makes each way's call."""
        if self.what == "block":
            return {name: (lambda call=call: call) for name, call in block_calls(self.size, self.batch, device, settings.backend).items()}
        base = base_model(self.size, device)
        model = lambda arm: in_the_way_of(arm, base, self.size, settings.backend, settings.reference)
        return {name: lambda arm=ARMS[name]: TrainingStep(arm, model(arm), self.batch, device) for name in self.arms}

    def facts(self, seconds: dict[str, float]) -> dict[str, Any]:
        """More for the row, of each way's median."""
        if self.what == "block":
            return {}
        flops = flops_per_image(config(self.size)) * 3
        return dict(
            images_per_second={name: round(self.batch / median, 2) for name, median in seconds.items()},
            tflops={name: round(flops * self.batch / median / 1e12, 2) for name, median in seconds.items()},
        )


MAIN_ARMS = ("compiled blocks", "fused, compiled blocks", "fused")
MAIN = Step("train", "XL/1", 256, MAIN_ARMS)
STEPS = (  # most valuable first; the block says what each operator is worth in the compiled block
    MAIN,
    Step("block", "XL/1", 256, (*WITHOUT, "eager", "fused")),
    Step("train", "XL/1", 256, ("public code", "fused, compiled blocks"), label="public code"),
    Step("train", "XL/1", 128, ("eager", "fused, compiled blocks"), label="eager"),
    Step("train", "XL/1", 32, MAIN_ARMS, graph=True),
    Step("train", "B/1", 256, ("eager", *MAIN_ARMS)),
    Step("train", "B/1", 32, MAIN_ARMS, graph=True),
    Step("train", "XL/1", 256, ("compiled model", "fused, compiled model", "fused, compiled blocks"), label="whole model"),
)


BASELINES = (*ARMS, *WITHOUT)  # what a guard may name


@dataclass(frozen=True)
class Settings:
    """How steps are timed. reference: folder of the public repository, for the arm that is its code."""

    rounds: int = 5
    seconds: float = 0.8
    warm_up: float = 0.5
    backend: str = "inductor"
    reference: Path | None = None


def rehearsal(step: Step) -> Step:
    """The same at a size for a CPU."""
    return replace(step, size="tiny", batch=2)


REHEARSAL = Settings(rounds=1, seconds=0.0, warm_up=0.0, backend="aot_eager")
REHEARSED = tuple(rehearsal(STEPS[n]) for n in (0, 1, 2, 4, 7))  # one of each kind


class Arms:
    """The arms of a step that run here, and why the others do not."""

    def __init__(self, step: Step, device: torch.device, dynamo: Dynamo, settings: Settings):
        self.step, self.device, self.dynamo = step, device, dynamo
        self.left_out: dict[str, str] = {}
        self.peak_gb: dict[str, float] = {}
        self.calls: dict[str, Callable[[], Any]] = {}
        for name, make in step.makers(device, settings).items():
            self._try(name, make)
        if not self.calls:
            raise RuntimeError(f"no way of {step.name} runs: {self.left_out}")

    def _try(self, name: str, make: Callable[[], Callable[[], Any]]) -> None:
        """Run an arm twice, note its memory; an arm without memory or package is left out, and the row says so."""
        cuda = self.device.type == "cuda"
        call = None
        try:
            call = make()
            with self.dynamo.compiles(name) if self.step.compiles(name) else nullcontext():
                call()
            if cuda:
                torch.cuda.synchronize(self.device)
                before = torch.cuda.memory_allocated(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
            call()
            if cuda:
                torch.cuda.synchronize(self.device)
                self.peak_gb[name] = round((torch.cuda.max_memory_allocated(self.device) - before) / 2**30, 2)
            if self.step.graph:
                captured([call], self.device)()
            self.calls[name] = call
        except torch.cuda.OutOfMemoryError:
            self.left_out[name] = f"out of memory at batch {self.step.batch}"
        except ImportError as reason:
            self.left_out[name] = str(reason)
        if name in self.left_out and cuda:
            del call
            torch.cuda.empty_cache()


def compare(step: Step, device: torch.device, settings: Settings, profile: bool = False, last: Play = play) -> dict[str, Any]:
    """The row of a step's arms run side by side, with each one's kernels by class if `profile`, at the largest batch that fits.

    `FellBack` where a compiled arm did not run compiled. last plays the rounds: pytest-benchmark keeps its books of them.
    """
    fitting = step.fitting(device)
    while True:
        try:
            return _compare(step, replace(step, batch=fitting), device, step.timed(settings), profile, last)
        except torch.cuda.OutOfMemoryError:
            if fitting <= 8:
                raise
            fitting //= 2
            torch.cuda.empty_cache()


def _compare(asked: Step, step: Step, device: torch.device, settings: Settings, profile: bool, last: Play) -> dict[str, Any]:
    with fresh_dynamo() as dynamo:
        arms = Arms(step, device, dynamo, settings)
        race = Race({name: [call] for name, call in arms.calls.items()}, device, settings.seconds, settings.warm_up, graph=step.graph)
        dynamo.settle()
        last(race.round, settings.rounds)
        dynamo.check()
        row = _row(asked, arms, race)
        if profile:
            row["profile"] = {name: by_class(call, device) for name, call in arms.calls.items()}
        return row


def _row(asked: Step, arms: Arms, race: Race) -> dict[str, Any]:
    """What goes into the results file; ratios are to the fastest of the fused arms, times those of as many images as the batch has."""
    step, timings = arms.step, race.timings
    fused = [name for name in timings if name.startswith("fused")]
    ours = min(fused, key=lambda name: timings[name].median / step.images(name)) if fused else None
    ratio = lambda name: race.ratio(name, ours) * step.images(ours) / step.images(name)
    return dict(
        name=asked.name, what=step.what, size=step.size, batch=step.batch, ours=ours, how="graph" if step.graph else "calls",
        us={name: round(1e6 * t.median * step.batch / step.images(name), 1) for name, t in timings.items()},
        spread={name: round(t.spread, 4) for name, t in timings.items()},
        ratio={name: round(ratio(name), 4) for name in timings if ours and name != ours},
        peak_gb=arms.peak_gb, left_out=arms.left_out, **step.facts({name: t.median for name, t in timings.items()}),
    )  # fmt: skip
