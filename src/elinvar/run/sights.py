"""Sights: what each row sees of its past, and how a step finds it (docs/design/021-long-memory.md).

A row may see its first blocks and its last ones alone, or those that were chosen of its prompt and what
came after it. Attention then gets them side by side, as if there were no others: tables and positions
are data, and no kernel knows. Where what is seen depends on the block of the token that looks, a span
over several blocks becomes as many sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from elinvar.base.batch import I32, Sight
from elinvar.base.config import BLOCK_SIZE

_MIN_WIDTH = 16

Part = tuple[int, int, int, I32 | slice]
"""Of a span: position of the first token, and after the last one; how many blocks before that these do
not see, and which they see."""


class View(Protocol):
    """What a row sees."""

    def parts(self, start: int, stop: int) -> Iterator[Part]: ...


class Everything:
    def parts(self, start: int, stop: int) -> Iterator[Part]:
        yield start, stop, 0, slice(_num_blocks(stop))


@dataclass(slots=True)
class Ends:
    """The first blocks, and the last ones before that of the token that looks."""

    num_first: int
    num_last: int

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        while start < stop:
            hidden = max(0, start // BLOCK_SIZE - self.num_last - self.num_first)
            after = (self.num_first + self.num_last + hidden + 1) * BLOCK_SIZE
            seen = np.arange(_num_blocks(min(after, stop)) - hidden, dtype=np.int32)
            seen[self.num_first :] += hidden
            yield start, min(after, stop), hidden, seen
            start = after


@dataclass(slots=True)
class Chosen:
    """Some blocks of the first `num_blocks`, ascending, and all behind them."""

    blocks: I32
    num_blocks: int

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        behind = np.arange(self.num_blocks, _num_blocks(stop), dtype=np.int32)
        hidden = self.num_blocks - len(self.blocks)
        yield start, stop, hidden, np.concatenate([self.blocks, behind])


_EVERYTHING = Everything()


class Sights:
    def __init__(self, max_rows: int, full: Sequence[bool], tables: Sequence[I32]) -> None:
        """full: of each group, whether its layers see everything; tables: the rows' own."""
        self._full, self._tables = full, tables
        self._views: list[View] = [_EVERYTHING] * max_rows
        self._partial: set[int] = set()
        """Rows that do not see everything."""

    def start(self, row: int, kept: tuple[int, int] | None) -> None:
        """kept: as in SamplingParams.kept_blocks."""
        self._set(row, _EVERYTHING if kept is None else Ends(*kept))

    def choose(self, row: int, blocks: Sequence[int], num_blocks: int) -> None:
        """From now on it sees these of its first blocks and all behind them."""
        self._set(row, Chosen(np.array(blocks, np.int32), num_blocks))

    def _set(self, row: int, view: View) -> None:
        self._views[row] = view
        (self._partial.discard if view is _EVERYTHING else self._partial.add)(row)

    def gather(
        self, rows: Sequence[int], starts: Sequence[int], stops: Sequence[int]
    ) -> Sight | None:
        """Of a span of tokens a row; None where everybody sees everything."""
        if self._partial.isdisjoint(rows):
            return None
        parts = [
            (row, part)
            for row, start, stop in zip(rows, starts, stops, strict=True)
            for part in self._views[row].parts(start, stop)
        ]
        places = [np.arange(a, b, dtype=np.int32) - BLOCK_SIZE * n for _, (a, b, n, _) in parts]
        lens = np.array([b - BLOCK_SIZE * n for _, (_, b, n, _) in parts], np.int32)
        return Sight(
            np.cumsum([0, *map(len, places)], dtype=np.int32),
            lens,
            self._block_tables(parts, table_width(int(lens.max()))),
            np.concatenate(places),
        )

    def _block_tables(self, parts: Sequence[tuple[int, Part]], width: int) -> tuple[I32, ...]:
        found = []
        for full, table in zip(self._full, self._tables, strict=True):
            tables = np.full((len(parts) if full else 1, width), -1, np.int32)
            for to, (row, (_, stop, hidden, seen)) in zip(
                tables, parts if full else [], strict=False
            ):
                to[: _num_blocks(stop) - hidden] = table[row, seen]
            found.append(tables)
        return tuple(found)


def _num_blocks(num_positions: int) -> int:
    return -(-num_positions // BLOCK_SIZE)


def table_width(num_positions: int) -> int:
    """Columns of a step's block tables: a power of two, so that steps of one shape come often."""
    return max(_MIN_WIDTH, 1 << (_num_blocks(num_positions) - 1).bit_length())
