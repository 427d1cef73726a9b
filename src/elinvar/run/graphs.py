"""Graphs: forward passes of decode, recorded once for each shape and replayed by one call.

A decode step of a small model takes 2 to 3 ms, and its 240 ops cost 0.4 ms of Python. A forward
follows from the shapes of its batch alone, so one that was seen before is only a list of kernel
calls on the same arrays: the new step's numbers are copied in, and the list is run again. The
kernels, and so the bits, are those of a plain forward.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elinvar.base.batch import I32, ForwardBatch
from elinvar.models.registry import Model
from elinvar.ops.api import F32, KVLayer, Ops

MAX_TOKENS = 256
"""Beyond, kernels take so long that Python no longer shows."""
MAX_GRAPHS = 64


@dataclass(slots=True)
class _Graph:
    own: ForwardBatch
    replay: Callable[[], F32]
    last: tuple[I32, ...] = ()
    """Block tables that were copied last: a batch brings the same arrays while they hold."""

    def __call__(self, batch: ForwardBatch) -> F32:
        own = self.own
        own.input_ids[:] = batch.input_ids
        own.positions[:] = batch.positions
        own.seq_lens[:] = batch.seq_lens
        for to, slots in zip(own.slot_mapping, batch.slot_mapping, strict=True):
            to[:] = slots
        if batch.block_tables is not self.last:
            for to, table in zip(own.block_tables, batch.block_tables, strict=True):
                to[:] = table
            self.last = batch.block_tables
        return self.replay()


class Graphs:
    """The forward of `model` over the caches `kv` (one a layer), which it must outlive."""

    def __init__(self, model: Model, ops: Ops, kv: Sequence[KVLayer]) -> None:
        self.model, self.ops, self.kv = model, ops, kv
        self._graphs: OrderedDict[tuple[int, int], _Graph] = OrderedDict()

    def forward(self, batch: ForwardBatch) -> F32:
        """Logits [L, V], valid until the next forward."""
        size = len(batch.input_ids)
        if size > MAX_TOKENS or not batch.all_logits or len(batch.seq_lens) != size:
            return self.model.forward(batch, self.kv)
        shape = size, batch.num_positions
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._record(batch)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(shape)
        return graph(batch)

    def _record(self, batch: ForwardBatch) -> _Graph:
        own = ForwardBatch(
            input_ids=batch.input_ids.copy(),
            positions=batch.positions.copy(),
            query_start_loc=batch.query_start_loc.copy(),
            seq_lens=batch.seq_lens.copy(),
            block_tables=tuple(t.copy() for t in batch.block_tables),
            slot_mapping=tuple(s.copy() for s in batch.slot_mapping),
            logit_rows=batch.logit_rows.copy(),
        )
        return _Graph(own, self.ops.record(lambda: self.model.forward(own, self.kv)))
