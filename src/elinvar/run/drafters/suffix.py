"""Drafts from what was said before: in the request's own text and in answers that ended lately.

Code that is edited, quotes, values that go into a JSON, agents that repeat themselves: the last tokens
have occurred before, and what followed them then follows again. The longest match is looked for
(ops/suffixes.py), and the most frequent of what followed is followed. Other requests' answers are shared
within a namespace only: how fast an answer comes tells whether somebody had the like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

from elinvar.ops.suffixes import Suffixes
from elinvar.run.drafters.api import Ask, Guess, Seen
from elinvar.run.rows import Rows

MOST_KEPT = 512 << 10
MOST_SHARED = 128 << 10
MOST_RUNNING = 2 << 20
"""Tokens in all corpora, in one of them, and in rows: some 25, 6 and 100 MB."""
LEAST = 0.02
"""Where a whole chain is less likely than this, it ends; or than half of what is asked for, as what came
may speak better of it."""


@dataclass(slots=True)
class _Answer:
    start: int
    stop: int
    """Of its tokens in its row: those known."""


class SuffixDrafter:
    name = "suffix"
    is_instant = True
    reads_hidden = False

    def __init__(
        self,
        rows: Rows,
        most_kept: int = MOST_KEPT,
        most_shared: int = MOST_SHARED,
        most_running: int = MOST_RUNNING,
    ) -> None:
        """Bounds as ops.suffixes.Suffixes has them."""
        self._namespaces = rows.namespaces
        self._index = Suffixes(rows.token_ids, most_kept, most_shared, most_running)
        self._answers: dict[int, _Answer] = {}
        self._spoken: dict[int, int] = {}
        """By row: the number of tokens for which another has said what it would."""

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        is_mine = [self._spoken.get(ask.row) != ask.num_tokens for ask in asks]
        found = iter(self._look(list(compress(asks, is_mine))))
        return [next(found) if mine else Guess() for mine in is_mine]

    def spoken_for(self, ask: Ask) -> None:
        """Another drafter's guess holds what it would say."""
        self._spoken[ask.row] = ask.num_tokens

    def follow(self, ask: Ask, ahead: Sequence[int], most: int) -> Guess:
        """What may follow the row's known tokens and, if they come, those ahead."""
        return self._look([Ask(ask.row, ask.num_tokens, most, ask.least)], ahead)[0]

    def _look(self, asks: Sequence[Ask], ahead: Sequence[int] = ()) -> list[Guess]:
        if not asks:
            return []
        for ask in asks:
            if ask.row not in self._answers:
                self._extend(ask.row, ask.num_tokens - 1, ask.num_tokens)
        least = max(LEAST, min(ask.least for ask in asks) / 2)
        wanted = [(ask.row, ask.num_tokens, ask.most) for ask in asks]
        return [Guess(*found) for found in self._index.propose(wanted, least, ahead)]

    def observe(self, seen: Seen) -> None:
        for item, sampled in zip(seen.items, seen.sampled, strict=True):
            if sampled:
                first = item.start + item.num_tokens - item.num_drafts
                self._extend(item.row, first, first + len(sampled))

    def forget(self, row: int) -> None:
        self._spoken.pop(row, None)
        if (answer := self._answers.pop(row, None)) is not None:
            self._index.forget(row, answer.start, answer.stop)

    def _extend(self, row: int, start: int, stop: int) -> None:
        """The row has tokens of an answer at start .. stop - 1, and nothing behind them."""
        if (answer := self._answers.get(row)) is not None:
            answer.stop = stop
        else:
            self._index.begin(row, self._namespaces[row])
            self._answers[row] = _Answer(start, stop)
