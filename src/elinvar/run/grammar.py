"""Masks of rows whose answers keep to a grammar, computed beside the forward pass.

Owns the thread that computes them. A mask follows from the grammar and the answer's tokens so far:
neither when it is ready nor who else has one changes a bit, and a row that is started again accepts
the tokens that its answer has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from elinvar.base.batch import I32
from elinvar.base.errors import EngineError
from elinvar.base.grammar import Grammar
from elinvar.base.plan import RowStart

U32 = NDArray[np.uint32]


class Matcher(Protocol):
    """Where one answer stands in its grammar: a function of its tokens."""

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by tokens that its masks allowed."""
        ...

    def rewind(self, count: int) -> None:
        """Take back the last `count` tokens."""
        ...

    def num_valid(self, tokens: Sequence[int]) -> int:
        """How many of these may follow, one after the other."""
        ...

    def take(self, tokens: Sequence[int]) -> int:
        """Go on by as many of these as may follow; how many."""
        ...

    def copy(self) -> Matcher:
        """Another one at the same place, which goes its own way."""
        ...

    def forced(self) -> list[int]:
        """How the text that must follow is most likely cut into tokens; empty where nothing must. Other
        tokens may follow nevertheless: those that have the same bytes."""
        ...

    def mask(self, into: U32) -> None:
        """[ceil(V / 32)] Which tokens may follow; where the answer is complete, end tokens, too. Raises
        EngineError where that takes more than a step may."""
        ...


@dataclass(slots=True)
class _Row:
    """A row with a grammar."""

    matcher: Matcher
    num_known: int
    """Tokens of the sequence that are the prompt's, or that the matcher has accepted."""
    drafts: list[int] = field(default_factory=list)
    """The last of those, which were accepted before anybody knew."""


@dataclass(slots=True)
class Ready:
    """As SampleArgs has them."""

    masks: U32
    mask_rows: I32
    failed: dict[int, str]
    """Of the L rows those that have no mask, and why."""


class Masks:
    def __init__(self, vocab_size: int, matcher: Callable[[Grammar], Matcher]) -> None:
        """vocab_size: V. matcher: makes one, at the start of its grammar."""
        self._num_words = -(-vocab_size // 32)
        self._matcher = matcher
        self._rows: dict[int, _Row] = {}
        self._worker: ThreadPoolExecutor | None = None

    def start(self, started: RowStart) -> None:
        """The row is this request's from now on."""
        self.release(started.row)
        if (grammar := started.params.grammar) is not None:
            self._rows[started.row] = _Row(self._matcher(grammar), started.num_prompt_tokens)

    def release(self, row: int) -> None:
        self._rows.pop(row, None)

    def begin(self, rows_L: Sequence[int], position_L: I32, token_ids: I32) -> Future[Ready] | None:
        """Compute the masks of the tokens at these positions of these rows; None where nobody has one.
        token_ids: of all rows, known up to there."""
        if not self._rows or self._rows.keys().isdisjoint(rows_L):
            return None
        work = []
        last = -1
        for at, (row, position) in enumerate(zip(rows_L, position_L.tolist(), strict=True)):
            if (own := self._rows.get(row)) is not None:
                if row != last:
                    self._settle(own, position, token_ids[row])
                tokens = token_ids[row, own.num_known : position].tolist()
                if row == last:  # what follows the first position of a row are drafts
                    own.drafts += tokens
                work.append((at, own.matcher, tokens))
                own.num_known = position
            last = row
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "elinvar-masks")
        return self._worker.submit(self._compute, work)

    def has_grammar(self, row: int) -> bool:
        return row in self._rows

    def num_valid(self, row: int, position: int, tokens: Sequence[int], token_ids: I32) -> int:
        """How many of these may follow in the row, of which what is before `position` is known."""
        matcher = self.matcher_at(row, position, token_ids)
        return len(tokens) if matcher is None else matcher.num_valid(tokens)

    def matcher_at(self, row: int, position: int, token_ids: I32) -> Matcher | None:
        """Behind the row's known tokens, those before `position`; to be asked, not to be moved. None: the
        row has no grammar."""
        own = self._rows.get(row)
        if own is None:
            return None
        self._settle(own, position, token_ids[row])
        own.matcher.accept(token_ids[row, own.num_known : position].tolist())
        own.num_known = position
        return own.matcher

    def _settle(self, own: _Row, position: int, tokens: I32) -> None:
        """Of the drafts that its matcher went on by it keeps those that came true."""
        first = own.num_known - len(own.drafts)
        true = 0
        for draft in own.drafts[: position - first]:
            if tokens.item(first + true) != draft:
                break
            true += 1
        if wrong := len(own.drafts) - true:
            own.matcher.rewind(wrong)
            own.num_known -= wrong
        own.drafts = []

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()

    def _compute(self, work: Sequence[tuple[int, Matcher, list[int]]]) -> Ready:
        masks = np.zeros((len(work), self._num_words), np.uint32)
        failed: dict[int, str] = {}
        for (at, matcher, tokens), mask in zip(work, masks, strict=True):
            try:
                matcher.accept(tokens)
                matcher.mask(mask)
            except EngineError as error:
                failed[at] = str(error)
        return Ready(masks, np.array([at for at, *_ in work], np.int32), failed)
