"""What counts as a number in the checks of arguments, the same in both packages."""

import numpy as np
import pytest
import torch

from vavae_fast import errors
from vavae_kernels import _checks

INTEGERS = (0, -3, 2**70, np.int64(4), np.uint8(1))
REALS = (0.5, -1e300, np.float32(0.1), np.float16(2))
NEITHER = (True, np.bool_(True), None, "1", [1], 1j, float("nan"), float("inf"), np.float16(-np.inf), torch.tensor(1), np.zeros(1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("checks", [errors, _checks], ids=["errors", "kernels"])
def test_integers_and_numbers(checks):
    assert all(checks.is_integer(x) and checks.is_number(x) for x in INTEGERS)
    assert all(checks.is_number(x) and not checks.is_integer(x) for x in REALS)
    assert not any(checks.is_integer(x) or checks.is_number(x) for x in NEITHER)
    assert checks.is_integer(10**400) and not checks.is_number(10**400)  # too large for a float


def test_a_message_is_one_line_that_steers_no_terminal():
    error = errors.BadInput("a\x1b[2Jb\nc\x85d\udcff💥: no such file")
    assert str(error) == "a\\x1b[2Jb c d\\udcff💥: no such file"
    assert str(errors.BadInput(str(error))) == str(error)
