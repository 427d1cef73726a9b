"""Medusa: each head guesses the token at its own distance from what the target knew last.

Owns the state of each row's last computed token. The heads do not see each other's guesses: a chain of
them is as good as its first ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elinvar.base.batch import I32
from elinvar.nn.medusa import MedusaHeads
from elinvar.ops.api import Ops
from elinvar.run.drafters.api import Ask, Guess, Seen
from elinvar.run.drafters.draws import draw
from elinvar.run.drafters.heads import num_computed
from elinvar.run.rows import Rows


class MedusaDrafter:
    name = "medusa"
    is_instant = False
    reads_hidden = True

    def __init__(self, heads: MedusaHeads, dim: int, ops: Ops, rows: Rows) -> None:
        """dim: D of the target's states."""
        self._dim = dim
        self._heads, self._ops, self._rows = heads, ops, rows
        self._states = ops.place(np.zeros((len(rows.token_ids), dim), np.float32))
        self._known = [-1] * len(rows.token_ids)
        """Of each row: the index behind the token that its state is of."""

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        guesses = [Guess() for _ in asks]
        ready = [i for i, ask in enumerate(asks) if self._known[ask.row] == ask.num_tokens - 1]
        for k in range(self._heads.num_heads):
            live = [i for i in ready if asks[i].most > k]
            if not live:
                break
            rows_L = [asks[i].row for i in live]
            position_L: I32 = np.array([asks[i].num_tokens + k for i in live], np.int32)
            logits_LV = self._heads.logits(self._states[rows_L], k)
            some = [guesses[i] for i in live]
            draw(self._ops, self._rows, some, rows_L, position_L, logits_LV)
        return guesses

    def observe(self, seen: Seen) -> None:
        assert seen.hidden is not None
        rows, lasts = [item.row for item in seen.items], []
        for item, sampled, first in zip(seen.items, seen.sampled, seen.firsts, strict=True):
            count = num_computed(item, sampled)
            self._known[item.row] = item.start + count
            lasts.append(first + count - 1)
        states_RD = self._ops.columns(seen.hidden[lasts], 0, self._dim)
        self._states[rows] = self._ops.stack([states_RD])

    def forget(self, row: int) -> None:
        self._known[row] = -1
