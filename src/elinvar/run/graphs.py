"""Graphs: forward passes of decode, recorded once for each shape and replayed by one call.

A decode step of a small model takes 2 to 3 ms, and its 240 ops cost 0.4 ms of Python. A forward
follows from the shapes of its batch alone, so one that was seen before is only a list of kernel
calls on the same arrays: the new step's numbers are copied in, and the list is run again. The
kernels, and so the bits, are those of a plain forward. With adapters it is good for whoever has which,
until one is loaded or unloaded. Steps that verify drafts are recorded, too: how long each row's span is
is a number, how long all are together a shape.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from elinvar.base.batch import I32, DecodeBatch, ForwardBatch, Sight
from elinvar.models.family import Model
from elinvar.ops.adapted import AdaptedOps
from elinvar.ops.api import F32, Ops
from elinvar.ops.caches import LayerCache

MAX_TOKENS = 256
"""Beyond, kernels take so long that Python no longer shows."""
MAX_GRAPHS = 64


@dataclass(slots=True)
class _Graph:
    own: DecodeBatch | ForwardBatch
    flat: ForwardBatch
    """Of `own`: the recording points to its arrays."""
    replay: Callable[[], F32]
    last: tuple[I32, ...] = ()
    """Block tables that were copied last: a batch brings the same arrays while they hold."""

    def __call__(self, batch: DecodeBatch | ForwardBatch) -> F32:
        own = self.own
        for to, numbers in zip(_numbers(own), _numbers(batch), strict=True):
            to[:] = numbers
        if own.adapters is not None and batch.adapters is not None:
            own.adapters[:] = batch.adapters
        if batch.block_tables is not self.last:
            for to, table in zip(own.block_tables, batch.block_tables, strict=True):
                to[:] = table
            self.last = batch.block_tables
        if own.sight is not None and batch.sight is not None:
            for to, array in zip(own.sight.arrays, batch.sight.arrays, strict=True):
                to[:] = array
        return self.replay()


class Graphs:
    """The forward of `model` over the caches `kv` (one a layer), which it must outlive. Without
    `adapted`, which the model was built with, no batch has adapters."""

    def __init__(
        self, model: Model, ops: Ops, kv: Sequence[LayerCache], adapted: AdaptedOps | None = None
    ) -> None:
        self.model, self.ops, self.kv, self.adapted = model, ops, kv, adapted
        self._graphs: OrderedDict[tuple[int, ...], _Graph] = OrderedDict()

    def forward(self, batch: ForwardBatch | DecodeBatch) -> F32:
        """Logits [L, V], valid until the next forward."""
        return self._run(batch, self._forward, 0)

    def all_hidden(self, batch: ForwardBatch | DecodeBatch) -> F32:
        """What the head gets of all tokens [T, D], valid until the next forward."""
        return self._run(batch, self._all_hidden, 1)

    def _run(
        self, batch: ForwardBatch | DecodeBatch, run: Callable[[ForwardBatch], F32], which: int
    ) -> F32:
        """Recorded where such a batch comes often: each token's logits are asked for."""
        if isinstance(batch, ForwardBatch):
            size, often = len(batch.input_ids), batch.all_logits and batch.watch is None
            sequences = len(batch.seq_lens)
        else:
            size, often = batch.numbers.shape[1], True
            sequences = 0  # as many as tokens, and other arrays
        if not often or size > MAX_TOKENS:
            return run(batch if isinstance(batch, ForwardBatch) else batch.flat())
        version = 0 if batch.adapters is None or self.adapted is None else self.adapted.version
        seen = (0, 0) if batch.sight is None else (batch.sight.width, len(batch.sight.seq_lens))
        shape = which, size, sequences, batch.block_tables[0].shape[1], version, *seen
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._record(batch, run)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(shape)
        return graph(batch)

    def _record(
        self, batch: DecodeBatch | ForwardBatch, run: Callable[[ForwardBatch], F32]
    ) -> _Graph:
        own = _copy(batch)
        flat = own if isinstance(own, ForwardBatch) else own.flat()
        return _Graph(own, flat, self.ops.record(lambda: run(flat)))

    def _forward(self, batch: ForwardBatch) -> F32:
        with self._applied(batch):
            return self.model.forward(batch, self.kv)

    def _all_hidden(self, batch: ForwardBatch) -> F32:
        with self._applied(batch):
            return self.model.hidden(batch, self.kv, all_tokens=True)

    def hidden(self, batch: ForwardBatch) -> F32:
        """What the head gets -> [L, D]."""
        with self._applied(batch):
            return self.model.hidden(batch, self.kv)

    def head(self, batch: ForwardBatch, h_LD: F32) -> F32:
        """Logits [L, V] of `hidden`'s rows for the tokens batch.logit_rows."""
        with self._applied(batch):
            return self.model.logits(h_LD)

    def _applied(self, batch: ForwardBatch) -> AbstractContextManager[None]:
        if batch.adapters is None:
            return nullcontext()
        assert self.adapted is not None
        return self.adapted.applied(batch)


def _numbers(batch: DecodeBatch | ForwardBatch) -> tuple[I32, ...]:
    """What differs from step to step, whatever the tables."""
    if isinstance(batch, DecodeBatch):
        return (batch.numbers,)
    lens = batch.query_start_loc, batch.seq_lens
    return batch.input_ids, batch.positions, *lens, *batch.slot_mapping


def _copy(batch: DecodeBatch | ForwardBatch) -> DecodeBatch | ForwardBatch:
    adapters = None if batch.adapters is None else batch.adapters.copy()
    tables = tuple(t.copy() for t in batch.block_tables)
    sight: Sight | None = None if batch.sight is None else batch.sight.copy()
    if isinstance(batch, DecodeBatch):
        return DecodeBatch(batch.numbers.copy(), tables, adapters, sight)
    ids, positions, starts, lens, *slots = (array.copy() for array in _numbers(batch))
    return replace(
        batch,
        input_ids=ids,
        positions=positions,
        query_start_loc=starts,
        seq_lens=lens,
        slot_mapping=tuple(slots),
        block_tables=tables,
        logit_rows=batch.logit_rows.copy(),
        adapters=adapters,
        sight=sight,
    )
