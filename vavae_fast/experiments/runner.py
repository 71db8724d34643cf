"""From experiments to pages: their work once each, in processes side by side; what is done stays done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vavae_fast import artifacts
from vavae_fast.errors import BadInput
from vavae_fast.experiments import pages
from vavae_fast.experiments.experiment import Experiment, Results
from vavae_fast.experiments.pool import Done, Task, run_tasks
from vavae_fast.experiments.scale import Scale
from vavae_fast.experiments.stages import LightningDiT, Tokenizer
from vavae_fast.experiments.work import Lab, Work, in_order, perform


@dataclass(frozen=True)
class Planned:
    """An experiment with its arms, a list over seeds each; or why it is not for this scale."""

    experiment: Experiment
    arms: Mapping[str, Sequence[tuple[Work, ...]]]
    needs: str | None = None

    def works(self) -> list[Work]:
        return in_order([work for over_seeds in self.arms.values() for works in over_seeds for work in works])


def plan_experiments(experiments: Sequence[Experiment], scale: Scale, seeds: Sequence[int]) -> list[Planned]:
    """`BadInput` where a config of an arm does not load."""
    planned = []
    for experiment in experiments:
        needs = experiment.needs(scale)
        by_seed = [] if needs else [experiment.arms(scale, seed) for seed in seeds]
        arms = {name: [_together(of[name]) for of in by_seed] for name in by_seed[0]} if by_seed else {}
        planned.append(Planned(experiment, arms, needs))
    for work in all_works(planned):
        if isinstance(work, Tokenizer | LightningDiT):
            work.check()
    return planned


def _together(arm: Work | tuple[Work, ...]) -> tuple[Work, ...]:
    return arm if isinstance(arm, tuple) else (arm,)


def all_works(planned: Sequence[Planned]) -> list[Work]:
    """The work of all, each once, a seed after the other, so that everything has been seen once before it is seen again."""
    arms = [over_seeds for one in planned for over_seeds in one.arms.values()]
    return in_order([work for k in range(max(map(len, arms), default=0)) for over_seeds in arms for work in over_seeds[k]])


def seconds_left(lab: Lab, works: Sequence[Work]) -> float | None:
    """CPU seconds of the work that is not done, predicted; None where this scale has no rates."""
    left = [work.cpu_seconds for work in works if lab.result(work) is None]
    return None if None in left else sum(left)


def run_experiments(lab: Lab, scale: Scale, planned: Sequence[Planned], processes: int) -> Path:
    """Do what is not done, write each experiment's page when its work is, and the overview. `BadInput` at the end where work failed."""
    works = all_works(planned)
    todo = [work for work in works if lab.result(work) is None]
    missing, failed = {work.key for work in todo}, {}
    open_pages = {one.experiment.name: one for one in planned if one.needs is None}

    def write_pages() -> None:
        for name, one in list(open_pages.items()):
            if not missing & {work.key for work in one.works()}:
                pages.write(Results(one.experiment, scale, lab, one.arms, failed))
                print(f"reproduce  {name}: {lab.out / name / 'report.html'}", flush=True)
                del open_pages[name]

    def finished(done: Done) -> None:
        missing.discard(done.name)
        said = f"reproduce  {len(todo) - len(missing)}/{len(todo)}  {done.name} done in {done.seconds:.0f} s"
        left = seconds_left(lab, [work for work in todo if work.key in missing])
        print(said + ("" if left is None else f", about {left / processes / 60:.0f} min left"), flush=True)
        write_pages()

    def arm_failed(name: str, error: BadInput) -> None:
        failed[name] = str(error)
        print(f"reproduce  {name} failed: {error}", flush=True)

    tasks = [Task(work.key, tuple(other.key for other in work.needs() if other.key in missing), perform, (lab, work)) for work in todo]
    write_pages()
    run_tasks(tasks, processes, finished, arm_failed)
    for one in open_pages.values():  # of those with an arm that failed
        pages.write(Results(one.experiment, scale, lab, one.arms, failed))
    overview = pages.write_overview(lab, scale, planned, failed)
    if failed:
        lines = "; ".join(f"{key}: {line}" for key, line in failed.items())
        raise BadInput(f"{lab.out}: {len(failed)} of {len(works)} pieces of work failed, the others are done: {lines}; the same command tries again")
    artifacts.sync(lab.out)
    return overview
