"""Sights: what each row sees of its past, and how a step finds it (docs/design/021-long-memory.md).

A row may see its first blocks and its last ones alone. Attention then gets them side by side, as if
there were no others: tables and positions are data, and no kernel knows. What is seen depends on the
block of the token that looks, so a span over several blocks becomes as many sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elinvar.base.batch import I32, Sight
from elinvar.base.config import BLOCK_SIZE

_MIN_WIDTH = 16


class Sights:
    def __init__(self, max_rows: int, full: Sequence[bool], tables: Sequence[I32]) -> None:
        """full: of each group, whether its layers see everything; tables: the rows' own."""
        self._full, self._tables = full, tables
        self._kept: list[tuple[int, int] | None] = [None] * max_rows
        self._any = False

    def start(self, row: int, kept: tuple[int, int] | None) -> None:
        """kept: as in SamplingParams.kept_blocks."""
        self._kept[row] = kept
        self._any = any(self._kept)

    def gather(
        self, rows: Sequence[int], starts: Sequence[int], stops: Sequence[int]
    ) -> Sight | None:
        """Of a span of tokens a row; None where everybody sees everything."""
        if not self._any or not any([self._kept[row] for row in rows]):
            return None
        spans = []
        """(row, position of the first token, and after the last one, blocks not seen)"""
        for row, start, stop in zip(rows, starts, stops, strict=True):
            kept = self._kept[row]
            while kept is not None and start < stop:
                num_first, num_last = kept
                hidden = max(0, start // BLOCK_SIZE - num_last - num_first)
                end = (num_first + num_last + hidden + 1) * BLOCK_SIZE
                spans.append((row, start, min(end, stop), hidden))
                start = end
            if kept is None:
                spans.append((row, start, stop, 0))
        places = [np.arange(a, b, dtype=np.int32) - BLOCK_SIZE * n for _, a, b, n in spans]
        lens = np.array([b - BLOCK_SIZE * n for _, _, b, n in spans], np.int32)
        return Sight(
            np.cumsum([0, *map(len, places)], dtype=np.int32),
            lens,
            self._block_tables(rows, spans, table_width(int(lens.max()))),
            np.concatenate(places),
        )

    def _block_tables(
        self, rows: Sequence[int], spans: list[tuple[int, int, int, int]], width: int
    ) -> tuple[I32, ...]:
        found = []
        for full, table in zip(self._full, self._tables, strict=True):
            seen = np.full((len(spans) if full else 1, width), -1, np.int32)
            for to, (row, _, stop, hidden) in zip(seen, spans if full else [], strict=False):
                kept, end = self._kept[row], -(-stop // BLOCK_SIZE)
                first = end if kept is None else min(kept[0], end)
                to[:first] = table[row, :first]
                to[first : end - hidden] = table[row, first + hidden : end]
            found.append(seen)
        return tuple(found)


def table_width(num_positions: int) -> int:
    """Columns of a step's block tables: a power of two, so that steps of one shape come often."""
    num_blocks = -(-num_positions // BLOCK_SIZE)
    return max(_MIN_WIDTH, 1 << (num_blocks - 1).bit_length())
