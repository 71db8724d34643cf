"""What tests share: where the golden tensors lie, when they are there."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when it is imported: kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
GOLDEN = Path(os.environ.get("VAVAE_GOLDEN", Path(__file__).parents[1].parent / "shared" / "golden"))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of reference outputs (`VAVAE_GOLDEN`, or `shared/golden` beside the checkout)."""
    if not (GOLDEN / "meta.json").is_file():
        pytest.skip(f"no golden tensors at {GOLDEN}: set VAVAE_GOLDEN to their folder")
    return GOLDEN


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.manual_seed(0)
