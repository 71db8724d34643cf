"""Laws over all experiments at all scales: their arms, claims and tables name the same things, and every config loads."""

from pathlib import Path

import pytest

import vavae_fast.experiments
from vavae_fast.experiments import catalogue, paper, scales
from vavae_fast.experiments.experiment import Experiment
from vavae_fast.experiments.ladder import RUNGS
from vavae_fast.experiments.runner import all_works, plan_experiments, seconds_left
from vavae_fast.experiments.scale import Files
from vavae_fast.experiments.stages import Latents, LightningDiT
from vavae_fast.experiments.work import Lab
from vavae_fast.parsing import flatten

ROOT = Path(__file__).parents[2]


def test_every_experiment_is_in_the_catalogue():
    folder = Path(vavae_fast.experiments.__file__).parent
    files = {path.stem.replace("_", "-") for path in folder.glob("*.py") if "\nEXPERIMENT = " in path.read_text()}
    assert files == set(catalogue.NAMES) and set(scales.SCALES) == set(catalogue.SCALES)
    for name in catalogue.NAMES:
        found = catalogue.experiment(name)
        assert isinstance(found, Experiment) and found.name == name and found.title and found.look_at


@pytest.mark.parametrize("name", catalogue.NAMES)
@pytest.mark.parametrize("scale", catalogue.SCALES)
def test_an_experiment_is_whole(scales, scale, name):
    """Same arms for every seed; claims and the paper's rows name arms; a row of the paper has a value a column; all configs load."""
    scale, experiment = scales[scale], catalogue.experiment(name)
    if experiment.needs(scale):
        assert scale.name not in experiment.needs(scale) or name == "unlabeled"
        return
    first, second = experiment.arms(scale, 0), experiment.arms(scale, 1)
    assert list(first) == list(second) and len(first) >= 2
    scores = {score.key for score in experiment.scores(scale)}
    for claim in experiment.claims(scale):
        assert claim.better in first and claim.worse in first and claim.better != claim.worse and claim.score.key in scores, claim
    if table := experiment.paper(scale):
        assert set(table.rows) <= set(first), set(table.rows) - set(first)
        assert all(row is None or len(row) == len(table.columns) for row in table.rows.values()) and any(table.rows.values())
    planned = plan_experiments([experiment], scale, [0, 1])
    keys = [work.key for work in all_works(planned)]
    assert len(keys) == len(set(keys)) and [w.key for w in planned[0].works() if w.key not in keys] == []


def test_one_scale_at_least_has_all_that_an_experiment_needs(scales):
    for name in catalogue.NAMES:
        assert any(catalogue.experiment(name).needs(scale) is None for scale in scales.values()), name


def test_experiments_share_arms(scales):
    """The tokenizers with and without VF at the middle width are trained once for all."""
    used = {}
    for name in catalogue.NAMES:
        for one in plan_experiments([catalogue.experiment(name)], scales["demo"], [0]):
            for work in one.works():
                used.setdefault(work.key, set()).add(name)
    shared = {"dilemma", "vf-ablation", "foundation-models", "convergence", "scaling", "uniformity"}
    arm = scales["demo"].arm(0, scales["demo"].middle, "contrastive")
    assert shared <= used[arm.key] and shared | {"paths", "vf-sweep", "latents"} <= used[arm.latents.key]


def test_demo_fits_three_hours_on_two_cores(scales, tmp_path):
    """By the measured rates, with both seeds."""
    planned = plan_experiments([catalogue.experiment(name) for name in catalogue.NAMES], scales["demo"], [0, 1])
    assert 3600 < seconds_left(Lab(tmp_path), all_works(planned)) < 2 * 3 * 3600
    assert seconds_left(Lab(tmp_path), [scales["cifar"].arm(0, 32, None)]) is None, "no invented time"


def test_every_rung_is_one_line_from_the_one_before(scales):
    """Of the config where a rung says so; of the tokenizer for the last; of the budget where the batch is four times as large."""
    for scale in scales.values():
        arms = catalogue.experiment("ladder").arms(scale, 0)
        assert list(arms) == list(paper.TABLE_1) == list(RUNGS) and len(arms) == 10
        configs = [flatten(arm.facts()["config"]) for arm in arms.values()]
        for (name, arm), before, after in zip(list(arms.items())[1:], configs, configs[1:]):
            changed = {key for key in {**before, **after} if before.get(key) != after.get(key)}
            line = {word.partition("=")[0] for word in RUNGS[name]}
            if name == "+ batch x4, lr x2":
                line = {"train.global_batch_size", "optimizer.lr", "train.max_steps"}
                assert [after[key] / before[key] for key in ("train.global_batch_size", "optimizer.lr")] == [4, 2]
                assert 4 * after["train.max_steps"] == before["train.max_steps"], "as many images"
            if name == "+ patch 1, VA-VAE":
                shape = "model.model_type" if scale.name == "imagenet" else "model.patch_size"
                line = {shape, "model.in_chans", "vae.downsample_ratio"}
                assert arm.latents.tokenizer.foundation is not None
            assert changed == line, (scale.name, name, changed)
        seen = {arm.latents.key for arm in list(arms.values())[:-1]}
        assert len(seen) == 1, "nine rungs on one set of latents"


def test_cifar_and_imagenet_say_what_they_need():
    for scale, given, culprit in (
        (scales.cifar, Files(), "--data: missing"),
        (scales.cifar, Files("nowhere"), "--data: nowhere does not exist"),
        (scales.imagenet, Files(str(ROOT)), "--valid: missing"),
        (scales.imagenet, Files(str(ROOT), str(ROOT)), "--inception: missing"),
    ):
        with pytest.raises(ValueError, match=culprit):
            scale(ROOT / "configs", given, 1.0, False)


def test_a_budget_scales_all_steps(scales):
    half = scales_of(0.5)
    assert half.marks == tuple(mark // 2 for mark in scales["demo"].marks)
    assert half.steps * 2 == scales["demo"].steps and half.perceptual.steps * 2 == scales["demo"].perceptual.steps


def scales_of(budget: float):
    return scales.demo(ROOT / "configs", Files(), budget, False)


def test_the_papers_tables_agree_where_they_repeat_each_other():
    """Tables 4, 5 and 6 hold rows of Table 2, typed apart from it."""
    for of in (None, "mae", "dinov2"):
        assert paper.TABLE_2[32, of][:5] == paper.TABLE_4[of]
        assert all(paper.TABLE_6[width, of][-1] == paper.TABLE_2[width, of][4] for width in (32, 64))
    assert paper.TABLE_5["none"] == paper.TABLE_4[None] and paper.TABLE_5["full"] == paper.TABLE_4["dinov2"]


def test_unlabeled_latents_are_of_other_images(scales):
    """The tokenizer is shared, its latents are not."""
    arms = catalogue.experiment("unlabeled").arms(scales["demo"], 0)
    labels, none = arms["labels, no VF"], arms["no labels, no VF"]
    assert isinstance(labels, LightningDiT) and isinstance(none, LightningDiT) and isinstance(none.latents, Latents)
    assert labels.latents.tokenizer.key == none.latents.tokenizer.key and labels.latents.key != none.latents.key and not none.labelled
