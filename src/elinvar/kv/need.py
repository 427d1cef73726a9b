"""Need: how many blocks sequences will still take, give back, or compute again.

What is asked before somebody is let in or sent away; it holds nothing and changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from elinvar.base.config import KVSpec
from elinvar.kv.match import Kept
from elinvar.kv.pool import BlockPool
from elinvar.kv.sequence import Prefix, SequenceKV

NEVER = sys.maxsize


class Need:
    """windows: of each group, as Match has them. states: groups of recurrent states."""

    def __init__(
        self,
        specs: Sequence[KVSpec],
        pools: Sequence[BlockPool],
        windows: Sequence[int | None],
        states: Sequence[int],
    ) -> None:
        self.block_size = specs[0].block_size
        self.pools, self.windows = pools, windows
        self._states = states
        self._full = [g for g, w in enumerate(windows) if w is None]
        self.max_sequence = min(self._alone(g) for g in range(len(specs)))
        """Most tokens that one sequence, alone, can have in blocks."""

    def _span(self, num_tokens: int) -> int:
        """Most blocks that `num_tokens` successive positions can touch."""
        return (num_tokens - 2) // self.block_size + 2

    def _alone(self, group: int) -> int:
        window, num_blocks = self.windows[group], self.pools[group].num_blocks
        if group in self._states:
            return NEVER if num_blocks else 0
        if window is not None and num_blocks >= self._span(window):
            return NEVER
        return num_blocks * self.block_size

    def longest(self, kept: Kept | None) -> int:
        """Most tokens that a sequence which keeps so much, alone, can have."""
        if kept is None:
            return self.max_sequence
        return min(
            NEVER
            if window is None and self.pools[group].num_blocks > sum(kept)
            else self._alone(group)
            for group, window in enumerate(self.windows)
        )

    def to_come(
        self,
        held: Sequence[int],
        reach: int,
        num_tokens: int,
        chunk: int,
        kept: Kept | None = None,
    ) -> list[int]:
        """Per group: blocks that a sequence will still take until `num_tokens` are computed in
        steps of at most `chunk`, when it holds `held` and its tables have `reach` entries. Of
        states, none but its own: it can give up its snapshots."""
        left = max(0, -(-num_tokens // self.block_size) - reach)
        most = NEVER if kept is None else sum(kept) + self._span(chunk)
        need = [
            min(left, max(0, (most if window is None else self._span(window - 1 + chunk)) - have))
            for window, have in zip(self.windows, held, strict=True)
        ]
        for group in self._states:
            need[group] = 0
        return need

    def to_come_for(self, seq: SequenceKV, num_tokens: int, chunk: int) -> list[int]:
        """`to_come` of a sequence that has begun."""
        return self.to_come(self.held(seq), len(seq.tables[0]), num_tokens, chunk, seq.kept)

    def spare(self, num_sequences: int) -> list[int]:
        """Per group: blocks that so many running sequences should find beyond those `to_come`."""
        return [0 if g in self._states else num_sequences for g in range(len(self.pools))]

    def can_admit(self, prefix: Prefix, num_tokens: int, chunk: int, reserve: list[int]) -> bool:
        """Whether a sequence that starts with `prefix` can compute all its `num_tokens` and leave
        `reserve` blocks of each group to those already running."""
        held = [len(blocks) - blocks.count(-1) for blocks in prefix.blocks]
        need = self.to_come(held, len(prefix.path), num_tokens, chunk, prefix.kept)
        for group in self._states:
            need[group] = 1
        return all(
            more + taken + kept <= pool.num_free
            for pool, more, taken, kept in zip(
                self.pools, need, prefix.num_taken, reserve, strict=True
            )
        )

    def held(self, seq: SequenceKV) -> list[int]:
        """Per group: most blocks that freeing the sequence could give back."""
        reach = len(seq.tables[0])
        held = [reach - first for first in seq.first_held]
        for group in self._full:
            held[group] -= seq.num_hidden + len(seq.dropped)
        return held

    def lost(self, seq: SequenceKV, num_computed: int) -> int:
        """Tokens that the sequence would compute again if it gave its blocks back and others took
        them: all but those whose blocks others hold, too."""
        shared = 0
        for group, table in enumerate(seq.tables):
            if self.windows[group] is None:
                count = self.pools[group].ref_count
                mine = (i for i, b in enumerate(table) if b < 0 or count(b) < 2)
                first = next(mine, len(table))
                shared = first * self.block_size
                break
        return max(0, num_computed - shared)
