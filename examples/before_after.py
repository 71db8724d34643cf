"""What the patch_*.py beside it share: a model of a checkout, its weights, and patched against as it was: results, then time.

Both models hold the same parameters. Results are compared in float32 and, on a GPU, in bfloat16, which is also what is timed
there; a forward and backward of each way is timed side by side by benchmarks/timing.py, blocks compiled one by one.
"""

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no part of the installed package
from benchmarks.timing import Race, fresh_dynamo
from vavae_fast.errors import BadInput
from vavae_fast.models._torchvision import import_timm
from vavae_fast.models.weights import load_strict, read_state_dict

TINY = dict(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10)  # of DiT and its children: seconds on a CPU
WAYS = ("eager", "fused", "compiled blocks", "fused, compiled blocks")
CPU_ROUNDS, GPU_ROUNDS = 3, 5
FLOAT32 = 1e-4  # largest difference over largest value that float32 may show, of the outputs and of all gradients
# bfloat16 may be as far from float32 as twice what the model as it was is, and one rounding: the rule of tests/kernels.


def from_checkout(repository: Path, path: str) -> ModuleType:
    """A module of a public repository, by its file. It imports timm."""
    file = repository / path
    if not file.is_file():
        raise BadInput(f"--repository {repository}: it has no {path}; give the folder of a checkout")
    import_timm()  # past a torchvision that does not fit torch
    spec = importlib.util.spec_from_file_location(f"checkout_{repository.resolve().name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def known(names: Iterable[str], name: str) -> str:
    """`name`, if it is one of `names`."""
    if name not in names:
        raise BadInput(f"--model {name}: unknown; known: {', '.join(names)}")
    return name


def with_weights(model: nn.Module, checkpoint: Path | None, rename: Callable[[str], str] = str) -> nn.Module:
    """`model` with the weights of a file, the EMA first (`rename` gives each key its present name), else random everywhere.

    adaLN-Zero begins with zeros, behind which no difference shows and matrix products run faster.
    """
    if checkpoint is not None:
        state = read_state_dict(checkpoint, prefer=("ema", "model"))
        load_strict(model, {rename(key): value for key, value in state.items()}, checkpoint)
        return model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model.eval()


def twin(model: nn.Module) -> nn.Module:
    """The same parameters and buffers, in modules of their own."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def outputs(result: Any) -> Iterator[Tensor]:
    """The tensors of what a model returns; REPA's is a tensor and a list."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for each in result:
            yield from outputs(each)


class ForwardBackward:
    """A forward and backward of a model on its inputs, under autocast to `dtype` if one is given. Calling it runs it."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype | None):
        self.model, self.inputs, self.dtype = model, inputs, dtype
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device

    def __call__(self) -> tuple[list[Tensor], list[Tensor]]:
        with torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext():
            found = list(outputs(self.model(**self.inputs)))
        loss = torch.stack([each.float().square().mean() for each in found]).sum()
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return [each.detach() for each in found], [gradient for gradient in gradients if gradient is not None]


def ways(before: nn.Module, after: nn.Module, blocks: str, inputs: Mapping[str, Any], dtype: torch.dtype | None, backend: str) -> dict[str, Callable]:
    """`WAYS` -> what makes its call. blocks names the list of blocks in the model."""

    def compiled(model: nn.Module) -> nn.Module:
        model = twin(model)
        for block in model.get_submodule(blocks):
            block.compile(fullgraph=True, dynamic=False, backend=backend)
        return model

    models = (lambda: before, lambda: after, lambda: compiled(before), lambda: compiled(after))
    return {name: lambda make=make: ForwardBackward(make(), inputs, dtype) for name, make in zip(WAYS, models)}


# -- results ---------------------------------------------------------------------------------------------------------


def distances(run: ForwardBackward, exact: tuple[list[Tensor], list[Tensor]]) -> list[float]:
    """Of the outputs, then of the gradients: the largest difference from `exact` over the largest value there."""
    far = lambda ours, theirs: max((a.float() - b.float()).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    return [far(ours, theirs) / max(b.abs().max().item() for b in theirs) for ours, theirs in zip(run(), exact)]


def check(before: nn.Module, after: nn.Module, inputs: Mapping[str, Any], dtypes: Iterable[torch.dtype | None]) -> Iterator[str]:
    """A line for each precision; AssertionError where a patched model is further off than it may be."""
    exact = ForwardBackward(before, inputs, None)()
    for dtype in dtypes:
        ours = distances(ForwardBackward(after, inputs, dtype), exact)
        if dtype is None:
            name, allowed = "float32", [FLOAT32, FLOAT32]
        else:
            name, own = "bfloat16", distances(ForwardBackward(before, inputs, dtype), exact)
            allowed = [2 * (each + torch.finfo(dtype).eps) for each in own]
        for what, error, most in zip(("outputs", "gradients"), ours, allowed):
            if not error <= most:
                raise AssertionError(f"{what} in {name} differ by {error:.2g} of the largest, {most:.2g} is allowed")
        yield f"same in {name}: outputs within {ours[0]:.1e} (allowed {allowed[0]:.1e}), gradients {ours[1]:.1e} (allowed {allowed[1]:.1e})"


# -- time ------------------------------------------------------------------------------------------------------------


def race(calls: Mapping[str, Callable[[], Callable]], device: torch.device, quick: bool) -> Race:
    """The ways timed in turns. `FellBack` where a way that is called compiled did not run compiled."""
    rounds, seconds, warm_up = (1, 0.0, 0.0) if quick else (GPU_ROUNDS, 0.8, 0.5) if device.type == "cuda" else (CPU_ROUNDS, 0.0, 0.0)
    with fresh_dynamo() as dynamo:
        made = {}
        for name, make in calls.items():
            made[name] = make()
            with dynamo.compiles(name) if "compiled" in name else nullcontext():
                made[name]()
        found = Race({name: [call] for name, call in made.items()}, device, seconds, warm_up, graph=False)
        dynamo.settle()
        for _ in range(rounds):
            found.round()
        dynamo.check()
    return found


def table(found: Race) -> Iterator[str]:
    """Median milliseconds of each way, and how many times faster the patched one is than the same way as it was."""
    for name, timing in found.timings.items():
        before = {"fused": "eager", "fused, compiled blocks": "compiled blocks"}.get(name)
        faster = f"   {found.ratio(before, name):.2f} x {before}" if before else ""
        yield f"  {name:24s}{1e3 * timing.median:10.2f} ms  +- {50 * timing.spread:.0f} %{faster}"


# -- what a script calls ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    model: str
    batch: int
    device: torch.device
    backend: str
    quick: bool
    checkpoint: Path | None
    repository: Path | None


def options(description: str, model: str, repository: bool = True) -> Options:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repository:
        parser.add_argument("--repository", type=Path, required=True, help="folder of a checkout")
    parser.add_argument("--model", default=model, help="a name of its table, or tiny")
    parser.add_argument("--checkpoint", type=Path, help="published weights, or those of your own run; without it, random ones")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; aot_eager needs no compiler")
    parser.add_argument("--quick", action="store_true", help="one round, to see that it runs")
    given = vars(parser.parse_args())
    return Options(**{"repository": None, **given, "device": torch.device(given["device"])})


def compare(before: nn.Module, after: nn.Module, blocks: str, inputs: Mapping[str, Any], given: Options) -> None:
    """Print that both give the same, and what each way takes."""
    cuda = given.device.type == "cuda"
    for model in (before, after):
        model.to(given.device)
    inputs = {name: value.to(given.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    for line in check(before, after, inputs, (None, torch.bfloat16) if cuda else (None,)):
        print(line)
    place = f"on {torch.cuda.get_device_name(given.device)}" if cuda else "on a CPU, where operators are plain PyTorch: no measure of them"
    print(f"forward and backward, batch {given.batch}, {'bfloat16' if cuda else 'float32'}, {place}")
    calls = ways(before, after, blocks, inputs, torch.bfloat16 if cuda else None, given.backend)
    print("\n".join(table(race(calls, given.device, given.quick))))


def run(main: Callable[[], None]) -> None:
    """Bad input ends in one line."""
    try:
        main()
    except BadInput as error:
        sys.exit(f"error: {error}")
