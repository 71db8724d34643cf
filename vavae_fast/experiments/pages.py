"""What is left of an experiment: results.json and report.html, ours beside the paper's; and one overview of all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vavae_fast import artifacts
from vavae_fast.commands import _html
from vavae_fast.experiments.experiment import Claim, Results
from vavae_fast.experiments.scale import Scale
from vavae_fast.experiments.stages import LightningDiT
from vavae_fast.experiments.summary import NOTE, markdown, summary, told
from vavae_fast.experiments.work import Lab, Work, in_order

_QUICK = "This was a quick run of a few steps, to see that everything works: its numbers mean nothing."
_APART = "The two halves of this table were measured on different images by different judges: compare directions within a half, never across."


def write(results: Results) -> Path:
    """<out>/<experiment>/results.json and report.html."""
    folder = results.lab.out / results.experiment.name
    artifacts.write_json(folder / "results.json", as_json(results))
    sections = [
        ("What is looked at", _html.paragraph(results.experiment.look_at)),
        ("Scores", score_table(results)),
        ("The paper's claims, and what is seen here", verdict_table([results])),
        *results.experiment.sections(results),
        *_samples(results),
        ("Arms", _arms(results)),
    ]
    title = f"{results.experiment.title} ({results.scale.name} scale)"
    artifacts.write_text(folder / "report.html", _html.page(title, sections))
    return folder / "report.html"


def as_json(results: Results) -> dict[str, Any]:
    """By arm and seed scores, and the work behind them with seconds and versions; verdicts."""
    arms = {}
    for name, over_seeds in results.arms.items():
        arms[name] = [dict(scores=scores, work=[_told(results, work) for work in in_order(list(works))])
                      for works, scores in zip(over_seeds, results.scores(name))]  # fmt: skip
    verdicts = [_verdict(results, claim) for claim in results.experiment.claims(results.scale)]
    facts = dict(experiment=results.experiment.name, scale=results.scale.name, quick=results.scale.quick, protocol=results.scale.says)
    return artifacts.manifest("experiment", **facts, arms=arms, verdicts=verdicts, findings=results.experiment.findings(results))


def _told(results: Results, work: Work) -> dict[str, Any]:
    done = results.lab.result(work)
    if done is None:
        return dict(key=work.key, error=results.failed.get(work.key, "what it needs failed"))
    return dict(key=work.key, seconds=done["seconds"], cpu_seconds=done["cpu_seconds"], versions=done["versions"], time=done["time"])


def _verdict(results: Results, claim: Claim) -> dict[str, Any]:
    """At the end, and after the first mark's steps."""
    facts = dict(claim=claim.says, better=claim.better, worse=claim.worse, score=claim.score.key)
    at_end, early = results.verdict(claim), results.verdict(claim, results.scale.marks[0])
    early_told = dict(steps=results.scale.marks[0], differences=early.differences, seen=early.seen)
    return facts | dict(differences=at_end.differences, seen=at_end.seen, early=early_told)


def score_table(results: Results) -> str:
    """An arm a row: our columns, then the paper's, in columns of their own."""
    scale, scores = results.scale, results.experiment.scores(results.scale)
    paper = results.experiment.paper(scale)
    theirs = [f"paper: {column}" for column in paper.columns] if paper else []
    rows: list[tuple[Any, ...]] = [("arm", *(f"here: {score.title}" for score in scores), *theirs)]
    for arm in results.arms:
        beside = (paper.rows.get(arm) or (None,) * len(theirs)) if paper else ()
        rows.append((arm, *(results.cell(arm, score) for score in scores), *beside))
    seeds = max(map(len, results.arms.values()), default=0)
    notes = [f"Here: mean ± standard deviation over {seeds} seeds. " if seeds > 1 else "Here: one seed. ", scale.says]
    notes += [f" The paper: {paper.where}. {paper.note}"] if paper else []
    warning = ([_QUICK] if scale.quick else []) + ([_APART] if paper else [])
    return "".join(map(_html.paragraph, warning)) + _html.table(rows) + _html.paragraph("".join(notes)) + _findings(results)


def _findings(results: Results) -> str:
    return "".join(map(_html.paragraph, results.experiment.findings(results)))


def verdict_table(several: Sequence[Results]) -> str:
    """A claim a row: what is seen early and at the end, with the differences of each seed."""
    early = next((results.scale.marks[0] for results in several), 0)
    rows = [("claim of the paper", f"after {early:,} steps", "at the end", "by", "compared")]
    for results in several:
        for claim in results.experiment.claims(results.scale):
            verdicts = (told(results.verdict(claim, early)), told(results.verdict(claim)))
            rows.append((claim.says, *verdicts, claim.score.title, f"{claim.better} over {claim.worse}"))
    return _html.table(rows) + _html.paragraph(NOTE) if len(rows) > 1 else _html.paragraph("The paper makes no claim of this kind.")


def _samples(results: Results) -> list[tuple[str, str]]:
    """The first images of each arm's last samples, first seed."""
    from vavae_fast.evaluation import read_samples

    size = results.scale.images.size
    count, enlarged = (20, 4) if size <= 32 else (4, 1)
    figures = ""
    for name, over_seeds in results.arms.items():
        work = over_seeds[0][0]
        if isinstance(work, LightningDiT) and results.lab.result(work) is not None:
            images, _ = read_samples(work.samples_folder(results.lab, work.marks[-1]) / "samples.npz", count)
            figures += _html.figure(_html.png_grid(images.permute(0, 2, 3, 1).numpy(), count, max(1, enlarged * 8 // size), name), name)
    return [("Samples without guidance, first seed", figures)] if figures else []


def _arms(results: Results) -> str:
    rows = [("arm", "seed", "kept in arms/", "seconds", "CPU seconds", "of what it needs")]
    for name, over_seeds in results.arms.items():
        for seed, works in enumerate(over_seeds):
            for work in works:
                done, needed = results.lab.result(work), ", ".join(other.key for other in in_order([work])[:-1])
                spent = (f"{done['seconds']:.0f}", f"{done['cpu_seconds']:.0f}") if done else ("failed", "–")
                rows.append((name, str(seed), work.key, *spent, needed))
    facts = "Every folder holds result.json with all facts of its arm, the run folder with its curves (report.html there), and samples."
    return _html.table(rows) + _html.paragraph(facts)


def write_overview(lab: Lab, scale: Scale, planned: Sequence[Any], failed: Mapping[str, str]) -> Path:
    """<out>/report.html of all experiments asked for, and summary.md and summary.json: claim, what is seen, scale, seeds, spread."""
    several = [Results(one.experiment, scale, lab, one.arms, failed) for one in planned if one.needs is None]
    pages = [("experiment", "page")] + [(r.experiment.title, f"{r.experiment.name}/report.html") for r in several]
    lacking = "".join(_html.paragraph(f"{one.experiment.name}: {one.needs}") for one in planned if one.needs)
    facts = _html.paragraph(scale.says) + (_html.paragraph(_QUICK) if scale.quick else "")
    sections = [("Claims", verdict_table(several) + facts), ("Pages", _html.table(pages) + lacking)]
    found = summary(several, scale)
    artifacts.write_json(lab.out / "summary.json", found)
    artifacts.write_text(lab.out / "summary.md", markdown(found) + "\n")
    artifacts.write_text(lab.out / "report.html", _html.page(f"The paper in miniature: {scale.name} scale", sections))
    return lab.out / "report.html"
