"""A quick part of the campaign `processes`."""

import pytest
from torture.quick import campaign, on_cpu, tried


@on_cpu
def test_who_dies_hangs_or_goes_astray_is_named_and_all_end(tmp_path):
    assert tried(campaign(tmp_path, "processes.worlds", size=0.05)) == [1, 1]


@pytest.mark.exhaustive  # starts three interpreters, up to half a minute; forked worlds stand in for them above
@on_cpu
def test_whatever_torchrun_or_a_worker_of_it_is_sent_nothing_is_lost_and_nobody_is_left(tmp_path):
    assert tried(campaign(tmp_path, "processes.launched", size=0.05)) == [1]
