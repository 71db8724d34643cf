"""What a run says: one JSON object a logged step, a text log, lines that a person reads."""

import errno
import io
import json
import math
import sys

import pytest

from vavae_fast.training.log import RunLog, progress_line, readable_time

VALUES = dict(step=200, loss=0.74231, mse=0.31, lr=2e-4, images_per_second=412.3, data_wait=0.004, skipped=0.0)


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_says_step_loss_rate_and_time_left():
    line = progress_line(VALUES, 80000, 24780)
    assert line == "step 200/80000  loss 0.7423  mse 0.31  lr 0.0002  412 img/s  data 0%  ETA 6 h 53 m"
    assert "skipped 3" in progress_line(VALUES | dict(skipped=3.0), 80000, 10)
    assert "  mse 0.31  valid_mse 0.325  lr" in progress_line(VALUES | dict(valid_mse=0.325), 80000, 10)
    assert "412 img/s  MFU 41%  data 0%" in progress_line(VALUES | dict(mfu=0.4123), 80000, 10)


@pytest.mark.parametrize("width", range(30, 130, 7))
def test_a_narrow_line_leaves_out_what_matters_least(width):
    values = VALUES | dict(mfu=0.41, valid_mse=0.32, skipped=2.0)
    whole, line = progress_line(values, 80000, 24780), progress_line(values, 80000, 24780, width)
    assert set(line.split("  ")) <= set(whole.split("  ")) and (len(line) <= width or width < 75)
    assert all(part in line for part in ("step 200/80000", "loss 0.7423", "412 img/s", "MFU 41%", "skipped 2", "ETA 6 h 53 m"))
    assert len(whole) > width or line == whole


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (89, "89 s"), (90, "2 m"), (3600, "60 m"), (5400, "1 h 30 m"), (24780, "6 h 53 m")])
def test_readable_time(seconds, text):
    assert readable_time(seconds) == text


def test_metrics_are_json_whatever_the_values(tmp_path):
    log = RunLog(tmp_path, "run")
    log.step(VALUES, 80000, 1.0)
    log.step(VALUES | dict(step=201, loss=math.nan, mse=math.inf), 80000, 1.0)
    log.close()
    first, second = logged(tmp_path)
    assert first == VALUES and second["loss"] is None and second["mse"] is None and second["step"] == 201
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line and "Infinity" not in line


def test_what_is_said_is_on_the_screen_and_in_the_log(tmp_path, capsys):
    log = RunLog(tmp_path / "run", "run")
    log.say("continues from x")
    log.step(VALUES, 80000, 1.0)
    log.step(VALUES | dict(step=300), 80000, 1.0)
    log.close()
    screen, text = capsys.readouterr().out.splitlines(), (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert screen[0] == "run  continues from x" and len(screen) == 2, "elsewhere than on a terminal: a line now and then"
    assert len(text) == 3 and text[0].endswith("  continues from x") and "step 300/80000" in text[2]


def test_the_last_step_is_always_said(tmp_path, capsys):
    log = RunLog(tmp_path, "run")
    log.step(VALUES, 80000, 1.0)
    log.step(VALUES | dict(step=80000), 80000, 0.0)
    log.close()
    assert "step 80000/80000" in capsys.readouterr().out


def test_steps_that_will_come_again_are_forgotten(tmp_path):
    log = RunLog(tmp_path, "run")
    for step in (10, 20, 30):
        log.step(VALUES | dict(step=step), 100, 1.0)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # cut short by a kill
    log = RunLog(tmp_path, "run")
    log.forget_after(20)
    log.step(VALUES | dict(step=30, loss=1.0), 100, 1.0)
    log.close()
    assert [(line["step"], line["loss"]) for line in logged(tmp_path)] == [(10, 0.74231), (20, 0.74231), (30, 1.0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "metrics.jsonl"]


def test_other_processes_are_silent(capsys):
    log = RunLog(None, "run", ("tensorboard",))
    log.say("x")
    log.step(VALUES, 10, 1.0)
    log.forget_after(3)
    log.close()
    assert capsys.readouterr().out == ""


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_one_line_that_fits(tmp_path, monkeypatch):
    """Each progress line takes the last one's place; what is said stands above it."""
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "60")
    log = RunLog(tmp_path, "run")
    for step in (10, 20):
        log.step(VALUES | dict(step=step), 100, 1.0)
    log.say("saved")
    log.close()
    lines = screen.getvalue().split("\n")
    progress = lines[0].split("\r\033[K")[1:]
    assert progress == [f"run  step {step}/100  loss 0.7423  412 img/s  data 0%  ETA 1 s" for step in (10, 20)]
    assert lines[1:] == ["run  saved", ""]
    assert "ETA" in (tmp_path / "log.txt").read_text(), "the file has whole lines"


class FullDisk:
    """A file that takes `room` bytes and then refuses."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def close(self):
        self.file.close()


def test_lines_wait_for_room_on_a_full_disk_and_the_run_does_not(tmp_path, capsys):
    log = RunLog(tmp_path, "run")
    disk = log.metrics.file = FullDisk(open(tmp_path / "metrics.jsonl", "ab", buffering=0), room=300)
    log.text.file = FullDisk(open(tmp_path / "log.txt", "ab", buffering=0), room=0)
    for step in (1, 2, 3):
        log.step(VALUES | dict(step=step), 80000, 1.0)
    assert (tmp_path / "metrics.jsonl").stat().st_size == 300, "cut within a line"
    disk.room = log.text.file.room = 1 << 20
    log.say("there is room")
    log.values(VALUES | dict(step=4))
    log.close()
    assert [values["step"] for values in logged(tmp_path)] == [1, 2, 3, 4]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4


def test_a_picture_that_finds_no_room_is_said(tmp_path, capsys):
    log = RunLog(tmp_path, "run")
    with log.sparing("samples"):
        raise OSError(errno.ENOSPC, "No space left on device", "samples.png")
    assert capsys.readouterr().out == "run  samples not written: [Errno 28] No space left on device: 'samples.png'\n"


def test_a_screen_that_is_a_file_on_a_full_disk_ends_nothing(tmp_path, monkeypatch):
    class Screen(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Screen())
    log = RunLog(tmp_path, "run")
    log.say("continues")
    assert "continues" in (tmp_path / "log.txt").read_text()
