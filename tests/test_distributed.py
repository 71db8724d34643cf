"""Ranks and collectives: one process needs no group, two gloo processes agree, and an error in one waits for nobody.

Run as a script, this file is one of the two processes.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from vavae_fast.distributed import STEP_TIMEOUT, World, open_world
from vavae_fast.errors import Interrupted, PeerFault


def test_one_process_needs_no_group():
    with open_world() as world:
        assert world == World(0, 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
        assert world.any(True) and not world.any(False) and world.from_main(3) == 3
        world.steps_begin()
        values = torch.tensor([1.0, 2.0])
        assert torch.equal(world.mean(values), values)
        assert world.agree(1, True) and not world.agree(1, False) and world.collectives() == 0
        with pytest.raises(PeerFault, match="^a wrong sample$"):
            world.agree(1, False, "a wrong sample")
        world.barrier()
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes over gloo; on a GPU machine they would share one over NCCL")
def test_two_processes_agree_and_an_error_in_one_ends_both(tmp_path):
    """Were the failing process to wait at a barrier while the other sums gradients, both would stand there for ever.

    Each leaves its error where torchrun looks for it. torchrun names the earliest, to the second: it has to be the culprit's.
    """
    with contextlib.ExitStack() as held:
        found = [held.enter_context(socket.socket()) for _ in range(3)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        ports = [str(one.getsockname()[1]) for one in found]
    common = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *ports],
            env=common | dict(RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2", TORCHELASTIC_ERROR_FILE=str(tmp_path / rank)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=120)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    assert said == ["agreed, then the other was gone", "agreed, then failed"]
    assert time.monotonic() - started < 100
    errors = [json.loads((tmp_path / rank).read_text())["message"] for rank in "01"]
    assert errors[1]["message"] == "KeyError: 'this process fails'" and errors[0]["message"].startswith("RuntimeError")
    assert int(errors[1]["extraInfo"]["timestamp"]) < int(errors[0]["extraInfo"]["timestamp"])


def main(rank: int, ports: list[str]) -> None:
    """Three groups after one another, each at its own port: at one port a process may call on the group that is just leaving."""

    def open_next() -> World:
        os.environ["MASTER_PORT"] = ports.pop()
        return open_world()

    with open_next() as world:
        assert (world.rank, world.size, world.local_size, world.main, world.device.type) == (rank, 2, 2, rank == 0, "cpu")
        torch.testing.assert_close(world.mean(torch.tensor([1.0 + rank, 10.0 * rank])), torch.tensor([1.5, 5.0]))
        assert world.any(rank == 1) is True and world.any(False) is False and world.any(True) is True
        assert world.from_main({"from": rank}) == {"from": 0}
        assert world.agree(3, rank == 1) is True and world.agree(4, False) is False
        with pytest.raises(PeerFault, match="^rank 0 is out of step: at step 5 after 1 collectives, where the other is at step 6 after 1. Nothing"):
            world.agree(5 + rank, False)
        with pytest.raises(PeerFault, match="^rank 1: read a wrong sample. Nothing"):
            world.agree(6, False, "read a wrong sample" if rank == 1 else None)
        if rank == 0:
            torch.distributed.all_reduce(torch.ones(1), async_op=True)
        with pytest.raises(PeerFault, match="^rank 1 is out of step: at step 7 after 1 collectives, where the other is at step 7 after 2. Nothing"):
            world.agree(7, False)
        if rank == 1:
            torch.distributed.all_reduce(torch.ones(1))
        world.steps_begin()
        assert torch.distributed.group.WORLD._get_backend(world.device).options._timeout == STEP_TIMEOUT
        world.barrier()
    assert not torch.distributed.is_initialized()
    with pytest.raises(Interrupted), open_next() as world:
        raise Interrupted
    assert not torch.distributed.is_initialized(), "a run that was stopped is left as one that ended"
    try:
        with open_next() as world:
            if rank == 1:
                raise KeyError("this process fails")
            world.mean(torch.ones(1))
            print("got past the collective")
    except KeyError:
        print("agreed, then failed")
    except RuntimeError:  # the connection ends with the process that failed
        print("agreed, then the other was gone")
    sys.stdout.flush()
    os._exit(0)  # as a failing process does: nothing of the group is taken down in turn


if __name__ == "__main__":
    main(int(os.environ["RANK"]), sys.argv[1:])
