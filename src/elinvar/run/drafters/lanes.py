"""Lanes: the cache of a draft model, a lane for each row of the target.

Owns its blocks and what lies in them. It is bounded, and nobody's answer waits for it: a row that finds no
block takes those of the row that was drafted for longest ago, or gets no drafts. Prompts that begin alike
are drafted for from what is there (kv.KVManager).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np

from elinvar.base.batch import I32
from elinvar.base.config import KVSpec
from elinvar.base.plan import PlanItem
from elinvar.kv.manager import KVManager
from elinvar.kv.sequence import SequenceKV, Taken
from elinvar.ops.api import Ops
from elinvar.ops.caches import Blocks, LayerCache
from elinvar.run.rows import Rows


@dataclass(slots=True)
class _Lane:
    seq: SequenceKV
    computed: int
    """Leading tokens whose keys and values are there."""
    told: int = 0
    """Of those, what others may find."""


class Lanes:
    """`num_blocks` blocks in each group of `specs`. unsettled: last known tokens of a row that may yet be
    others."""

    def __init__(
        self,
        rows: Rows,
        ops: Ops,
        specs: Sequence[KVSpec],
        num_blocks: Sequence[int],
        unsettled: int = 0,
    ) -> None:
        self._rows, self._unsettled = rows, unsettled
        max_rows, max_context = rows.token_ids.shape
        self.places = Rows(max_rows, max_context, specs)
        """The same tokens, in this cache."""
        self.places.token_ids = rows.token_ids
        self._manager = KVManager(specs, num_blocks)
        self._lanes: OrderedDict[int, _Lane] = OrderedDict()
        """By row, the one used longest ago first."""
        self._tokens: I32 = np.zeros(rows.token_ids.shape, np.int32)
        """What was computed in each row, which may have become other tokens since; memory is touched as
        far as that goes."""
        self._blocks: list[Blocks] = []
        layers: dict[int, LayerCache] = {}
        for spec, count in zip(specs, num_blocks, strict=True):
            caches = ops.kv_layers(spec, count)
            self._blocks.append(caches[0].blocks)
            layers |= zip(spec.layers, caches, strict=True)
        self.kv = [layers[i] for i in range(len(layers))]

    def num_left(self, row: int, num_known: int) -> int:
        """Tokens that are to be computed, about: what can be found is not looked for."""
        lane = self._lanes.get(row)
        return num_known - (0 if lane is None else lane.computed)

    def enter(self, row: int, num_known: int, busy: Set[int]) -> int | None:
        """The first token that is to be computed, of `num_known`; None: there is no block for it. `busy`
        rows keep theirs."""
        lane = self._lanes.get(row)
        if lane is not None:
            same = self._num_same(row, min(lane.computed, num_known - 1))
            if same >= lane.told:
                lane.computed = same
                self._lanes.move_to_end(row)
                return same
            self.leave(row)
        return self._begin(row, num_known, busy)

    def _num_same(self, row: int, count: int) -> int:
        """Of its first tokens, how many are those that were computed."""
        differ = self._tokens[row, :count] != self._rows.token_ids[row, :count]
        return int(differ.argmax()) if differ.any() else count

    def _begin(self, row: int, num_known: int, busy: Set[int]) -> int | None:
        tokens = self._rows.token_ids[row, :num_known].tolist()
        seq = self._manager.new_sequence(self._rows.namespaces[row])
        while True:
            prefix = self._manager.find_prefix(seq, tokens)
            start = prefix.num_tokens
            allocation = self._manager.prepare(seq, start, start + 1, prefix)
            if allocation is not None:
                break
            if not self._give_up_one(busy):
                return None
        taken = self._manager.apply(allocation)
        for copy in taken.copies:
            self._blocks[copy.group].copy(copy.source, copy.target)
        pairs = zip(taken.start, taken.blocks, strict=True)
        self.places.hold(row, [found + new for found, new in pairs])
        self._lanes[row] = _Lane(seq, start)
        self._tokens[row, :start] = tokens[:start]
        return start

    def reserve(self, row: int, start: int, end: int, busy: Set[int]) -> int:
        """Room for its positions up to `end`, or as many as there are blocks for -> where it ends."""
        seq = self._lanes[row].seq
        while seq.capacity < end:
            allocation = self._manager.prepare(seq, start, end)
            if (allocation is None or allocation.end < end) and self._give_up_one(busy):
                continue
            if allocation is None:
                break
            self._append(row, self._manager.apply(allocation))
            end = allocation.end
        return min(end, seq.capacity)

    def _append(self, row: int, taken: Taken) -> None:
        self.places.append_blocks([PlanItem("", row, 0, 0, False, taken.blocks)])

    def _give_up_one(self, busy: Set[int]) -> bool:
        row = next((row for row in self._lanes if row not in busy), None)
        if row is not None:
            self.leave(row)
        return row is not None

    def computed(self, row: int, start: int, stop: int, num_known: int) -> None:
        """So much of its tokens was, of which `num_known` are no drafts."""
        lane = self._lanes[row]
        lane.computed = stop
        self._tokens[row, start:stop] = self._rows.token_ids[row, start:stop]
        told = min(stop, num_known - self._unsettled)
        if told > lane.told:
            lane.told = told
            if told >= lane.seq.next_event:
                self._manager.advance(lane.seq, self._tokens[row, :told].tolist(), told)

    def leave(self, row: int) -> None:
        """What it computed can be found until its blocks are needed."""
        lane = self._lanes.pop(row, None)
        if lane is not None:
            tokens = self._tokens[row, : lane.told].tolist()
            self._manager.free(lane.seq, tokens, lane.told)

    @property
    def num_held(self) -> int:
        """Blocks of all rows."""
        return self._manager.blocks["held"]

    def check(self) -> None:
        """Assert all invariants."""
        self._manager.check([lane.seq for lane in self._lanes.values()])
