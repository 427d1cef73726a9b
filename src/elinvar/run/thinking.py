"""Thoughts that have their budget: which token comes next where one must end.

That follows from the answer's tokens and its budget alone. So it is the same whatever else runs, and a
row that is started again reads the tokens that its answer has.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np

from elinvar.base.batch import I32
from elinvar.base.plan import RowStart
from elinvar.base.thinking import ThinkingBudget
from elinvar.ops.arguments import SampleArgs


class ThinkingState:
    """Where an answer stands after the tokens that it was told of."""

    __slots__ = ("_budget", "_matched", "num_read", "num_thought", "thinks")
    """Copied where drafts are read, which may not come true."""

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self.thinks = budget.is_open
        self.num_read = 0
        self.num_thought = 0
        """Tokens of thoughts so far, with those that may belong to what closes one."""
        self._matched = 0
        """How much of the next marker, what opens or what closes, the tokens end with."""

    @property
    def forced(self) -> int | None:
        """The only token that may follow; None: any."""
        if not self.thinks or self.num_thought < self._budget.max_tokens:
            return None
        return self._budget.end[self._matched]

    def read(self, tokens: Sequence[int]) -> None:
        self.num_read += len(tokens)
        for token in tokens:
            marker = self._budget.end if self.thinks else self._budget.begin
            self._matched = _advanced(marker, self._matched, token)
            self.num_thought += self.thinks
            if marker and self._matched == len(marker):
                self.num_thought -= len(marker) if self.thinks else 0
                self.thinks, self._matched = not self.thinks, 0


def _advanced(marker: Sequence[int], matched: int, token: int) -> int:
    """The longest beginning of the marker that ends with the token, where `matched` of it came before."""
    for length in range(min(matched + 1, len(marker)), 0, -1):
        before = matched + 1 - length
        if marker[length - 1] == token and marker[: length - 1] == marker[before:matched]:
            return length
    return 0


def _allowed(args: SampleArgs, at: int, token: int) -> bool:
    """Whether all masks that the row has so far do."""
    if args.masks is None or args.mask_rows is None:
        return True
    words = args.masks[args.mask_rows == at, token // 32]
    return bool((words >> np.uint32(token % 32) & 1).all())


class ThinkingRows:
    """The rows whose requests have a budget."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[ThinkingBudget, int, ThinkingState]] = {}

    def start(self, started: RowStart) -> None:
        """The row is this request's from now on."""
        self._rows.pop(started.row, None)
        if (budget := started.params.thinking) is not None:
            self._rows[started.row] = budget, started.num_prompt_tokens, ThinkingState(budget)

    def limit(
        self,
        args: SampleArgs,
        rows_L: Sequence[int],
        position_L: I32,
        token_ids: I32,
        vocab_size: int,
    ) -> None:
        """Gives `args` masks of the rows whose thoughts must end, where those it has let them: amid a
        character a grammar does not. token_ids: of all rows, known up to the positions that are
        sampled."""
        if not self._rows or self._rows.keys().isdisjoint(rows_L):
            return
        forced: list[tuple[int, int]] = []
        last, state = -1, None
        for at, (row, position) in enumerate(zip(rows_L, position_L.tolist(), strict=True)):
            if row in self._rows:
                if row != last:
                    state = self._at(row, position, token_ids)
                else:  # what follows the first position of a row are drafts
                    assert state is not None
                    state = copy(state)
                    state.read([token_ids.item(row, position - 1)])
                last = row
                if state.forced is not None and _allowed(args, at, state.forced):
                    forced.append((at, state.forced))
        if forced:
            masks = np.zeros((len(forced), -(-vocab_size // 32)), np.uint32)
            for mask, (_, token) in zip(masks, forced, strict=True):
                mask[token // 32] = np.uint32(1 << token % 32)
            args.add_masks(masks, np.array([at for at, _ in forced], np.int32))

    def _at(self, row: int, position: int, token_ids: I32) -> ThinkingState:
        _, num_prompt, state = self._rows[row]
        state.read(token_ids[row, num_prompt + state.num_read : position].tolist())
        return state
