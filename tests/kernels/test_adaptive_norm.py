"""What the kernels of the norms take and leave to the reference: rows of any width, results of three dtypes."""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from vavae_kernels import _launch, gate_add_norm_modulate, norm_modulate, rms_norm  # noqa: E402
from vavae_kernels._registry import auto_means, use_triton  # noqa: E402
from vavae_kernels.ops._adaptive_norm import MAX_WIDTH, why_not_kernel  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OTHERS = [torch.float64, torch.float8_e4m3fn, torch.float8_e8m0fnu]  # dtypes of a result that the kernels do not write


def calls(D: int) -> dict:
    """Each operator of these kernels on rows of D, as a function of its further arguments."""
    x, vector = torch.zeros(1, 2, D, device=DEVICE), torch.zeros(1, D, device=DEVICE)
    return {
        "rms_norm": lambda **more: rms_norm(x, None, **more),
        "norm_modulate": lambda **more: norm_modulate(x, vector, **more),
        "gate_add_norm_modulate": lambda **more: gate_add_norm_modulate(x, x, vector, vector, **more)[1],
    }


@pytest.mark.parametrize("op", calls(1))
def test_a_row_too_wide_for_registers_is_left_to_the_reference(op):
    """Triton's own limit is a page of compiler output, some widths further on."""
    with pytest.raises(ValueError, match=f"^{op}: the Triton kernel takes rows of at most {MAX_WIDTH}, got {MAX_WIDTH + 1}; use impl='torch'$"):
        calls(MAX_WIDTH + 1)[op](impl="triton")
    assert calls(MAX_WIDTH + 1)[op]().shape == (1, 2, MAX_WIDTH + 1)


@pytest.mark.parametrize("dtype", OTHERS)
@pytest.mark.parametrize("op", ["norm_modulate", "gate_add_norm_modulate"])
def test_results_in_other_dtypes_are_the_references(op, dtype):
    with pytest.raises(ValueError, match=f"^{op}: the Triton kernel writes float32, bfloat16 and float16, got {dtype}; use impl='torch'$"):
        calls(8)[op](impl="triton", out_dtype=dtype)
    assert calls(8)[op](out_dtype=dtype).dtype == dtype


def test_auto_on_a_gpu_takes_the_kernel_unless_there_is_a_reason():
    with FakeTensorMode():
        x = torch.empty(2, 8, device="cuda")
        assert use_triton("rms_norm", "auto", x, None, reason=why_not_kernel(x, x.dtype))
        assert not use_triton("rms_norm", "auto", x, None, reason=why_not_kernel(x, torch.float8_e4m3fn))


def test_more_rows_than_32_bits_count_are_left_to_the_reference():
    with FakeTensorMode(), auto_means("triton"), _launch.watched(lambda launch: None, run=False):
        rms_norm(torch.empty(2**31 - 1, 1), None)
        with pytest.raises(ValueError, match=r"^rms_norm: the Triton kernel counts rows in 32 bits, got 2147483648; use impl='torch'$"):
            rms_norm(torch.empty(2**31, 1), None)


WIDE = """
from dataclasses import replace
from vavae_kernels.testing.offline import SHARED_LIMIT, compile_launch, launches
from vavae_kernels.testing.spec import specs
spec = replace(specs()["gate_add_norm_modulate"], real={"wide": dict(B=2, N=8, D=4096)})
backward = next(launch for launch in launches(spec, "wide", "fp32", "rms") if launch.name == "adaptive_norm_bwd")
registers, stack, spills, shared = compile_launch(backward, 120)
print(stack, spills, shared <= SHARED_LIMIT[120] * 1024)
"""


def test_backward_of_wide_rows_fits_the_smallest_shared_memory():
    """Four fp32 tiles of 4096 in three stages take 131 KB, and GPUs of sm_86, sm_89 and sm_120 have 99 for a program."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WIDE], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["0", "0", "True"], done.stdout + done.stderr[-2000:]
