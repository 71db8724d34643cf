"""Work: kept by the hash of what it is a function of, done once, continued after a kill."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from vavae_fast import artifacts
from vavae_fast.errors import BadInput
from vavae_fast.experiments.scale import Files
from vavae_fast.experiments.scales import demo
from vavae_fast.experiments.work import Lab, Work, given_keys, in_order, perform

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Counted(Work):
    """Appends a line to its folder each time that it is done; fails while `fails` is set."""

    kind = "counted"
    number: int
    of: tuple[Work, ...] = ()
    fails: bool = False
    cpu_seconds: float | None = 1.0

    def needs(self):
        return self.of

    def facts(self):
        return dict(number=self.number)

    def do(self, lab):
        with open(lab.folder(self) / "times", "a") as file:
            file.write("once\n")
        if self.fails:
            raise BadInput("told to fail")
        return dict(score=self.number)


def test_work_is_done_once_and_a_failure_leaves_no_result(tmp_path):
    lab, work = Lab(tmp_path), Counted(1)
    with pytest.raises(BadInput):
        perform(lab, replace(work, fails=True))
    assert lab.result(work) is None and replace(work, fails=True).key == work.key
    perform(lab, work)
    perform(lab, work)
    assert (lab.folder(work) / "times").read_text() == "once\nonce\n"
    found = lab.result(work)
    assert found["scores"] == {"score": 1} and found["key"] == work.key and found["seconds"] >= 0 and found["versions"]["vavae_fast"]
    (lab.folder(work) / "result.json").write_text("{")
    with pytest.raises(BadInput, match="not valid JSON"):
        lab.result(work)


def test_order_is_by_need_and_each_once():
    a, b = Counted(1), Counted(2)
    shared = Counted(3, (a, b))
    assert [work.number for work in in_order([Counted(4, (shared, Counted(1))), b, shared])] == [1, 2, 3, 4]


def test_a_key_is_a_function_of_facts_and_needs_alone():
    assert Counted(1).key == Counted(1, cpu_seconds=5.0).key != Counted(2).key
    assert Counted(3, (Counted(1),)).key != Counted(3, (Counted(2),)).key != Counted(3).key


@pytest.fixture(scope="module")
def scale():
    return demo(ROOT / "configs", Files(), 1.0, False)


def test_the_key_of_an_arm_holds_what_it_depends_on(scale):
    arm = scale.arm(0, 16, "contrastive")
    assert arm.key == demo(ROOT / "configs", Files(), 1.0, False).arm(0, 16, "contrastive").key
    others = [scale.arm(1, 16, "contrastive"), scale.arm(0, 32, "contrastive"), scale.arm(0, 16, "masked"), scale.arm(0, 16, None),
              demo(ROOT / "configs", Files(), 0.5, False).arm(0, 16, "contrastive"), replace(arm, samples=10),
              scale.lightningdit_on(arm.latents.tokenizer, "optimizer.lr=1e-4")]  # fmt: skip
    keys = {arm.key, *(other.key for other in others)}
    assert len(keys) == 1 + len(others)
    assert others[-1].latents.key == arm.latents.key, "arms that differ only in LightningDiT share their tokenizer"


def test_a_key_follows_the_config_file_but_not_the_defaults(scale, tmp_path):
    """A key that the schema gains leaves kept arms valid: only what is written is hashed."""
    text = (ROOT / "configs" / "demo.yaml").read_text()
    (tmp_path / "same.yaml").write_text(text + "\n# a comment\n")
    (tmp_path / "other.yaml").write_text(text.replace("depth: 4", "depth: 5"))
    arm = scale.arm(0, 16, None)
    assert replace(arm, config=tmp_path / "same.yaml").key == arm.key != replace(arm, config=tmp_path / "other.yaml").key
    assert "log" not in given_keys(arm.config, ())


def test_a_launcher_that_fails_is_one_line(tmp_path):
    lab = Lab(tmp_path, (os.devnull,))
    with pytest.raises(OSError):
        lab.run("train")
    with pytest.raises(BadInput, match="vavae-fast train --config none.yaml: ended with status 1"):
        Lab(tmp_path, ("false",)).run("train", "--config", "none.yaml")


def test_results_are_whole_or_absent(tmp_path, monkeypatch):
    """A kill while result.json is written leaves the work undone, and it is done again."""
    lab, work = Lab(tmp_path), Counted(7)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(artifacts.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            perform(lab, work)
    assert lab.result(work) is None
    perform(lab, work)
    assert lab.result(work)["scores"] == {"score": 7}
