"""What was sampled, on its way to the host: one transfer behind the step's kernels."""

from __future__ import annotations

import numpy as np
import torch

from elinvar.ops.arguments import SampleResult
from elinvar.ops.triton.device import staging
from elinvar.ops.triton.sampling import Sampled


class Coming:
    """As ops.api.Coming. The only wait for the device in a step is for its `result`."""

    def __init__(self, found: Sampled) -> None:
        parts = [part.view(torch.int32) for part in found]
        self._shapes = [part.shape for part in parts]
        flat = torch.cat([part.flatten() for part in parts])
        self._host = staging(4 * flat.numel(), flat.device).view(torch.int32)
        self._host.copy_(flat, non_blocking=True)
        self._copied = None if flat.device.type == "cpu" else torch.cuda.Event()
        if self._copied is not None:
            self._copied.record()

    @property
    def is_there(self) -> bool:
        return self._copied is None or self._copied.query()

    def result(self) -> SampleResult:
        if self._copied is not None:
            self._copied.synchronize()
        ends = np.cumsum([shape.numel() for shape in self._shapes])[:-1]
        ids, logprobs, top_ids, top_logprobs = (
            array.reshape(shape)
            for array, shape in zip(np.split(self._host.numpy(), ends), self._shapes, strict=True)
        )
        return SampleResult(ids, logprobs.view(np.float32), top_ids, top_logprobs.view(np.float32))
