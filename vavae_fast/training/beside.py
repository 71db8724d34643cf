"""Work that runs beside the main one on a GPU, on a CUDA stream of its own: begun early, asked for where its result is needed."""

from collections.abc import Callable

import torch
from torch import Tensor


def beside(stream: torch.cuda.Stream | None, work: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Begin `work(x)` on `stream`, after what the current stream has been given so far -> a function that gives its result.

    The stream that asks waits for the result, the host never does. Without a stream the work is done at once: the same result. `work`
    takes no gradient: its backward pass would run on `stream`, with nobody to wait for it.
    """
    if stream is None:
        result = work(x)
        return lambda: result
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        result = work(x)
        done = stream.record_event()
    x.record_stream(stream)  # its memory is not for others before the work is done with it

    def asked() -> Tensor:
        current = torch.cuda.current_stream(stream.device)
        current.wait_event(done)
        result.record_stream(current)
        return result

    return asked
