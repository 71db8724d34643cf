"""Scores of arms over seeds: means, spreads, verdicts, the speed-up, and what stands on the pages."""

import json
import math
from html import escape
from pathlib import Path

import pytest

from vavae_fast.experiments import catalogue, pages
from vavae_fast.experiments.convergence import speed_up, speed_ups
from vavae_fast.experiments.experiment import Claim, Results
from vavae_fast.experiments.runner import plan_experiments
from vavae_fast.experiments.summary import markdown, summary
from vavae_fast.experiments.work import Lab


def kept(lab: Lab, work, scores: dict) -> None:
    """Work as `perform` leaves it, with made-up scores."""
    lab.folder(work).mkdir(parents=True, exist_ok=True)
    told = dict(scores=scores, seconds=1.0, cpu_seconds=1.0, versions={}, time="")
    (lab.folder(work) / "result.json").write_text(json.dumps(told))


@pytest.fixture
def results(scales, tmp_path) -> Results:
    """convergence with two seeds: aligned arms halve their score with every mark, the others lag by a factor of two; one seed reversed at d64."""
    scale, lab = scales["demo"], Lab(tmp_path)
    (planned,) = plan_experiments([catalogue.experiment("convergence")], scale, [0, 1])
    for name, over_seeds in planned.arms.items():
        for seed, (arm,) in enumerate(over_seeds):
            lag = 2 if ("no VF" in name) != (seed == 1 and "d64" in name) else 1
            kept(lab, arm, {str(mark): dict(frechet=lag * 4000 / mark + seed, agreement=0.9) for mark in scale.marks})
            kept(lab, arm.latents.tokenizer, dict(psnr=20.0, rfrechet=3.0))
    return Results(planned.experiment, scale, lab, planned.arms)


def test_means_and_spreads_are_over_seeds(results):
    frechet = results.scale.judge.generation[0]
    assert results.values("d16, no VF", "frechet") == [20.0, 21.0] and results.mean("d16, no VF", "frechet", 100) == 80.5
    assert results.cell("d16, no VF", frechet) == "20.5 ± 0.7"
    assert results.cell("d16, no VF", results.scale.judge.generation[1]) == "90.0 ± 0.0", "shown in percent"
    assert results.cell("d16, no VF", frechet, 200) == "40.5 ± 0.7" and results.values("d16, no VF", "psnr") == [20.0, 20.0]


def test_verdicts(results):
    """Lower is better: both seeds agree at d16; at d64 they do not."""
    at16, at64 = map(results.verdict, results.experiment.claims(results.scale))
    assert at16.differences == (10.0, 10.0) and at16.seen == "seen"
    assert at64.differences == (10.0, -10.0) and at64.seen.startswith("not clear")
    frechet = results.scale.judge.generation[0]
    early = results.verdict(at16.claim, 100)
    assert early.seen == "seen" and early.differences != at16.differences
    assert results.verdict(at16.claim, 150).seen == "–", "no arm was scored there"
    turned = results.verdict(Claim("", at16.claim.worse, at16.claim.better, frechet))
    assert turned.differences == (-10.0, -10.0) and turned.seen == "the opposite is seen"


def test_an_arm_that_failed_has_no_scores(results):
    """It is named in the table, the verdict uses the other seed, and the JSON says why."""
    (arm,) = results.arms["d16, no VF"][1]
    (results.lab.folder(arm) / "result.json").unlink()
    failed = Results(results.experiment, results.scale, results.lab, results.arms, {arm.key: "not finite"})
    assert failed.scores("d16, no VF")[1] is None and failed.values("d16, no VF", "frechet") == [20.0]
    assert failed.verdict(failed.experiment.claims(failed.scale)[0]).seen == "seen, one seed"
    (other,) = results.arms["d16, no VF"][0]
    (results.lab.folder(other) / "result.json").unlink()
    assert failed.cell("d16, no VF", failed.scale.judge.generation[0]) == "failed"
    assert failed.verdict(failed.experiment.claims(failed.scale)[0]).seen == "failed"
    told = pages.as_json(failed)["arms"]["d16, no VF"][1]
    assert told["scores"] is None and [w["error"] for w in told["work"] if w["key"] == arm.key] == ["not finite"]


def test_speed_up_is_interpolated_over_log_steps():
    slow = [(100, 80.0), (200, 40.0), (400, 20.0)]
    assert speed_up(slow, [(100, 40.0), (200, 20.0), (400, 10.0)]) == pytest.approx(2)
    assert speed_up(slow, [(100, 30.0), (200, 10.0)]) == pytest.approx(400 / (100 * math.sqrt(2)))
    assert speed_up(slow, slow) == pytest.approx(1) and speed_up(slow, [(100, 90.0), (400, 30.0)]) is None
    assert speed_up(slow, [(100, 15.0), (400, 10.0)]) == 4, "a lower bound: there at its first mark"


def test_convergence_finds_the_factor_it_was_made_with(results):
    found = speed_ups(results, 16)
    assert found == [pytest.approx(2), pytest.approx(2)]
    lines = results.experiment.findings(results)
    assert "2.00 times sooner" in lines[0] and "2.54 times (Figure 4)" in lines[0]


def test_the_page_keeps_ours_and_the_papers_apart(results):
    table = pages.score_table(results)
    assert "here: Fréchet, of pixels" in table and "paper: speed-up at equal FID" in table and "Figure 4" in table
    assert "20.5 ± 0.7" in table and "2.54" in table and "stand" in table.lower(), "every table names its stand-ins"


@pytest.mark.parametrize("name", sorted(set(catalogue.NAMES) - {"latents"}))  # that one draws latents, which must be there
def test_every_page_is_written_from_scores(scales, tmp_path, monkeypatch, name):
    """With made-up scores: plots, findings, verdicts and JSON of each experiment, at each scale that it is for."""
    monkeypatch.setattr(pages, "_samples", lambda results: [])  # there are no images
    for scale in scales.values():
        experiment = catalogue.experiment(name)
        if experiment.needs(scale):
            continue
        lab = Lab(tmp_path / scale.name)
        (planned,) = plan_experiments([experiment], scale, [0, 1])
        for number, work in enumerate(planned.works(), 1):
            keys = [score.key for score in (*scale.judge.reconstruction, *experiment.scores(scale), *scale.judge.generation)]
            scores = dict.fromkeys(keys, 1 + 1 / number)
            kept(lab, work, scores | {str(mark): scores for mark in getattr(work, "marks", ())} | {"final": scores})
        page = pages.write(Results(experiment, scale, lab, planned.arms)).read_text()
        assert all(escape(arm) in page for arm in planned.arms) and "here: " in page and "failed" not in page
        assert experiment.paper(scale) is None or "paper: " in page
        told = json.loads((lab.out / name / "results.json").read_text())
        assert len(told["verdicts"]) == len(experiment.claims(scale)) and all(len(v["differences"]) == 2 for v in told["verdicts"])
        overview = pages.write_overview(lab, scale, [planned], {})
        assert f"{name}/report.html" in overview.read_text()


def test_summary_is_a_table_of_claims(results):
    lines = markdown(summary([results], results.scale)).splitlines()
    assert lines[2] == "| convergence | aligned d16 is ahead | Fréchet, of pixels | seen (+40.0, +40.0) | seen (+10.0, +10.0) | demo | 2 |"
    assert len(lines) == 4 and all(line.count("|") == 8 for line in lines)


def test_json_is_complete(results, tmp_path: Path):
    told = json.loads(json.dumps(pages.as_json(results), allow_nan=False))
    assert told["experiment"] == "convergence" and told["scale"] == "demo" and set(told["arms"]) == set(results.arms)
    work = told["arms"]["d64, no VF"][1]["work"]
    assert {w["key"].split("-")[0] for w in work} == {"classifier", "tokenizer", "latents", "lightningdit"}
    assert [v["seen"] for v in told["verdicts"]][0] == "seen" and told["versions"]["vavae_fast"]
