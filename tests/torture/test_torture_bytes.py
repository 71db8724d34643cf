"""A quick part of the campaigns `bits`, `inputs` and `hostility`, which share a pipeline in miniature."""

from torture.quick import campaign, tried


def test_flips_malformed_inputs_and_payloads(tmp_path):
    names = ("bits", "inputs", "hostility")
    rows = campaign(tmp_path, *names, size=0.01)
    assert {row["campaign"] for row in rows} == set(names) and len(rows) > 30 and all(tried(rows))
