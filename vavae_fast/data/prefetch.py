"""Work done ahead of its use, in threads: reading and decoding release the GIL, so no worker processes are needed."""

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(make: Callable[[Item], Made], items: Iterable[Item], depth: int = 2, threads: int = 1) -> Iterator[Made]:
    """Yield make(item) in the order of `items`, with up to `depth` results made or being made before they are asked for.

    An exception of `make` is raised where its result would have been. Closing the iterator ends its threads.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Buffers:
    """Memory for float32 batches of one shape, used again once the last tensor that looks at it is gone.

    Fresh pages from the system cost more than reading a batch into them. Safe from several threads.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self._free: list[np.ndarray] = []

    def take(self) -> Tensor:
        """A tensor with undefined values; it and every view of it keep the memory from being given out again."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(math.prod(self.shape), np.float32)
        lent = memory[:]  # the tensor's storage holds this object; when that dies, the memory comes back
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent).view(self.shape)
