"""Work done ahead of its use, in threads: reading and decoding release the GIL, so no worker processes are needed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
