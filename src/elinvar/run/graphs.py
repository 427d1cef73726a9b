"""Graphs: forward passes of decode, recorded once for each shape and replayed by one call.

A decode step of a small model takes 2 to 3 ms, and its 240 ops cost 0.4 ms of Python. A forward
follows from the shapes of its batch alone, so one that was seen before is only a list of kernel
calls on the same arrays: the new step's numbers are copied in, and the list is run again. The
kernels, and so the bits, are those of a plain forward. Where recordings are costly, as on a GPU, one
serves several numbers of rows: those that are missing compute on a block that nobody reads, and no row
depends on another. With adapters it is good for whoever has which,
until one is loaded or unloaded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from elinvar.base.batch import I32, DecodeBatch, ForwardBatch
from elinvar.base.config import BLOCK_SIZE
from elinvar.models.family import Model
from elinvar.ops.adapted import AdaptedOps
from elinvar.ops.api import F32, Ops
from elinvar.ops.caches import LayerCache

MAX_TOKENS = 256
"""Beyond, kernels take so long that Python no longer shows."""
MAX_GRAPHS = 64


@dataclass(slots=True)
class _Graph:
    own: DecodeBatch
    flat: ForwardBatch
    """Of `own`: the recording points to its arrays."""
    replay: Callable[[], F32]
    spare: Sequence[int]
    """As in Graphs."""
    last: tuple[I32, ...] = ()
    """Block tables that were copied last: a batch brings the same arrays while they hold."""

    def __call__(self, batch: DecodeBatch) -> F32:
        own, size = self.own, batch.numbers.shape[1]
        own.numbers[:, :size] = batch.numbers
        if own.adapters is not None and batch.adapters is not None:
            own.adapters[:size] = batch.adapters
        if batch.block_tables is not self.last:
            for to, table in zip(own.block_tables, batch.block_tables, strict=True):
                to[:size] = table
            self.last = batch.block_tables
        if size < own.numbers.shape[1]:
            self._pad(size)
            return self.replay()[:size]
        if own.sight is not None and batch.sight is not None:
            for to, array in zip(own.sight.arrays, batch.sight.arrays, strict=True):
                to[:] = array
        return self.replay()

    def _pad(self, size: int) -> None:
        """Rows from `size` on compute token 0 at position 0."""
        own = self.own
        first_slots = [block * BLOCK_SIZE for block in self.spare]
        own.numbers[:, size:] = np.array([[0, 0, 1, *first_slots]]).T
        for to, block in zip(own.block_tables, self.spare, strict=True):
            to[size:] = block
        if own.adapters is not None:
            own.adapters[size:] = -1


class Graphs:
    """The forward of `model` over the caches `kv` (one a layer), which it must outlive. Without
    `adapted`, which the model was built with, no batch has adapters. spare: of each group a block
    that nobody reads, where `ops` rounds numbers of rows."""

    def __init__(
        self,
        model: Model,
        ops: Ops,
        kv: Sequence[LayerCache],
        adapted: AdaptedOps | None = None,
        spare: Sequence[int] = (),
    ) -> None:
        self.model, self.ops, self.kv, self.adapted = model, ops, kv, adapted
        self._spare = spare
        self._graphs: OrderedDict[tuple[int, ...], _Graph] = OrderedDict()

    def forward(self, batch: ForwardBatch | DecodeBatch) -> F32:
        """Logits [L, V], valid until the next forward."""
        if isinstance(batch, ForwardBatch):
            return self._forward(batch)
        size = batch.numbers.shape[1]
        if size > MAX_TOKENS:
            return self._forward(batch.flat())
        version = 0 if batch.adapters is None or self.adapted is None else self.adapted.version
        seen = 0 if batch.sight is None else batch.sight.width
        rows = size if seen else self.ops.graph_rows(size)
        shape = rows, batch.block_tables[0].shape[1], version, seen
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._record(batch, rows)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(shape)
        return graph(batch)

    def _record(self, batch: DecodeBatch, rows: int) -> _Graph:
        # Of the rows that pad the first one's numbers do: _Graph writes its own before each replay.
        at = np.arange(rows) % batch.numbers.shape[1]
        adapters = None if batch.adapters is None else batch.adapters[at]
        tables = tuple(t[at] for t in batch.block_tables)
        sight = None if batch.sight is None else batch.sight.copy()
        own = DecodeBatch(batch.numbers.take(at, axis=1), tables, adapters, sight)
        flat = own.flat()
        return _Graph(own, flat, self.ops.record(lambda: self._forward(flat)), self._spare)

    def _forward(self, batch: ForwardBatch) -> F32:
        batch = self.ops.upload(batch)
        with self._applied(batch):
            return self.model.forward(batch, self.kv)

    def hidden(self, batch: ForwardBatch) -> F32:
        """What the head gets -> [L, D]."""
        batch = self.ops.upload(batch)
        with self._applied(batch):
            return self.model.hidden(batch, self.kv)

    def head(self, batch: ForwardBatch, h_LD: F32) -> F32:
        """Logits [L, V] of `hidden`'s rows for the tokens batch.logit_rows."""
        if batch.adapters is not None:
            batch = self.ops.upload(batch)
        with self._applied(batch):
            return self.model.logits(h_LD)

    def _applied(self, batch: ForwardBatch) -> AbstractContextManager[None]:
        if batch.adapters is None:
            return nullcontext()
        assert self.adapted is not None
        return self.adapted.applied(batch)
