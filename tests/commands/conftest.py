"""One tiny pipeline for all tests of the commands: made once, read by all, changed by none."""

from pathlib import Path

import pytest
import torch
from tiny import Tiny, done, prepare


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """For fixtures of every scope: bytes are compared, and they depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Tiny:
    """Images, configs, stand-ins; nothing trained."""
    return prepare(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def tiny(start: Tiny) -> Tiny:
    """train-tokenizer, extract, train: four steps each, ready to be sampled."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    done("train-tokenizer", *start.tokenizer())
    done("extract", "--config", str(start.root / "tokenizer.yaml"), "--checkpoint", str(start.tokenizer_run), "--images", str(start.images),
         "--out", str(start.latents), "--shard-size", "6", "--batch", "4")  # fmt: skip
    done("train", *start.dit())
    torch.set_num_threads(threads)
    return start


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
