"""The audit: a flipped bit is named with step, process and tensor, and ends the run with 17; a sound run is not touched, and never accused.

As a script, this file makes the runs of two processes that its tests look at: `python test_audit.py FOLDER`.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from scripted import made

from vavae_fast.cli import main
from vavae_fast.distributed import World
from vavae_fast.errors import HardwareFault
from vavae_fast.training import audit
from vavae_fast.training.audit import audited, digests
from vavae_fast.training.checkpoint import load_checkpoint
from vavae_fast.training.elastic import ElasticReduction

WEIGHT = "blocks.0.attn.qkv.weight"


def flip(tensor: torch.Tensor, place: int = 5, bit: int = 3) -> None:
    """One bit of one element."""
    with torch.no_grad():
        tensor.view(torch.int32).view(-1)[place] ^= 1 << bit


def make_runs(folder: Path) -> None:
    from processes import begin, start, statuses, trained, words

    from vavae_fast.training import dit

    begin(folder)
    short = ("train.max_steps=4",)
    trained(folder, "plain", 2, *short)
    trained(folder, "audited", 2, *short, "train.audit_every=1")

    def faulty(name: str, fault) -> int:
        if os.environ["RANK"] == "1":
            fault()
        return main(words(folder, name, *short, "train.audit_every=2"))

    def wrong_gradient() -> None:
        """The second time that the audit of step 2 computes it."""
        compute, calls = dit.dit_gradients, []

        def flawed(state, *rest):
            values = compute(state, *rest)
            calls.append(1)
            if len(calls) == 3:
                flip(state.model.get_parameter(WEIGHT).grad)
            return values

        dit.dit_gradients = flawed

    def wrong_weight() -> None:
        """After step 1."""
        make = dit.dit_step

        def flawed(state, step, micro_batches):
            values = make(state, step, micro_batches)
            if step == 0:
                flip(state.optimizer.state[state.model.get_parameter(WEIGHT)]["exp_avg"])
            return values

        dit.dit_step = flawed

    for name, fault in (("gradient", wrong_gradient), ("moment", wrong_weight)):
        codes = statuses(start(2, lambda name=name, fault=fault: faulty(name, fault), folder / f"{name}.txt"))
        (folder / f"{name}.codes").write_text(str(codes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return made(__file__, tmp_path_factory.mktemp("runs") / "made")


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="several processes over gloo; on a GPU machine they would share one over NCCL")


@on_cpu
def test_a_run_with_audits_has_the_bits_of_one_without(runs):
    plain, mine = (load_checkpoint(runs / name / "checkpoints" / "step_00000004")[0] for name in ("plain", "audited"))
    assert all(torch.equal(mine[group][key], value) for group in plain for key, value in plain[group].items())


@on_cpu
def test_a_process_that_computes_wrong_is_named_and_all_leave_with_17(runs):
    said = (runs / "gradient.txt").read_text()
    assert (runs / "gradient.codes").read_text() == "[17, 17]"
    assert f"error: step 2: process 1 on {os.uname().nodename} computed the gradient of {WEIGHT} twice, and it differed; take" in said
    assert "process 0" not in said and "Traceback" not in said and "continues from the newest checkpoint" in said


@on_cpu
def test_replicas_that_differ_are_named(runs):
    """Of two nobody can tell which is right."""
    said = (runs / "moment.txt").read_text()
    assert (runs / "moment.codes").read_text() == "[17, 17]"
    assert all(f"process {rank} on {os.uname().nodename} holds another exp_avg.{WEIGHT} than its replicas" in said for rank in (0, 1))
    assert "error: step 2: " in said and "its checkpoints after step 0, up to which all agreed, may hold the same fault" in said
    assert not (runs / "moment" / "checkpoints" / "step_00000004").exists()


# -- one process, and the parts -----------------------------------------------------------------------------------------


def dit_runs(every: int | None, steps: int, wrong=None, **changes):
    from tests_of_dit import batch, state

    from vavae_fast.training.dit import dit_gradients, dit_step

    s = state(**changes)
    gradients = wrong(s, dit_gradients) if wrong else dit_gradients
    step = audited(dit_step, gradients, every, compiled=False) if every else dit_step
    values = [step(s, n, [batch(4, 8 * n), batch(4, 8 * n + 4)]) for n in range(steps)]
    return {name: t.detach().clone() for name, t in s.replicated().items()}, values


@pytest.fixture(autouse=True)
def _helpers(monkeypatch):
    """The tiny state of test_dit.py, which mirrors the module it belongs to."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("tests_of_dit", Path(__file__).with_name("test_dit.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "tests_of_dit", module)


@pytest.mark.parametrize("elastic", [False, True])
def test_no_false_alarm_and_not_a_bit_changed(elastic):
    changes = lambda: dict(reduction=ElasticReduction(World(0, 1, torch.device("cpu")), 2)) if elastic else {}
    plain, values = dit_runs(None, 12, **changes())
    mine, again = dit_runs(1, 12, **changes())
    assert plain.keys() == mine.keys() and all(torch.equal(mine[name], value) for name, value in plain.items())
    assert all(torch.equal(a[key], b[key]) for a, b in zip(values, again) for key in a)


def test_so_is_a_tokenizers():
    """Dropout, running statistics, the step at which the discriminator begins."""
    from tokenizer_states import FORM, batch, state

    from vavae_fast.models.autoencoder import AutoencoderKL
    from vavae_fast.training.tokenizer import tokenizer_gradients, tokenizer_step

    def run(step):
        torch.manual_seed(1)
        s = state(autoencoder=AutoencoderKL(**FORM, dropout=0.5), disc_start=4)
        s.optimizer = torch.optim.Adam(list(s.trained().values()), lr=1e-3, fused=True)
        for n in range(6):
            step(s, n, [batch(4, 4 * n)])
        return {name: t for group in s.groups().values() for name, t in group.items()}

    plain, mine = run(tokenizer_step), run(audited(tokenizer_step, tokenizer_gradients, 1, compiled=False))
    assert all(torch.equal(mine[name], value) for name, value in plain.items())


@pytest.mark.parametrize("what", ["gradient", "value"])
def test_one_process_names_what_differed(what):
    def wrong(s, compute):
        calls = []

        def flawed(*arguments):
            values = compute(*arguments)
            calls.append(1)
            if len(calls) == 4:
                flip(values["cos"].view(1) if what == "value" else s.model.get_parameter(WEIGHT).grad, place=0 if what == "value" else 5)
            return values

        return flawed

    with pytest.raises(HardwareFault) as caught:
        dit_runs(3, 10, wrong)
    named = "cos" if what == "value" else f"the gradient of {WEIGHT}"
    assert str(caught.value).startswith("step 6: process 0 on ") and f"computed {named} twice, and it differed" in str(caught.value)


def test_of_three_replicas_the_one_that_differs_is_named_and_shards_are_no_replicas():
    names, good, bad = ["a", "b"], [1, 2], [1, 3]
    assert audit._unlike_replicas([good, bad, good], names, 1) == [(1, "b")]
    assert audit._unlike_replicas([good, bad], names, 1) == [(0, "b"), (1, "b")]
    assert audit._unlike_replicas([good, bad], names, 2) == [] == audit._unlike_replicas([good] * 4, names, 1)
    assert audit._unlike_replicas([good, bad, good, [7, 3]], names, 2) == [(1, "a"), (3, "a")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_every_bit_counts(monkeypatch, dtype):
    """Also past the border of two pieces; the layout in memory does not."""
    monkeypatch.setattr(audit, "PIECE", 7)
    x = torch.randn(4, 5).to(dtype)
    before = digests([x, x.t().contiguous().t(), torch.ones(())])
    assert before[0] == before[1] != before[2]
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    seen = {int(before[0])}
    for place in range(20):
        for bit in range(8 * x.element_size()):
            y = x.clone()
            flat = y.view(words).view(-1)
            flat[place] ^= torch.tensor(1 << bit if bit < 8 * x.element_size() - 1 else -(1 << bit), dtype=torch.int64).to(words)
            seen.add(int(digests([y])[0]))
    assert len(seen) > 0.8 * 20 * 8 * x.element_size() and int(before[0]) in seen
    swapped = x.clone().view(-1)
    swapped[[0, 1]] = swapped[[1, 0]]
    assert dtype == torch.bool or torch.equal(swapped, x.view(-1)) or digests([swapped])[0] != before[0]


def test_the_command_line_leaves_with_17(monkeypatch, capsys):
    def fault(*_):
        raise HardwareFault("step 7: process 0 computed\nwrong")

    monkeypatch.setattr("vavae_fast.cli.run_command", fault)
    assert main(["train"]) == 17
    assert capsys.readouterr().err == "error: step 7: process 0 computed wrong\n"


if __name__ == "__main__":
    make_runs(Path(sys.argv[1]))
