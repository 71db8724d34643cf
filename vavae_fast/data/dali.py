"""JPEGs decoded by NVIDIA DALI: by nvJPEG on a GPU, by libjpeg-turbo on a CPU, where the pixels are Pillow's to the bit.

DALI decodes and no more: its resize moves the grid where a side is rounded, so squares are cut by our own arithmetic.
"""

import threading
import warnings
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vavae_fast.errors import BadInput

_BATCH = 64  # images that go through at once: all threads are busy, and a GPU holds them at full size


def require_dali() -> None:
    """`BadInput` where DALI is not installed."""
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        raise BadInput("backend 'dali': nvidia-dali is not installed; pip install 'vavae-fast[dali]', or use backend 'pil'")


def takes(image: Image.Image) -> bool:
    """Whether DALI is given an image, told by its header: what nvJPEG and Pillow both decode to RGB in one way. Pillow decodes the rest."""
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


class DaliDecoder:
    """A decoder for one device, built on first use. Safe from several threads, which take turns.

    stream: on a GPU, that of all that reading does there. On the stream of the training each of its copies would wait for the steps before it.
    """

    def __init__(self, device: torch.device, threads: int):
        self.device, self.threads = device, threads
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._turn = threading.Lock()

    @cached_property
    def _pipeline(self) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self.device.type == "cuda"

        @pipeline_def
        def decoding():
            encoded = fn.external_source(name="encoded", batch=True, ndim=1, dtype=types.UINT8)
            # As Pillow: the exact transform, chroma interpolated, no turning by EXIF.
            return fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False,
                                     use_fast_idct=False, jpeg_fancy_upsampling=True)  # fmt: skip

        device_id = (self.device.index or 0) if on_gpu else None  # None: a machine without a GPU
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that there is no GPU, which is why the CPU was asked for
            pipeline = decoding(batch_size=_BATCH, num_threads=self.threads, device_id=device_id, prefetch_queue_depth=1)
            pipeline.build()
        return pipeline

    def decode(self, encoded: list[bytes]) -> list[Tensor | None]:
        """(H, W, 3) uint8 each, on the device; None for one that DALI cannot decode."""
        with self._turn:
            found: list[Tensor | None] = []
            for first in range(0, len(encoded), _BATCH):
                found += self._batch(encoded[first : first + _BATCH])
            return found

    def _batch(self, encoded: list[bytes]) -> list[Tensor | None]:
        try:
            return self._run(encoded)
        except RuntimeError:  # it names no image: each alone, so that the others are decoded as they are in any other batch
            return [self._alone(data) for data in encoded]

    def _alone(self, data: bytes) -> Tensor | None:
        try:
            return self._run([data])[0]
        except RuntimeError:
            return None

    def _run(self, encoded: list[bytes]) -> list[Tensor]:
        self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        (images,) = self._pipeline.run()
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                copies = [torch.from_dlpack(images[k]).clone() for k in range(len(encoded))]
            self.stream.synchronize()  # the memory is DALI's, and the next run's
            return copies
        return [torch.from_numpy(np.array(images.at(k))) for k in range(len(encoded))]
