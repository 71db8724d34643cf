"""Runs of several processes without a launcher: forked from one interpreter that has imported what they need, which is most of what a start costs.

Called from a script of its own, not from pytest: a process that has started threads must not fork.
"""

import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # which a random initialisation on the meta device imports, for seconds
import torch.distributed.fsdp
import torch.distributed.tensor

from vavae_fast.cli import main
from vavae_fast.commands import report, train, watch  # noqa: F401  imported before the fork
from vavae_fast.data.latent_writer import LatentWriter
from vavae_fast.training import dit, loop  # noqa: F401  imported before the fork

CONFIG = """
data: {image_size: 16, num_classes: 3, latent_norm: true, latent_multiplier: 1.0}
vae: {model_name: tiny, downsample_ratio: 8}
model: {model_type: custom, hidden_size: 32, depth: 2, num_heads: 4, patch_size: 1, use_swiglu: true, use_rope: true, use_rmsnorm: true,
        use_qknorm: true, in_chans: 4}
train: {max_steps: 50, global_batch_size: 8, log_every: 1, ckpt_every: 1000, ema_decay: 0.9}
optimizer: {lr: 1.0e-3, max_grad_norm: 0.5}
transport: {use_cosine_loss: true, use_lognorm: true}
"""


def prepare(folder: Path) -> None:
    """Latents and a config in `folder`."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(24, 4, 2, 2, generator=generator)
    writer = LatentWriter(folder / "latents", (4, 2, 2), 24)
    writer.append(latents, latents.flip(-1), torch.arange(24) % 3)
    writer.close()
    (folder / "dit.yaml").write_text(CONFIG)


def words(folder: Path, name: str, *overrides: str) -> list[str]:
    """Words of `train` for the run `name`."""
    given = (f"data.data_path={folder / 'latents'}", f"train.output_dir={folder}", f"train.exp_name={name}")
    return ["train", "--config", str(folder / "dit.yaml"), *given, *overrides]


def start(count: int, function: Callable[[], int | None], said: Path, nodes: int = 1) -> list[int]:
    """Fork `count` processes of one world, on `nodes` equal nodes, that call `function`; returns their ids. They write to the file `said`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    sys.stdout.flush()
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            local = count // nodes
            os.environ |= dict(WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank % local), LOCAL_WORLD_SIZE=str(local),
                               MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
            _become(function, said)
        children.append(child)
    return children


def _become(function: Callable[[], int | None], said: Path) -> None:
    status = 1
    try:
        with open(said, "ab", 0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)  # makes this process's thread pool before several threads would at once
        status = function() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def statuses(children: list[int]) -> list[int]:
    """Wait for all; exit codes, negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def trained(folder: Path, name: str, processes: int, *overrides: str, nodes: int = 1) -> None:
    """A run that must end well."""
    said = folder / f"{name}.txt"
    codes = statuses(start(processes, lambda: main(words(folder, name, *overrides)), said, nodes))
    if codes != [0] * processes:
        sys.exit(f"{name}: exit codes {codes}\n{said.read_text()}")


def begin(folder: Path) -> None:
    """What every script of such runs does first."""
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepare(folder)
