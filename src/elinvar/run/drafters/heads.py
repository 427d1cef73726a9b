"""Heads: drafts from the target's own hidden states (multi-token prediction, EAGLE).

A head makes of the state before a token and of the token a state of it, from which the token after it
is drawn; from that state and that draft the next one, and so on. Owns what a row needs for it: the
state of its last computed token. The heads' cache lies in the row's blocks, so that what it holds is
found, kept and shared with them. A forward of a head costs about the same for a token as for a hundred, so
states wait until somebody asks, or until there are many. After a prefix hit nobody knows the state before
the first token that is computed: in its slot the heads see zeros instead, and guess again a step later.

Legend: T tokens, D model dim, L rows, V vocabulary; a row's num_tokens is n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol, cast

import numpy as np

from elinvar.base.batch import I32, DecodeBatch, ForwardBatch
from elinvar.base.plan import PlanItem
from elinvar.models.family import Model
from elinvar.ops.api import F32, Ops
from elinvar.run.drafters.api import Ask, Guess, Seen
from elinvar.run.drafters.draws import draw
from elinvar.run.graphs import Graphs
from elinvar.run.rows import Rows

_NOTHING = -1
WAITING = 128
"""States that may wait, of all rows together."""


class Heads(Protocol):
    """nn.mtp.MTPDecoder and nn.eagle have them."""

    num_heads: int
    """Beyond them the last one goes on from its own states."""
    head_dim: int
    """D"""

    def features(self, hidden_TX: F32) -> F32:
        """What a head sees of the target's states -> [T, D]."""
        ...

    def draft(self, batch: ForwardBatch, before_TD: F32, kv: Any, head: int = 0) -> F32:
        """As in nn.mtp.MTPDecoder -> [L, D]."""
        ...

    def draft_logits(self, h_LD: F32) -> F32:
        """[L, V]"""
        ...


@dataclass(frozen=True, slots=True)
class _Span:
    """Tokens of a row, of which something lies from `first` on in an array with a row a token."""

    row: int
    start: int
    stop: int
    first: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def places(self) -> I32:
        return np.arange(self.first, self.first + self.count, dtype=np.int32)

    @property
    def item(self) -> PlanItem:
        return _item(self.row, self.start, self.count)

    def since(self, start: int) -> _Span:
        """Without the tokens before this position."""
        start = max(self.start, start)
        return _Span(self.row, start, self.stop, self.first + start - self.start)


class _Head:
    """One as run.graphs takes a model; before_TD: where its inputs will be."""

    def __init__(self, heads: Heads, head: int, before_TD: F32) -> None:
        self._heads, self._head, self._before = heads, head, before_TD

    def forward(self, batch: ForwardBatch, kv: Any) -> F32:
        return self._heads.draft(batch, self._before[: batch.num_tokens], kv, self._head)


class HeadsDrafter:
    is_instant = False
    reads_hidden = True

    def __init__(
        self,
        name: str,
        heads: Heads,
        ops: Ops,
        kv: Any,
        rows: Rows,
        spare: Sequence[int] = (),
    ) -> None:
        """kv: as `heads.draft` takes it. spare: as in run.graphs."""
        self.name = name
        self._heads, self._ops, self._kv, self._rows = heads, ops, kv, rows
        max_rows = len(rows.token_ids)
        self._at = [_NOTHING] * max_rows
        """Of each row: before this position its slots hold what they should."""
        empty = np.zeros((max_rows, heads.head_dim), np.float32)
        self._before = [ops.place(empty.copy()) for _ in range(heads.num_heads)]
        """Of each head [rows, D] what it needs for its slot at that position: the state of the token
        before it, from the target or from the head before. After `propose` the target's is not known
        yet."""
        most = ops.graph_size(max_rows)
        self._inputs = ops.place(np.zeros((most, heads.head_dim), np.float32))
        self._waiting: list[_Span] = []
        self._states: F32 | None = None
        """[WAITING, D] the target's, of the spans that wait."""
        self._graphs = [
            Graphs(cast("Model", _Head(heads, head, self._inputs)), ops, kv, spare=spare)
            for head in range(heads.num_heads)
        ]

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        self.catch_up()
        guesses = [Guess() for _ in asks]
        live = [
            (ask, guess)
            for ask, guess in zip(asks, guesses, strict=True)
            if ask.num_tokens > self._heads.num_heads and self._at[ask.row] == ask.num_tokens - 1
        ]
        last = self._heads.num_heads - 1
        before = [states[[ask.row for ask, _ in live]] for states in self._before] if live else []
        for k in range(max((ask.most for ask, _ in live), default=0)):
            going = [i for i, (ask, _) in enumerate(live) if ask.most > k]
            if len(going) < len(live):
                live, before = [live[i] for i in going], [states[going] for states in before]
            asked = [ask for ask, _ in live]
            # The head that guesses and those after it, whose next slots see this one.
            leader = min(k, last)
            batch = self._batch([_item(ask.row, ask.num_tokens - 1 + k, 1) for ask in asked])
            states = {
                head: self._draft(batch, before[head], head) for head in range(leader, last + 1)
            }
            if k == 0:
                self._reached(asked, states)
            rows_L = [ask.row for ask in asked]
            position_L = np.array([ask.num_tokens + k for ask in asked], np.int32)
            logits_LV = self._heads.draft_logits(states[leader])
            draw(self._ops, self._rows, [guess for _, guess in live], rows_L, position_L, logits_LV)
            before = [states[max(head - 1, leader)] for head in range(last + 1)]
        return guesses

    def _draft(self, batch: DecodeBatch | ForwardBatch, before_LD: F32, head: int) -> F32:
        """The states [L, D] of tokens that decode: such forwards are recorded."""
        self._inputs[: len(before_LD)] = before_LD
        return self._ops.stack([self._graphs[head].forward(batch)])

    def _reached(self, asks: Sequence[Ask], states: dict[int, F32]) -> None:
        """The slots of the last known tokens: no draft was needed for them."""
        rows = [ask.row for ask in asks]
        for head in range(1, self._heads.num_heads):
            self._before[head][rows] = states[head - 1]
        for ask in asks:
            self._at[ask.row] = ask.num_tokens

    def observe(self, seen: Seen) -> None:
        assert seen.hidden is not None
        spans = [
            _Span(item.row, item.start, item.start + num_computed(item, sampled), first)
            for item, sampled, first in zip(seen.items, seen.sampled, seen.firsts, strict=True)
        ]
        num_waiting = sum(span.count for span in self._waiting)
        count = sum(span.count for span in spans)
        if num_waiting + count > WAITING:
            self.catch_up()
            num_waiting = 0
        if count > WAITING:
            self._see(spans, seen.hidden)
            return
        if self._states is None:
            width = seen.hidden.shape[1]
            self._states = self._ops.place(np.zeros((WAITING, width), np.float32))
        places = np.concatenate([span.places for span in spans])
        self._states[num_waiting : num_waiting + count] = seen.hidden[places]
        for span in spans:
            self._waiting.append(replace(span, first=num_waiting))
            num_waiting += span.count

    def catch_up(self) -> None:
        """See the states that wait, each row's one after the other."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        assert self._states is not None
        waiting.sort(key=lambda span: (span.row, span.start))
        spans, first = list[_Span](), 0
        for row, group in groupby(waiting, key=lambda span: span.row):
            own = list(group)
            spans.append(_Span(row, own[0].start, own[-1].stop, first))
            first += spans[-1].count
        self._see(spans, self._states[np.concatenate([span.places for span in waiting])])

    def _see(self, spans: Sequence[_Span], hidden_TX: F32) -> None:
        """hidden: the target's states, of the spans among others."""
        begins = [self._resume(span) for span in spans]
        for span in spans:
            self._at[span.row] = span.stop
        spans, states_TD = self._shifted(0, spans, self._heads.features(hidden_TX))
        pairs = zip(spans, begins, strict=True)
        self._write([span.since(begin) for span, begin in pairs], states_TD)

    def _resume(self, span: _Span) -> int:
        """The first position whose slots are to be written; what they need is in _before."""
        row, at = span.row, self._at[span.row]
        if at in (span.start, span.start + 1):
            return at
        for states in self._before:
            states[row] = 0
        return span.start

    def _write(self, spans: Sequence[_Span], states_TD: F32) -> None:
        """The slots of `spans`; states: of each token the target's state of the one before it."""
        last = self._heads.num_heads - 1
        for head in range(last + 1):
            # The first tokens of a sequence have no slot of this head.
            spans = [span for one in spans if (span := one.since(head + 1)).count > 0]
            if not spans:
                return
            batch = self._batch([span.item for span in spans])
            if isinstance(batch, DecodeBatch):
                batch = batch.flat()
            # Of the last head only keys and values are wanted.
            count = 0 if head == last else batch.num_tokens
            batch = replace(batch, logit_rows=np.arange(count, dtype=np.int32))
            before_TD = states_TD[np.concatenate([span.places for span in spans])]
            h_TD = self._heads.draft(self._ops.upload(batch), before_TD, self._kv, head)
            if head < last:
                firsts = batch.query_start_loc[:-1].tolist()
                pairs = zip(spans, firsts, strict=True)
                spans = [replace(span, first=first) for span, first in pairs]
                spans, states_TD = self._shifted(head + 1, spans, h_TD)

    def _shifted(self, head: int, spans: Sequence[_Span], h_TD: F32) -> tuple[list[_Span], F32]:
        """Of each token of `spans` the state of the one before it, which `head` needs for its slot, from
        the states h of the tokens themselves; the last ones are kept."""
        rows = [span.row for span in spans]
        both = self._ops.stack([self._before[head][rows], h_TD])
        places, moved, first = [], [], 0
        for i, span in enumerate(spans):
            own = span.places + np.int32(len(rows))
            places += [np.array([i], np.int32), own[:-1]]
            moved.append(replace(span, first=first))
            first += span.count
        self._before[head][rows] = both[[len(rows) + span.first + span.count - 1 for span in spans]]
        return moved, both[np.concatenate(places)]

    def _batch(self, items: Sequence[PlanItem]) -> DecodeBatch | ForwardBatch:
        """No adapter changes a head."""
        batch, _, _ = self._rows.gather(items)
        if isinstance(batch, DecodeBatch):
            return replace(batch, adapters=None)
        return replace(batch, adapters=None, watch=None)

    def forget(self, row: int) -> None:
        if any(span.row == row for span in self._waiting):
            self.catch_up()
        self._at[row] = _NOTHING


def _item(row: int, start: int, num_tokens: int) -> PlanItem:
    return PlanItem("", row, start, num_tokens, True, [])


def num_computed(item: PlanItem, sampled: Sequence[int]) -> int:
    """Its tokens without the drafts that were wrong."""
    accepted = max(len(sampled) - 1, 0) if item.num_drafts else 0
    return item.num_tokens - item.num_drafts + accepted
