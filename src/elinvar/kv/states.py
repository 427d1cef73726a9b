"""States: what is particular to groups of recurrent states (docs/design/010-recurrent-state.md).

A block is the state after the last computed of its positions. To go on, a sequence needs the one of
the position before: such a group is a sliding one of window 2. Unlike keys a state replaces the one
before it, so a step takes one block at most, and none when the block that it goes on from is no
snapshot: that one moves on to the new index.

A snapshot is a state that was left on a block border, where others can begin. It may weigh as much as
thousands of tokens of keys; which borders are worth it is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence

from elinvar.base.config import KVSpec
from elinvar.kv.pool import BlockPool
from elinvar.kv.sequence import Prefix, SequenceKV

WINDOW = 2

_SHORT = 2
"""Blocks: to compute fewer again costs less than the step that a chunk's end adds."""


class States:
    def __init__(
        self, specs: Sequence[KVSpec], pools: Sequence[BlockPool], prefix_cache: bool
    ) -> None:
        self.groups = [group for group, spec in enumerate(specs) if spec.state]
        self._pools = pools
        self._leaves = bool(self.groups) and prefix_cache
        self._size = specs[0].block_size
        states = sum(spec.block_bytes for spec in specs if spec.state)
        keys = sum(spec.block_bytes for spec in specs if not spec.state)
        self._every = max(_SHORT, -(-states // keys) if keys else _SHORT) * self._size
        """Positions from one to the next of the snapshots that every sequence leaves: until then its
        keys and values have taken as much memory as the snapshot."""

    # ---- where snapshots are left -----------------------------------------------------------

    def marks(self, start: int, shared: int, num_tokens: int) -> tuple[int, ...]:
        """Positions at which a sequence of `num_tokens` known tokens, computed from `start` on,
        leaves one: where it parts from another (`shared`: what is cached of it in the groups that
        keep every block), since a third is likely to part there, too, and at its last border,
        where the same tokens, or a continuation, can go on."""
        if not self._leaves:
            return ()
        last = (num_tokens - 1) // self._size * self._size
        least = start + _SHORT * self._size
        return tuple(mark for mark in sorted({shared, last}) if mark >= least)

    def cut(self, marks: tuple[int, ...], start: int, end: int) -> int:
        """Where a chunk from `start` that would reach `end` ends, to leave the next one."""
        if not self._leaves:
            return end
        regular = (start // self._every + 1) * self._every
        return min(end, regular, *(mark for mark in marks if mark > start))

    def left(self, seq: SequenceKV, num_computed: int) -> None:
        """A snapshot was left: it stands for the one before, unless that one is to be kept."""
        if not self.groups:
            return
        index = num_computed // self._size - 1
        keeps = num_computed in seq.marks or num_computed % self._every == 0
        if seq.snapshot < index:
            self.replace(seq)
        for group in self.groups:
            block = seq.tables[group][index]
            keeps = keeps or block < 0 or self._pools[group].node(block) is None
        seq.snapshot = -1 if keeps else index

    def replace(self, seq: SequenceKV) -> None:
        """Another state stands for the one that was left last."""
        if seq.snapshot >= 0:
            for group in self.groups:
                self._pools[group].drop(seq.nodes[seq.snapshot])

    # ---- where sequences go on --------------------------------------------------------------

    def can_go_on(self, seq: SequenceKV, prefix: Prefix | None, free: Sequence[int]) -> bool:
        """Whether in each group a block is free, or the state to go on from is nobody else's."""
        return all(free[group] or self._is_own(group, seq, prefix) for group in self.groups)

    def _is_own(self, group: int, seq: SequenceKV, prefix: Prefix | None) -> bool:
        if prefix is not None:
            return prefix.num_taken[group] == 1 and prefix.tail is None
        table = seq.tables[group]
        return bool(table) and self._pools[group].ref_count(table[-1]) == 1

    def go_on(self, group: int, seq: SequenceKV, num_entries: int) -> list[int]:
        """New entries of the table, of which the last is where the state goes: on in its block, or
        into a new one when the block is a snapshot. A snapshot never costs anybody else's blocks:
        where no block is free, it is given up."""
        if not num_entries:
            return []
        pool, table = self._pools[group], seq.tables[group]
        block = table[-1] if table else -1
        if block >= 0 and pool.ref_count(block) == 1:
            if not pool.num_free:
                pool.forget(block)
            if pool.node(block) is None:
                table[-1] = -1
                # Before it there may be one that was loaded, and is yet to be gone on from.
                if seq.first_held[group] == len(table) - 1:
                    seq.first_held[group] += num_entries
                return [-1] * (num_entries - 1) + [block]
        return [-1] * (num_entries - 1) + pool.allocate(1)

    def go_on_from_copy(self, group: int, seq: SequenceKV, num_entries: int) -> list[int]:
        """The same from amid a block: a copy of the state stands where the step reads it, and is
        where it goes."""
        [block] = self._pools[group].allocate(1)
        seq.first_held[group] = len(seq.tables[group]) + num_entries - 1
        return [block] + [-1] * (num_entries - 2) + [block] * (num_entries > 1)
