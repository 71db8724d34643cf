"""A quick part of the campaign `disk`."""

import pytest
from torture.quick import campaign, on_cpu, tried


@pytest.mark.slow  # runs a few stages, each undisturbed, on a faulty disk, and on the mended one
@on_cpu
def test_a_disk_that_is_full_refuses_goes_or_is_slow_costs_a_line_and_no_work(tmp_path):
    rows = campaign(tmp_path, "disk", size=0.03)
    assert len(rows) == 6 and all(tried(rows))  # a container may refuse mounts, or that a process watches its child's calls
