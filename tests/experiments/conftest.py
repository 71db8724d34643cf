"""Scales of all kinds, with empty files where only their names are looked at."""

from pathlib import Path

import pytest
import torch

from vavae_fast.experiments.scale import Files, Scale
from vavae_fast.experiments.scales import cifar, demo, imagenet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def scales(tmp_path_factory) -> dict[str, Scale]:
    """Complete: every experiment finds what it needs at one of them."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("train", "valid", "latents"):
        (folder / name).mkdir()
    names = ("inception", "reference", "vgg", "lpips", "dinov2", "mae", "sam", "clip", "64ep", "800ep", "vavae")
    for name in names:
        (folder / name).touch()
    given = {name: str(folder / name) for name in (*names, "latents")}
    files = Files(
        str(folder / "train"), str(folder / "valid"), *(given[name] for name in ("inception", "reference", "vgg", "lpips")),
        foundations={name: given[name] for name in ("dinov2", "mae", "sam", "clip")},
        published={name: given[name] for name in ("64ep", "800ep", "vavae", "latents")},
    )  # fmt: skip
    small = Files(str(folder / "train"), str(folder / "valid"))
    configs = ROOT / "configs"
    return {"demo": demo(configs, Files(), 1.0, False), "cifar": cifar(configs, small, 1.0, False), "imagenet": imagenet(configs, files, 1.0, False)}
