"""Drafts that a grammar forces: names of fields, words of an enumeration, whatever text must follow.

The text must come, its cut into tokens is the model's choice, so these are drafts as others are. Between
forced texts come white space and values: what was said before tells those (run/drafters/suffix.py), so that
a chain may hold the name of a field, its value and the name of the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from elinvar.run.drafters.api import Ask, Guess, Seen
from elinvar.run.drafters.suffix import SuffixDrafter
from elinvar.run.grammar import Masks
from elinvar.run.rows import Rows

CUT = 0.95
"""Chance that a forced text is cut as its encoding is."""
LEAST = 0.2
"""Where a whole chain is less likely than this, it ends."""


class ForcedDrafter:
    name = "forced"
    is_instant = True
    reads_hidden = False

    def __init__(self, rows: Rows, masks: Masks, suffix: SuffixDrafter | None = None) -> None:
        """suffix: one that is told what is seen and forgotten."""
        self._token_ids, self._masks, self._suffix = rows.token_ids, masks, suffix

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        return [self._propose(ask) for ask in asks]

    def _propose(self, ask: Ask) -> Guess:
        known = self._masks.matcher_at(ask.row, ask.num_tokens, self._token_ids)
        if known is None:
            return Guess()
        tokens, said = known.forced(), Guess()  # said: by the other drafter
        if not tokens:
            said = self._follow(ask, (), ask.most)
            if not said.tokens:
                return said
        matcher, chain, likely, is_forced = known.copy(), Guess(), 1.0, False
        least = max(LEAST, ask.least)
        while (room := ask.most - len(chain.tokens)) and likely >= least:
            if tokens:
                more, is_forced = Guess(tokens[:room], [CUT] * min(room, len(tokens))), True
            else:
                more = said if said.tokens else self._follow(ask, chain.tokens, room)
            # Of what was said as much as may be: what is forced within it is spelled alike.
            count = matcher.take(more.tokens)
            if not count:
                break
            chain.tokens += more.tokens[:count]
            chain.chances += more.chances[:count]
            likely *= prod(more.chances[:count])
            tokens, said = matcher.forced(), Guess()
        # Without anything forced the other drafter says as much.
        return chain if is_forced else Guess()

    def _follow(self, ask: Ask, ahead: Sequence[int], most: int) -> Guess:
        if self._suffix is None:
            return Guess()
        return self._suffix.follow(ask, ahead, most)

    def observe(self, seen: Seen) -> None:
        pass

    def forget(self, row: int) -> None:
        pass
