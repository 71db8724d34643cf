"""A quick part of the campaign `kills`; all of it with -m exhaustive."""

import pytest
from torture.quick import campaign, on_cpu, tried


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
