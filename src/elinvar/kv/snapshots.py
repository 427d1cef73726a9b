"""Snapshots: where a sequence leaves its recurrent state behind, so that others may begin there.

A state replaces the one before it, so only states that were left on a block border can be found
again, and one can weigh as much as thousands of tokens of keys. This decides which borders are worth
it; taking, publishing and evicting the blocks is the manager's (docs/design/010-recurrent-state.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from elinvar.base.config import KVSpec

_SHORT = 2
"""Blocks: to compute fewer again costs less than the step that a chunk's end adds."""


class Snapshots:
    def __init__(self, specs: Sequence[KVSpec]) -> None:
        self._size = specs[0].block_size
        states = sum(spec.block_bytes for spec in specs if spec.state is not None)
        others = sum(spec.block_bytes for spec in specs if spec.state is None)
        self._every = max(_SHORT, -(-states // others) if others else _SHORT) * self._size
        """Positions from one to the next of those that every sequence leaves: until then keys and
        values have taken as much memory as the snapshot."""

    def marks(self, start: int, shared: int, num_tokens: int) -> tuple[int, ...]:
        """Positions at which a sequence of `num_tokens` known tokens, computed from `start` on,
        leaves one: where it parts from another (`shared`: what is cached of it in the groups that
        keep every block), since a third is likely to part there, too, and at its last border,
        where the same tokens, or a continuation, can go on."""
        last = (num_tokens - 1) // self._size * self._size
        least = start + _SHORT * self._size
        return tuple(mark for mark in sorted({shared, last}) if mark >= least)

    def cut(self, marks: tuple[int, ...], start: int, end: int) -> int:
        """Where a chunk from `start` that would reach `end` ends, to leave the next one."""
        return min(end, self._next(start), *(mark for mark in marks if mark > start))

    def keeps(self, marks: tuple[int, ...], position: int) -> bool:
        """Whether the one at `position` stays when its sequence leaves another."""
        return position in marks or position % self._every == 0

    def _next(self, start: int) -> int:
        return (start // self._every + 1) * self._every
