"""Steps that are recorded and replayed: CUDA graphs, or HIP's.

A graph is a list of launches on fixed addresses. The step's numbers are copied to where it reads
them, and all of it is launched by one call. Graphs share one pool of memory, as no two run at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from elinvar.base.batch import ForwardBatch
from elinvar.ops.triton.upload import LastIds, Upload


class Recording:
    """Of one `run`: what it uploads is uploaded to the same places each time."""

    def __init__(self, device: torch.device, last: LastIds) -> None:
        self._device, self._last = device, last
        self._uploads: dict[int, tuple[ForwardBatch, Upload]] = {}
        self.constants: list[Any] = []
        """Kept alive: the launches point to them."""

    def upload(self, batch: ForwardBatch) -> ForwardBatch:
        if id(batch) not in self._uploads:
            upload = Upload(batch, self._device, self._last)
            upload.fill()
            self._uploads[id(batch)] = batch, upload
        return self._uploads[id(batch)][1].batch

    def fill(self) -> None:
        for _, upload in self._uploads.values():
            upload.fill()


def capture(
    recording: Recording, run: Callable[[], torch.Tensor], pool: Any
) -> Callable[[], torch.Tensor]:
    """The replay of `run`, which was run once before: its kernels are compiled, its matrices bound."""
    graph, copied = torch.cuda.CUDAGraph(), torch.cuda.Event()
    with torch.cuda.graph(graph, pool=pool):
        out = run()

    def replay() -> torch.Tensor:
        copied.synchronize()  # the numbers of the last replay, which may itself still run
        recording.fill()
        copied.record()
        graph.replay()
        return out

    return replay
