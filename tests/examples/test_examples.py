"""The scripts of examples/: on the real classes of diffusers; on the public repositories where VAVAE_DIT, VAVAE_SIT, VAVAE_REPA name checkouts."""

import argparse
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vavae_fast.errors import BadInput
from vavae_kernels import patch

pytest.importorskip("diffusers", reason="pip install diffusers: patch() is tested on its models")
from benchmarks.patched import REHEARSED, STEPS, example

EXAMPLES = Path(__file__).parents[2] / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")
QUICK = ("--batch", "2", "--backend", "eager", "--quick", "--device", "cpu")
REPOSITORIES = {"patch_dit": "VAVAE_DIT", "patch_sit": "VAVAE_SIT", "patch_repa": "VAVAE_REPA"}

shared = example("before_after")


def checkout(script: str) -> str:
    root = os.environ.get(REPOSITORIES[script])
    if not root:
        pytest.skip(f"set {REPOSITORIES[script]} to a checkout of the public repository")
    return root


def printed(script: str, monkeypatch, capsys, *words: str) -> str:
    """What a script prints."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    example(script).main()
    return capsys.readouterr().out


def shows_both_ways(text: str) -> bool:
    """It has compared results, and timed every way."""
    return "same in float32: outputs within" in text and all(re.search(rf"^  {way} +[\d.]+ ms", text, re.MULTILINE) for way in shared.WAYS)


# the scripts


def test_diffusers(monkeypatch, capsys):
    text = printed("patch_diffusers", monkeypatch, capsys, "--model", "DiT-tiny", *QUICK)
    assert "2 x fused: attention" in text.splitlines() and shows_both_ways(text)


@pytest.mark.parametrize("name, fused", [("PixArt-tiny", {"norm_modulate", "attention"}), ("SD3-tiny", {"norm_modulate", "gate_add_norm_modulate"})])
def test_other_transformers_of_diffusers(name, fused):
    """In float32, and in the bfloat16 that a GPU is compared and timed in."""
    module = example("patch_diffusers")
    model = module.build(name)
    before = shared.twin(model)
    assert {line[7:] for line in patch(model).report.values() if line.startswith("fused: ")} == fused
    assert len(list(shared.check(before, model, module.inputs(model, 2), (None, torch.bfloat16)))) == 2


@pytest.mark.parametrize("script", REPOSITORIES)
def test_public_repositories(script, monkeypatch, capsys):
    text = printed(script, monkeypatch, capsys, "--repository", checkout(script), "--model", "tiny", *QUICK)
    assert "2 x fused: gate_add_norm_modulate" in text.splitlines() and shows_both_ways(text)


def test_single_operators(monkeypatch, capsys):
    text = printed("single_operators", monkeypatch, capsys)
    assert "block: same in float32" in text and "EMA of layer.weight, layer.bias" in text


def test_a_patched_model_that_computes_something_else_is_found_out(monkeypatch):
    before = nn.Sequential(nn.Linear(32, 32), nn.SiLU())
    after = shared.twin(before)
    inputs = dict(input=torch.randn(2, 4, 32))
    assert len(list(shared.check(before, after, inputs, (None, torch.bfloat16)))) == 2
    monkeypatch.setattr(after[0], "forward", lambda x: before[0](x) * 1.05)
    for dtype in (None, torch.bfloat16):
        with pytest.raises(AssertionError, match="outputs in .* differ by 0.0"):
            list(shared.check(before, after, inputs, (dtype,)))
    assert after[0].weight is before[0].weight, "both hold the same parameters"


# weights


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))


def test_a_checkpoint_gives_its_ema_under_present_names(tmp_path):
    """As REPA's older checkpoints: a training state with its command line, the later blocks counted from zero."""
    state = {key: torch.full_like(value, float(n)) for n, (key, value) in enumerate(Layer().state_dict().items())}
    ema = {key.replace("blocks.8", "decoder_blocks.0"): value for key, value in state.items()}
    torch.save(dict(model={}, ema=ema, args=argparse.Namespace(lr=1e-4)), tmp_path / "0400000.pt")
    found = shared.with_weights(Layer(), tmp_path / "0400000.pt", rename=example("patch_repa").present_name).state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    with pytest.raises(BadInput, match="missing.*nothing was loaded"):
        shared.with_weights(Layer(), tmp_path / "0400000.pt")


def test_without_a_checkpoint_nothing_is_zero():
    layer = Layer()
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    assert all(parameter.any() for parameter in shared.with_weights(layer, None).parameters())


@pytest.mark.parametrize("script", REPOSITORIES)
def test_weights_of_a_public_repository(script, tmp_path):
    module, root = example(script), Path(checkout(script))
    model = shared.with_weights(module.build(root, "tiny"), None)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = shared.with_weights(module.build(root, "tiny"), tmp_path / "weights.pt")
    inputs = module.inputs(model, 2)
    patch(again)
    for ours, theirs in zip(shared.outputs(again(**inputs)), shared.outputs(model(**inputs)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_weights_of_diffusers(tmp_path):
    module = example("patch_diffusers")
    model = module.build("DiT-tiny")
    model.save_pretrained(tmp_path)
    inputs = module.inputs(model, 2)
    again = module.build("of no use", tmp_path)
    patch(again)
    torch.testing.assert_close(again(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)


# what a user may get wrong


@pytest.mark.parametrize(
    "script, words, message",
    [
        ("patch_dit", ("--repository", "nowhere"), "error: --repository nowhere: it has no models.py; give the folder of a checkout"),
        ("patch_repa", ("--repository", "nowhere"), "error: --repository nowhere: it has no models/sit.py; give the folder of a checkout"),
        ("patch_diffusers", ("--model", "DiT-XS"), "error: --model DiT-XS: unknown; known: DiT-XL/2, PixArt-XL/2, SD3-medium, "),
        ("patch_diffusers", ("--checkpoint", "nowhere"), "error: --checkpoint nowhere: no config.json there; "),
    ],
)
def test_bad_input_is_one_line(script, words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as ended:
        shared.run(example(script).main)
    assert ended.value.code.startswith(message) and "\n" not in ended.value.code


# the page


def commands() -> list[str]:
    return re.findall(r"^python examples/(\S.*)$", README, re.MULTILINE)


class Parsed(Exception):
    pass


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_page_parse(command, monkeypatch):
    script, *words = command.split()
    if script == "single_operators.py":
        return  # it takes none, and runs above
    module = example(script.removesuffix(".py"))

    def parsed(*arguments):
        raise Parsed

    monkeypatch.setattr(module, "build", parsed)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(Parsed):
        module.main()


def test_code_of_the_page_is_code_that_runs():
    """Every line of its Python stands in a script, in this order; patch and its report are in the first block."""
    first, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = nn.Sequential(nn.RMSNorm(4, eps=1e-6))
    names = dict(model=model)
    exec(first, names)
    assert names["handle"].report == {"0": "fused: rms_norm"}
    source = [line.strip() for line in (EXAMPLES / "single_operators.py").read_text(encoding="utf-8").splitlines()]
    for block in others:
        wanted = block.strip().splitlines()
        starts = [n for n, line in enumerate(source) if line == wanted[0]]
        assert any(source[n : n + len(wanted)] == wanted for n in starts), block


def test_the_page_names_what_is_there():
    for script in set(re.findall(r"\w+\.py", README)) - {"train.py"}:
        assert (EXAMPLES / script).is_file(), script
    for step in STEPS:
        assert f"{step.size}, {step.batch} |" in README, step.name


# the benchmark


def test_the_bench_compares_the_same_model():
    """Its ways hold the same parameters, give the same, and the fused one calls the operators."""
    step = next(step for step in REHEARSED if step.variable is None)
    assert step.lacking(CPU, None) is None
    makers = step.makers(CPU, argparse.Namespace(backend="eager"))
    assert set(makers) == set(shared.WAYS)
    (plain, *_), _ = makers["eager"]()()
    call = makers["fused"]()
    (ours, *_), _ = call()
    torch.testing.assert_close(ours, plain, rtol=0.1, atol=0.05)  # under autocast to bf16
    processors = [module.processor for module in call.model.modules() if hasattr(module, "processor")]
    assert {type(processor).__name__ for processor in processors} == {"BackendProcessor"}


def test_the_bench_says_what_it_lacks(monkeypatch):
    monkeypatch.delenv("VAVAE_DIT", raising=False)
    step = next(step for step in STEPS if step.variable == "VAVAE_DIT")
    assert step.lacking(CPU, None) == "VAVAE_DIT names no checkout of its public repository"


def test_faster_is_against_the_same_way():
    facts = STEPS[0].facts({"eager": 4.0, "fused": 2.0, "compiled blocks": 3.0, "fused, compiled blocks": 2.0})
    assert facts["faster"] == {"fused": 2.0, "fused, compiled blocks": 1.5} and facts["images_per_second"]["eager"] == 16
