"""A provider whose samples are on their way until they are asked for, as a GPU's are: the CPU's kernels,
and what was done and waited for in its order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from elinvar.base.batch import ForwardBatch
from elinvar.ops import Ops
from elinvar.ops.api import F32, I32
from elinvar.ops.arguments import SampleArgs, SampleResult
from engines import provider


@dataclass
class _Coming:
    number: int
    found: SampleResult
    calls: list[tuple[str, int]]
    is_there: bool

    def result(self) -> SampleResult:
        self.calls.append(("fetch", self.number))
        return self.found


class LateOps:
    def __init__(self, inner: Ops | None = None, ahead: bool = True) -> None:
        """ahead: without it the provider is one that is waited for."""
        self.inner: Any = inner or provider()
        self.calls: list[tuple[str, int]] = []
        """("begin" or "fetch", number of the sampling), in order."""
        self.is_late = False
        """The host is: what it asks for is there."""
        self._last: I32 = np.zeros(0, np.int32)
        self._count = 0
        if ahead:
            self.sample_ahead = self._sample_ahead

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def record(self, run: Callable[[], F32]) -> Callable[[], F32]:
        return run  # for `upload` is no kernel

    def upload(self, batch: ForwardBatch) -> ForwardBatch:
        ids = batch.input_ids.copy()
        coming = ids < 0
        ids[coming] = self._last[~ids[coming]]
        return replace(batch, input_ids=ids)

    def _sample_ahead(self, logits_LV: F32, args: SampleArgs) -> _Coming:
        found = self.inner.sample(logits_LV, args)
        parts = found.ids, found.logprobs, found.top_ids, found.top_logprobs
        kept = SampleResult(*(part.copy() for part in parts))
        self._last, self._count = kept.ids, self._count + 1
        self.calls.append(("begin", self._count))
        return _Coming(self._count, kept, self.calls, self.is_late)

    @property
    def num_ahead(self) -> int:
        """Steps that began before the one before them was fetched."""
        fetched = begun = count = 0
        for what, number in self.calls:
            if what == "fetch":
                assert number == fetched + 1, "fetched out of order"
                fetched = number
            else:
                begun = number
                assert begun - fetched <= 2, "two steps ahead"
                count += begun - fetched == 2
        return count
