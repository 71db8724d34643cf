"""A quick part of the campaign `kills`; all of it with -m exhaustive."""

import os
import signal

import pytest
from torture import io_events
from torture.quick import campaign, on_cpu, tried


def test_a_process_that_is_killed_in_a_call_has_no_paths(monkeypatch):
    """Its memory, opened before, then reads as empty: looking there for the end of a name has no end."""
    child = os.fork()
    if child == 0:
        signal.pause()
    real = os.pread

    def killed_meanwhile(*words):
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        return real(*words)

    monkeypatch.setattr(os, "pread", killed_meanwhile)
    with pytest.raises(ProcessLookupError):
        io_events._text(child, id(child))
    os.waitpid(child, 0)


def test_a_save_that_is_killed_or_cut_at_an_event_loses_nothing(tmp_path):
    rows = campaign(tmp_path, "kills.saves", size=0.015)
    assert len(rows) == 3 and all(count >= 5 for count in tried(rows))


@pytest.mark.slow  # trains, draws, … in each of the stages that are chosen, several times
@on_cpu
def test_stages_that_are_killed_end_in_the_bits_of_undisturbed_ones(tmp_path):
    rows = campaign(tmp_path, "kills.stages", size=0.06)
    assert len(rows) == 4 and all(tried(rows))


@pytest.mark.exhaustive
@on_cpu
def test_every_stage_killed_again_and_again(tmp_path):
    assert sum(tried(campaign(tmp_path, "kills.stages", size=1, seconds=5000))) >= 300
