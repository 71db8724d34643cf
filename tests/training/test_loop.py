"""The loop: means since the last line, checkpoints when due, a signal answered by one, and going on from there."""

import errno
import json
import os
import signal
from itertools import count, islice
from types import SimpleNamespace

import pytest
import torch
from tiny import contents

from vavae_fast.data.streams import Share
from vavae_fast.distributed import World
from vavae_fast.errors import BadInput, PeerFault
from vavae_fast.training import loop, saver
from vavae_fast.training.checkpoint import checkpoint_fault, step_folder
from vavae_fast.training.guard import Guard
from vavae_fast.training.log import RunLog
from vavae_fast.training.loop import LoopSettings, Observer, StopSignal, resume, train
from vavae_fast.training.postmortem import dissect
from vavae_fast.training.reduction import Reduction
from vavae_fast.training.saver import Retention, save_checkpoint, snapshot

ALONE = World(0, 1, torch.device("cpu"))


class Counter:
    """A state whose one weight is the sum of what it has seen."""

    def __init__(self):
        self.weight = torch.zeros((), dtype=torch.float64)
        self.guard = Guard(ALONE.device, 3)
        self.reduction = Reduction(ALONE)
        self.trained = {name: torch.nn.Parameter(torch.ones(2)) for name in ("first", "second", "third")}
        self.steps = []

    def groups(self):
        return {"model": {"weight": self.weight}, "guard": self.guard.state_dict()}

    def load_groups(self, groups, source):
        self.weight = groups["model"]["weight"].clone()
        self.guard.load_state_dict(groups["guard"])

    def replicated(self):
        return self.trained | {"moment": torch.ones(2)}

    def learning_rate(self, step):
        return 1.0 / (1 + step)


def add(state, step, micro_batches):
    state.weight += sum(micro_batches)
    state.steps.append(step)
    return {"loss": torch.tensor(float(step)), "ones": torch.ones(())}


def gradients(state, step, micro_batches):
    """Not finite in the second and third of three parameters."""
    state.reduction.begin(torch.nn.Identity(), state.trained.values(), 1)
    for p, gradient in zip(state.trained.values(), ([3.0, 4.0], [float("nan"), 1.0], [float("inf"), 1.0])):
        p.grad = torch.tensor(gradient)
    return {"loss": torch.tensor(float("nan")), "step": torch.tensor(float(step))}


def run(folder, max_steps, step=add, log_every=5, ckpt_every=4, keep_last=None, accumulation=2, peak=None, stages=None, **hooks):
    """As the commands do: resume, then train on 0, 1, 2, … two at a time."""
    state, log = Counter(), RunLog(folder, "run")
    start = resume(state, folder / "checkpoints", ALONE, log)
    log.forget_after(start)

    def batches(first):
        numbers = count(first * accumulation)
        while True:
            yield list(islice(numbers, accumulation))

    settings = LoopSettings(folder, max_steps, 8, log_every, ckpt_every, Retention(keep_last), {"stage": "test"}, peak, stages or {})
    done = train(state, step, batches, settings, ALONE, log, start, gradients, **hooks)
    log.close()
    return state, done


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder):
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())


def test_a_stage_ends_with_a_line_a_look_and_a_checkpoint(tmp_path):
    """Every line's window lies in one stage."""
    looks = []
    observer = Observer(100, lambda done: looks.append(done) or {"seen": float(done)})
    run(tmp_path, 11, stages={"first": 3, "second": 7, "third": 11}, observers=[observer])
    assert [(line["step"], line["stage"], line["loss"]) for line in logged(tmp_path)] == [
        (3, "first", 1.0), (5, "second", 3.5), (7, "second", 5.5), (10, "third", 8.0), (11, "third", 10.0)]  # fmt: skip
    assert saved(tmp_path) == [3, 4, 7, 8, 11] and looks == [3, 7, 11]
    said = (tmp_path / "log.txt").read_text()
    assert [said.count(f"stage {name}: to step {end}") for name, end in (("first", 3), ("second", 7), ("third", 11))] == [1, 1, 1]


def test_steps_logs_and_checkpoints(tmp_path):
    state, done = run(tmp_path, 11)
    assert done == 11 and state.steps == list(range(11)) and state.weight == sum(range(22))
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [5, 10, 11]
    assert [line["loss"] for line in lines] == [2.0, 7.0, 10.0], "the mean since the last line"
    assert [line["lr"] for line in lines] == [1 / 5, 1 / 10, 1 / 11], "of the step that was just made"
    assert all(line["ones"] == 1.0 and line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines)
    assert saved(tmp_path) == [4, 8, 11]
    assert {"memory_gb", "seconds", "skipped"} <= lines[0].keys()


def test_retention_reaches_the_checkpoints(tmp_path):
    run(tmp_path, 11, ckpt_every=2, keep_last=2)
    assert saved(tmp_path) == [10, 11]


def test_a_run_goes_on_where_it_was(tmp_path):
    straight, _ = run(tmp_path / "a", 10)
    run(tmp_path / "b", 6)
    state, done = run(tmp_path / "b", 10)
    assert done == 10 and state.steps == [6, 7, 8, 9] and torch.equal(state.weight, straight.weight)
    assert [line["step"] for line in logged(tmp_path / "b")] == [5, 6, 10]
    assert "continues from" in (tmp_path / "b" / "log.txt").read_text()


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    run(tmp_path, 6)
    state, done = run(tmp_path, 6)
    assert done == 6 and state.steps == [] and saved(tmp_path) == [4, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_answered_by_a_checkpoint(tmp_path, capsys, number):
    def interrupted(state, step, micro_batches):
        if step == 6:
            os.kill(os.getpid(), number)
        return add(state, step, micro_batches)

    before = signal.getsignal(number)
    state, done = run(tmp_path, 20, interrupted)
    assert done == 7 and saved(tmp_path) == [4, 7] and signal.getsignal(number) is before
    said = capsys.readouterr().out
    assert f"{number.name}: saved step 7 in {tmp_path / 'checkpoints'}; the same command continues" in said
    straight, _ = run(tmp_path / "straight", 20)
    state, _ = run(tmp_path, 20)
    assert torch.equal(state.weight, straight.weight) and state.steps[0] == 7


def test_several_processes_stop_at_the_step_they_agree_on(tmp_path, monkeypatch):
    """The signal reached another process: this one stops at the same step, and says so."""
    asked = []
    monkeypatch.setattr(World, "agree", lambda self, step, stop, fault: (asked.append(stop), len(asked) == 6)[1])
    state, done = run(tmp_path, 20)
    assert done == 6 and asked == [False] * 6 and saved(tmp_path) == [4, 6]
    assert "another process was stopped: saved step 6" in (tmp_path / "log.txt").read_text()


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before


def refusing(monkeypatch, steps):
    """A disk that is full when the checkpoints of `steps` are to be written."""
    real = saver.write_tensors

    def write(path, *rest):
        if int(path.parent.name[5:13]) in steps:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, *rest)

    monkeypatch.setattr(saver, "write_tensors", write)


def test_a_run_goes_on_without_the_checkpoints_that_found_no_room(tmp_path, monkeypatch):
    run(tmp_path / "undisturbed", 24)
    refusing(monkeypatch, {8, 12, 20})
    state, done = run(tmp_path / "full", 24)
    assert done == 24 and saved(tmp_path / "full") == [4, 16, 24] and state.steps == list(range(24))
    said = (tmp_path / "full" / "log.txt").read_text()
    assert all(f"the checkpoint of step {step} was not saved: " in said for step in (8, 12, 20))
    assert contents(tmp_path / "full" / "checkpoints" / "step_00000024", "*.safetensors") == contents(
        tmp_path / "undisturbed" / "checkpoints" / "step_00000024", "*.safetensors"
    )


def test_the_third_checkpoint_in_a_row_that_finds_no_room_ends_the_run(tmp_path, monkeypatch):
    refusing(monkeypatch, range(8, 100))
    with pytest.raises(BadInput, match="3 checkpoints in a row could not be saved: .*No space left on device"):
        run(tmp_path, 100)
    assert saved(tmp_path) == [4] and checkpoint_fault(tmp_path / "checkpoints" / "step_00000004") is None
    monkeypatch.undo()
    assert run(tmp_path, 100)[0].steps == list(range(4, 100)), "with room again it goes on where it was saved"


def test_a_damaged_checkpoint_is_stepped_over_and_made_again(tmp_path, capsys):
    straight, _ = run(tmp_path / "a", 12)
    run(tmp_path / "b", 8)
    newest = step_folder(tmp_path / "b" / "checkpoints", 8)
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    state, _ = run(tmp_path / "b", 12)
    assert state.steps == list(range(4, 12)) and torch.equal(state.weight, straight.weight)
    assert "is damaged" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "b" / "checkpoints").iterdir()) == [
        "step_00000004", "step_00000008", "step_00000008.damaged", "step_00000012",
    ]  # fmt: skip
    assert [line["step"] for line in logged(tmp_path / "b")] == [5, 10, 12], "what came after the step is logged once"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_in_silence(tmp_path):
    run(tmp_path, 8)
    for step in (4, 8):
        (step_folder(tmp_path / "checkpoints", step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="none of its 2 checkpoints is whole; bring one back, or remove the folder"):
        run(tmp_path, 12)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    """What a killed writer of another kind left: the run begins, and saves that step."""
    save_checkpoint(tmp_path / "checkpoints", 4, snapshot({"model": {"weight": torch.ones(())}}), {})
    (step_folder(tmp_path / "checkpoints", 4) / "manifest.json").unlink()
    state, _ = run(tmp_path, 5)
    assert state.steps == list(range(5)) and saved_whole(tmp_path) == [4, 5]


def saved_whole(folder):
    return sorted(int(path.parent.name[5:]) for path in (folder / "checkpoints").glob("step_????????/manifest.json"))


def test_skipped_steps_are_logged_and_too_many_end_the_run(tmp_path):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], fused=True)

    def spoilt(state, step, micro_batches):
        state.guard.step({optimizer: torch.tensor(float("nan") if step >= 3 else 1.0)})
        return add(state, step, micro_batches)

    said = r"not finite in the last 7 steps up to step 10 .*It is that of 2 of 3 parameters, second to third \(gradients\.json\)"
    with pytest.raises(BadInput, match=said):
        run(tmp_path, 20, spoilt)
    found = json.loads((tmp_path / "gradients.json").read_text())
    norms = {"first": 5.0, "second": "nan", "third": "inf"}
    assert found == {"step": 10, "values": {"loss": "nan", "step": 9.0}, "gradient_norms": norms}
    assert [line["skipped"] for line in logged(tmp_path)] == [2.0, 7.0]


def test_gradients_that_are_finite_when_computed_again_are_said_to_be(tmp_path):
    """The norm of all may overflow where none of theirs does; or a device computed wrong."""
    state, log = Counter(), RunLog(tmp_path, "run")
    values = gradients(state, 0, [])
    for scale, p in enumerate(state.trained.values()):
        p.grad = torch.full((2,), 10.0**scale)
    said = dissect(state, values, {"step": 1}, log)
    assert said == "Computed again each is finite, the largest, 141, that of third (gradients.json)"
    assert all(p.grad is None for p in state.trained.values())


def test_values_that_begin_in_the_middle_of_a_window_are_means_over_it(tmp_path):
    """The discriminator's loss is 0 before its start, and logged as such."""

    def starting(state, step, micro_batches):
        return add(state, step, micro_batches) | ({"d_loss": torch.tensor(4.0)} if step >= 3 else {})

    run(tmp_path, 10, starting, log_every=4)
    assert [line.get("d_loss") for line in logged(tmp_path)] == [1.0, 4.0, 4.0]


def test_an_observer_looks_when_it_is_due_and_leaves_the_windows_of_the_lines_alone(tmp_path):
    looked = []
    observers = [Observer(4, lambda step: looked.append(step) or {"valid_mse": step / 10}), Observer(100, lambda step: {"rare": 1.0})]
    state, _ = run(tmp_path / "a", 11, observers=observers)
    assert looked == [4, 8, 11]
    lines = logged(tmp_path / "a")
    assert [(line["step"], line.get("loss"), line.get("valid_mse"), line.get("rare")) for line in lines] == [
        (4, None, 0.4, None), (5, 2.0, None, None), (8, None, 0.8, None), (10, 7.0, None, None), (11, 10.0, 1.1, 1.0),
    ]  # fmt: skip
    alone, _ = run(tmp_path / "b", 11)
    assert torch.equal(state.weight, alone.weight)
    assert [line["loss"] for line in logged(tmp_path / "b")] == [2.0, 7.0, 10.0]


def test_the_time_that_observers_take_is_no_training_time(tmp_path, clock):
    """Every step takes a second of this clock, every look ten."""

    def slow(state, step, micro_batches):
        clock.now += 1.0
        return add(state, step, micro_batches)

    def look(step):
        clock.now += 10.0
        return {}

    run(tmp_path, 20, slow, ckpt_every=1000, observers=[Observer(3, look), Observer(5, look)], peak=32.0)
    lines = logged(tmp_path)
    assert [line["seconds"] for line in lines] == [5.0] * 4
    assert all(line["images_per_second"] == 8.0 and line["mfu"] == 0.25 for line in lines)


@pytest.mark.parametrize("wrong", [None, "again", "another's"])
def test_samples_that_are_not_this_processs_end_the_run_at_the_next_line(tmp_path, wrong):
    """Step 7 is given the batch of step 6 once more, or that of the other process."""
    share = Share(8, 1, 2, micro_batch=2)

    def batches(first):
        for step in count(first):
            source = share if (step, wrong) != (7, "another's") else Share(8, 0, 2, micro_batch=2)
            for positions in islice(source.positions(6 if (step, wrong) == (7, "again") else step), 2):
                yield SimpleNamespace(index=torch.from_numpy(positions))

    def steps(first):
        each = batches(first)
        while True:
            yield list(islice(each, 2))

    def step(state, number, micro_batches):
        state.steps.append(number)
        return {"loss": torch.ones(())}

    state, log = Counter(), RunLog(tmp_path, "run")
    settings = LoopSettings(tmp_path, 20, 8, 5, 100, Retention(), {"stage": "test"}, share=share)
    if wrong is None:
        assert train(state, step, steps, settings, ALONE, log, 3, gradients) == 20
    else:
        with pytest.raises(PeerFault, match=r"other samples than its own, in the 5 steps from step 5 of the run's order on \(their places add up"):
            train(state, step, steps, settings, ALONE, log, 0, gradients)
        assert state.steps == list(range(10)) and not (tmp_path / "checkpoints").exists()
    log.close()


def test_a_disk_that_gives_no_samples_is_named_with_them(tmp_path):
    share = Share(8, 1, 2, micro_batch=4)

    def batches(first):
        yield [SimpleNamespace(index=next(map(torch.from_numpy, share.positions(first))))]
        raise OSError(5, "Input/output error")

    settings = LoopSettings(tmp_path, 20, 8, 5, 100, Retention(), {"stage": "test"}, share=share)
    log = RunLog(tmp_path, "run")
    with pytest.raises(BadInput, match=r"^its samples of the run's order from 36 on: cannot be read \(.*Input/output error\); look after the disk"):
        train(Counter(), lambda state, number, batch: {"loss": torch.ones(())}, batches, settings, ALONE, log, 3, gradients)
    log.close()


def test_the_time_left_counts_everything_but_the_beginning(clock):
    """The first window takes 100 s a step (compilation); afterwards 1 s a step, and 5 s between windows."""
    meter = loop._Meter(8)
    paces = []
    for seconds in (100.0, 1.0, 1.0):
        for _ in range(10):
            clock.now += seconds
            meter.add({"loss": torch.ones(())})
        meter.read(ALONE)
        paces.append(meter.seconds_a_step)
        clock.now += 5.0
        meter.restart()
    assert paces == [100.0, 1.5, 1.5]


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(loop, "time", clock)
    return clock


def test_without_a_known_peak_no_utilisation_is_logged(tmp_path):
    run(tmp_path, 5)
    assert "mfu" not in logged(tmp_path)[0]


def test_what_follows_a_save_finds_the_values_and_at_the_end_the_checkpoint(tmp_path):
    """Before the end the save itself goes on in the background."""
    seen = []
    run(tmp_path, 9, log_every=4, after_save=lambda: seen.append((len(logged(tmp_path)), step_folder(tmp_path / "checkpoints", 9).exists())))
    assert seen == [(1, False), (2, False), (3, True)]


def test_means_over_processes_take_one_collective(monkeypatch):
    calls = []
    monkeypatch.setattr(World, "mean", lambda self, values: (calls.append(values.shape), values)[1])
    meter = loop._Meter(8)
    for value in (1.0, 2.0):
        meter.add({"loss": torch.tensor(value), "mse": torch.tensor(2 * value)})
    assert {k: v for k, v in meter.read(World(0, 2, torch.device("cpu"))).items() if k in ("loss", "mse")} == {"loss": 1.5, "mse": 3.0}
    assert calls == [(2,)]


def leaping(leaps):
    """A step whose loss is near 1, and 5 while its batches begin with one of `leaps`: it is the data's fault."""

    def step(state, step, micro_batches):
        state.weight += sum(micro_batches)
        state.steps.append((step, micro_batches[0]))
        return {"loss": torch.tensor(5.0 if micro_batches[0] in leaps else 1.0 + 0.01 * (step % 3))}

    return step


def spiking(tmp_path, leaps, max_rollbacks=3, max_steps=40):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Counter, "__init__", counter_with(max_rollbacks))
        return run(tmp_path, max_steps, leaping(leaps), log_every=1, ckpt_every=4, accumulation=1)


def counter_with(max_rollbacks):
    def init(self):
        self.weight, self.steps = torch.zeros((), dtype=torch.float64), []
        self.guard = Guard(ALONE.device, 3, max_rollbacks)

    return init


def test_a_leap_of_the_loss_sends_the_run_back_and_past_its_batches(tmp_path):
    state, done = spiking(tmp_path, {29})
    assert done == 40
    assert state.steps == [(n, n) for n in range(30)] + [(n, n + 2) for n in range(28, 40)], "step 30 leapt: back to 28, batches 28, 29 left out"
    assert state.weight == sum(range(28)) + sum(range(30, 42))
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, 41)) and saved(tmp_path) == list(range(4, 41, 4))
    assert (state.guard.rollbacks, state.guard.passed_over) == (1, 2)
    assert "the loss leapt to 5 at step 30: back to" in (tmp_path / "log.txt").read_text()


def test_a_run_that_went_back_resumes_as_if_never_stopped(tmp_path):
    straight, _ = spiking(tmp_path / "a", {25, 31})
    spiking(tmp_path / "b", {25, 31}, max_steps=34)
    resumed, _ = spiking(tmp_path / "b", {25, 31})
    assert straight.weight == resumed.weight and straight.guard.state_dict().keys() == resumed.guard.state_dict().keys()
    assert straight.guard.passed_over == resumed.guard.passed_over > 2 and straight.guard.losses == resumed.guard.losses


def test_a_run_that_leaps_too_often_stops_with_its_cure(tmp_path):
    with pytest.raises(BadInput, match=r"the loss leapt to 5 at step \d+, for the 3. time; lower the learning rate, clip.*max_rollbacks=0") as caught:
        spiking(tmp_path, set(range(29, 200)), max_rollbacks=2)
    assert "\n" not in str(caught.value)


def test_without_rollbacks_or_without_a_checkpoint_from_before_the_run_goes_on(tmp_path):
    state, done = spiking(tmp_path / "a", {29}, max_rollbacks=0)
    assert done == 40 and state.guard.passed_over == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Counter, "__init__", counter_with(3))
        state, done = run(tmp_path / "b", 40, leaping({29}), log_every=1, ckpt_every=100, accumulation=1)
    assert done == 40 and "there is no checkpoint from before, so the run goes on" in (tmp_path / "b/log.txt").read_text()
