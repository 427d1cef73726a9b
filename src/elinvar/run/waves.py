"""Waves: a forward that waits between layers while steps that decode go on (see sched/wave.py).

Owns the one forward that is underway: what it has computed so far is in its arrays, which nobody else
touches, and in the blocks of its requests.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from elinvar.base.batch import ForwardBatch
from elinvar.models.family import Model
from elinvar.nn.decoder import ByLayer
from elinvar.ops.adapted import AdaptedOps
from elinvar.ops.api import F32
from elinvar.ops.caches import LayerCache


class Waves:
    """Of `model` over the caches `kv`; adapted: see run.graphs."""

    def __init__(
        self, model: Model, kv: Sequence[LayerCache], adapted: AdaptedOps | None = None
    ) -> None:
        self._model, self._kv, self._adapted = model, kv, adapted
        self._batch: ForwardBatch | None = None
        self._forward: ByLayer | None = None

    def begin(self, batch: ForwardBatch, all_tokens: bool = False) -> None:
        """Take `batch`, in the place of one that did not come to its end."""
        self._batch = batch
        self._forward = self._model.hidden_by_layer(batch, self._kv, all_tokens)

    def go_on(self, num_layers: int) -> tuple[F32 | None, list[float]]:
        """Through so many layers; behind the last one what the head gets [L, D], or [T, D] of
        all tokens, and of each layer the seconds that it took."""
        forward, batch = self._forward, self._batch
        assert forward is not None and batch is not None
        adapted: AbstractContextManager[None] = nullcontext()
        if batch.adapters is not None:
            assert self._adapted is not None
            adapted = self._adapted.applied(batch)
        took: list[float] = []
        before = time.perf_counter()
        with adapted:
            for _ in range(num_layers):
                try:
                    next(forward)
                except StopIteration as end:
                    h_LD = cast("F32", end.value)
                    self._forward = self._batch = None
                    return h_LD, [*took, time.perf_counter() - before]
                now = time.perf_counter()
                took.append(now - before)
                before = now
        return None, took
