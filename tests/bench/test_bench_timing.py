"""Timing: what is called compiled runs compiled, or the benchmark fails; races are fair; ratios are of the same round."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from benchmarks import operators, steps
from benchmarks.timing import FellBack, Race, compiled, fresh_dynamo

CPU = torch.device("cpu")


def double(x):
    return 2 * x


def broken(x):
    x = 2 * x
    torch._dynamo.graph_break()
    return x + 1


def test_what_compiles_passes():
    with fresh_dynamo() as dynamo:
        function = compiled(double, "eager")
        with dynamo.compiles("double"):
            function(torch.ones(3))
        dynamo.settle()
        function(torch.ones(3))
        dynamo.check()


@pytest.mark.parametrize("disabled", [lambda: torch._dynamo.config.patch(disable=True), lambda: torch.compiler.set_stance("force_eager")])
def test_a_baseline_that_is_not_compiled_fails(disabled):
    with fresh_dynamo() as dynamo, disabled():
        with pytest.raises(FellBack, match="double: torch.compile compiled no graph"):
            with dynamo.compiles("double"):
                torch.compile(double, backend="eager")(torch.ones(3))


def test_a_graph_break_fails():
    """Ours is compiled as one graph or not at all; code that compiles itself may break, and is found out."""
    with fresh_dynamo() as dynamo:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(broken, "eager")(torch.ones(3))
    with fresh_dynamo() as dynamo:
        torch.compile(broken, backend="eager")(torch.ones(3))
        with pytest.raises(FellBack, match="broke the graph"):
            dynamo.check()


def test_a_recompilation_while_timed_fails():
    with fresh_dynamo() as dynamo:
        function = compiled(double, "eager")
        function(torch.ones(3))
        dynamo.settle()
        function(torch.ones(4))
        with pytest.raises(FellBack, match="compiled 1 more graphs while they were timed"):
            dynamo.check()


def test_the_limit_of_recompilations_is_an_error_not_eager():
    with fresh_dynamo(), torch._dynamo.config.patch(recompile_limit=2):
        function = compiled(double, "eager")
        with pytest.raises(Exception, match="limit"):
            for n in range(2, 7):
                function(torch.ones(n))


def test_an_operator_whose_baseline_is_not_compiled_is_not_measured():
    case = next(case for case in operators.rehearsal_cases() if case.spec.name == "swiglu")
    with torch.compiler.set_stance("force_eager"), pytest.raises(FellBack, match="compile: torch.compile compiled no graph"):
        operators.measure(case, CPU, operators.REHEARSAL, {})


def test_a_step_whose_baseline_is_not_compiled_is_not_measured(monkeypatch):
    """One arm among others that do compile: each is asked by itself."""
    plain = steps.in_the_way_of

    def forgetful(arm, *rest):
        return plain(steps.Arm() if arm == steps.ARMS["compiled blocks"] else arm, *rest)

    monkeypatch.setattr(steps, "in_the_way_of", forgetful)
    with pytest.raises(FellBack, match="compiled blocks: torch.compile compiled no graph"):
        steps.compare(steps.rehearsal(steps.MAIN), CPU, steps.REHEARSAL)


def test_an_operator_that_is_wrong_is_not_timed(monkeypatch):
    case = next(case for case in operators.rehearsal_cases() if case.spec.name == "swiglu")
    wrong = replace(case.spec, function=lambda x12, impl: 1.5 * case.spec.function(x12, impl=impl))
    with pytest.raises(operators.Wrong, match="swiglu: out0"):
        operators.measure(replace(case, spec=wrong), CPU, operators.REHEARSAL, {})


def test_races_are_interleaved_and_ratios_are_of_one_round(monkeypatch):
    """Each round begins with another candidate; a slow minute that hits both sides leaves their ratio as it is."""
    order = []
    race = Race({name: [lambda name=name: order.append(name)] for name in "abc"}, CPU, seconds=0, warm_up=0)
    order.clear()
    for _ in range(3):
        race.round()
    assert "".join(order) == "abcbcacab"
    race.seconds = dict(a=[1.0, 10.0, 1.0], b=[2.0, 20.0, 2.0], c=[3.0, 3.0, 3.0])
    assert race.ratio("b") == 2.0 and race.timings["a"].median == 1.0 and race.timings["a"].spread == 9.0
