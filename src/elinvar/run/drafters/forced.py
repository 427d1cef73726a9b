"""Drafts that a grammar forces: names of fields, words of an enumeration, whatever text must follow.

The text must come, its cut into tokens is the model's choice, so these are drafts as others are. Between
forced texts come white space and values: what was said before tells those (run/drafters/suffix.py), so that
a chain may hold the name of a field, its value and the name of the next. The other drafter then has no more
to say of the row. To look ahead takes a tenth of a millisecond, so what was seen serves as long as it comes
true, and where drafts are dear what the other one says is good enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from elinvar.run.drafters.api import Ask, Guess, Seen
from elinvar.run.drafters.suffix import SuffixDrafter
from elinvar.run.grammar import Masks
from elinvar.run.rows import Rows

CUT = 0.95
"""Chance that a forced text is cut as its encoding is."""
LEAST = 0.2
"""Where a whole chain is less likely than this, it ends."""
NEAR = 4
"""Drafts that must be left of what was seen, if it did not end by itself."""

DEAR = 0.125
"""`Ask.least` from which on the other drafter speaks alone: drafts pay from a chance of a half on, and a look
takes longer than those that it finds besides save."""


@dataclass(slots=True)
class _Ahead:
    """What was seen of a row."""

    start: int
    """Index of the first draft."""
    chain: Guess
    is_cut: bool = True
    """It might go on."""

    def serves(self, known: Sequence[int]) -> bool:
        """Whether what is known since then came as it was seen, and there is more."""
        tokens, count = self.chain.tokens, len(known)
        return tokens[:count] == known and len(tokens) >= count + (NEAR if self.is_cut else 1)

    def behind(self, first: int, most: int) -> Guess:
        here = slice(first, first + most)
        return Guess(self.chain.tokens[here], self.chain.chances[here], is_allowed=True)


class ForcedDrafter:
    name = "forced"
    is_instant = True
    reads_hidden = False

    def __init__(self, rows: Rows, masks: Masks, suffix: SuffixDrafter | None = None) -> None:
        """suffix: one that is told what is seen and forgotten."""
        self._token_ids, self._masks, self._suffix = rows.token_ids, masks, suffix
        self._ahead: dict[int, _Ahead] = {}
        """By row."""

    def may_guess(self, row: int) -> bool:
        """Where no row has a grammar it is not even asked."""
        return self._masks.has_grammar(row)

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        return [self._propose(ask) if self._is_worth_a_look(ask) else Guess() for ask in asks]

    def _is_worth_a_look(self, ask: Ask) -> bool:
        is_dear = self._suffix is not None and ask.least > DEAR
        return self.may_guess(ask.row) and not is_dear

    def _propose(self, ask: Ask) -> Guess:
        ahead, known = self._ahead.get(ask.row), list[int]()
        if ahead is not None:
            known = self._token_ids[ask.row, ahead.start : ask.num_tokens].tolist()
        if ahead is None or not ahead.serves(known):
            ahead, known = self._look(ask), []
            if ahead is None:
                return Guess()
            self._ahead[ask.row] = ahead
        if self._suffix is not None:
            self._suffix.spoken_for(ask)
        return ahead.behind(len(known), ask.most)

    def _look(self, ask: Ask) -> _Ahead | None:
        """None: nothing is known of what follows."""
        known = self._masks.matcher_at(ask.row, ask.num_tokens, self._token_ids)
        assert known is not None
        tokens, said = known.forced(), Guess()  # said: by the other drafter
        if not tokens:
            said = self._follow(ask, (), ask.most)
            if not said.tokens:
                return None
        matcher, likely, least = known.copy(), 1.0, max(LEAST, ask.least)
        ahead = _Ahead(ask.num_tokens, chain := Guess())
        while (room := ask.most - len(chain.tokens)) and likely >= least:
            if tokens:
                more = Guess(tokens[:room], [CUT] * min(room, len(tokens)))
            else:
                more = said if said.tokens else self._follow(ask, chain.tokens, room)
            # Of what was said as much as may be: what is forced within it is spelled alike.
            count = matcher.take(more.tokens)
            if not count:
                ahead.is_cut = False
                break
            chain.tokens += more.tokens[:count]
            chain.chances += more.chances[:count]
            likely *= prod(more.chances[:count])
            tokens, said = matcher.forced(), Guess()
        return ahead

    def _follow(self, ask: Ask, ahead: Sequence[int], most: int) -> Guess:
        if self._suffix is None:
            return Guess()
        return self._suffix.follow(ask, ahead, most)

    def observe(self, seen: Seen) -> None:
        pass

    def forget(self, row: int) -> None:
        self._ahead.pop(row, None)
