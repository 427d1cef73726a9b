"""A draft model: a smaller model of the same tokens guesses what the target will sample.

It samples with the target's own parameters and noise, so that where the two distributions are alike it
takes the same token at every temperature: of two that differ by TV in total variation at least a share
(1 - TV) / (1 + TV) is (Daliri, Musco and Suresh, 2024; docs/speculation.md). Drafts that were wrong cost it
nothing: what it computed for them is written over.

Legend: T tokens of a forward, L rows that draw, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from elinvar.base.batch import I32
from elinvar.base.config import KVSpec
from elinvar.base.errors import ModelError
from elinvar.base.plan import PlanItem
from elinvar.models.family import Model
from elinvar.ops.api import F32, Ops
from elinvar.run.drafters.api import Ask, Guess, Seen
from elinvar.run.drafters.lanes import Lanes
from elinvar.run.graphs import Graphs
from elinvar.run.rows import Rows

CATCH_UP = 128
"""Tokens of prompts that are read for one proposal: the target's step waits for it."""
SHORT = 4
"""Where no row reads more, logits of all tokens are computed: such forwards are recorded (run.graphs)."""


@dataclass(slots=True)
class _Chain:
    """A row that is drafted for."""

    row: int
    num_known: int
    start: int
    """First token that is to be computed."""
    stop: int
    """After the last one."""
    most: int
    """Drafts for which there is room."""
    guess: Guess = field(default_factory=Guess)

    @property
    def reads_on(self) -> bool:
        """Some of the known tokens are left for another time."""
        return self.stop < self.num_known

    @property
    def item(self) -> PlanItem:
        count = self.stop - self.start
        return PlanItem("", self.row, self.start, count, not self.reads_on, [])


class DraftModel:
    """`model` with caches of `num_blocks` blocks in each group of `specs`, for the first `longest` tokens of
    rows. vocab_size: of the target's logits. unsettled: as of Lanes. Raises ModelError where the model
    cannot go back."""

    is_instant = False
    reads_hidden = False

    def __init__(
        self,
        rows: Rows,
        model: Model,
        ops: Ops,
        specs: Sequence[KVSpec],
        num_blocks: Sequence[int],
        longest: int,
        vocab_size: int,
        unsettled: int = 0,
        name: str = "draft-model",
    ) -> None:
        if model.config.delta is not None:
            raise ModelError(
                "A draft model must take drafts back, which a model with recurrent layers cannot: "
                "take one whose layers are all attention."
            )
        self.name = name
        self._rows, self._ops = rows, ops
        self._longest = min(longest, rows.token_ids.shape[1])
        self._lanes = Lanes(rows, ops, specs, num_blocks, unsettled)
        self._graphs = Graphs(model, ops, self._lanes.kv, spare=num_blocks)
        own, wanted = model.config.vocab_size, np.arange(vocab_size, dtype=np.int32)
        self._columns: I32 | None = (
            None if own == vocab_size else np.where(wanted < own, wanted, -1)
        )
        """Of the model's logits, those of the target: models of one tokenizer may be padded to
        different sizes."""

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        busy = {ask.row for ask in asks}
        chains: dict[int, _Chain] = {}
        left = CATCH_UP
        for ask in sorted(asks, key=self._num_left):
            chain = self._begin(ask, left, busy)
            if chain is not None:
                chains[ask.row] = chain
                left -= chain.stop - chain.start
        self._draft(list(chains.values()))
        return [chains[ask.row].guess if ask.row in chains else Guess() for ask in asks]

    def _num_left(self, ask: Ask) -> int:
        """Who needs least goes first: nobody waits for another's long prompt."""
        return self._lanes.num_left(ask.row, ask.num_tokens)

    def _begin(self, ask: Ask, left: int, busy: set[int]) -> _Chain | None:
        """left: tokens that may be read."""
        known = ask.num_tokens
        most = min(ask.most, self._longest - known)
        if left < 1 or most < 1:
            return None
        start = self._lanes.enter(ask.row, known, busy)
        if start is None:
            return None
        stop = min(known, start + left)
        # Of the drafts all but the last are computed, too.
        wanted = stop if stop < known else known + most - 1
        end = self._lanes.reserve(ask.row, start, wanted, busy)
        stop = min(stop, end)
        return _Chain(ask.row, known, start, stop, end + 1 - known) if start < stop else None

    def _draft(self, chains: list[_Chain]) -> None:
        """First what each row has not computed, then token by token, all rows together."""
        while chains:
            logits_LV = self._forward(chains)
            chains = [chain for chain in chains if not chain.reads_on]
            if chains:
                self._draw(chains, logits_LV)
            chains = [chain for chain in chains if len(chain.guess.tokens) < chain.most]
            for chain in chains:
                chain.start, chain.stop = chain.stop, chain.stop + 1

    def _forward(self, chains: Sequence[_Chain]) -> F32:
        """Logits [L, V] of the chains that read all that is known, for their next tokens."""
        items = [chain.item for chain in chains]
        spans = [item.num_tokens for item in items]
        is_short = max(spans) <= SHORT and all(item.sample for item in items)
        if is_short:
            items = [replace(item, num_drafts=item.num_tokens - 1) for item in items]
        batch, _, _ = self._lanes.places.gather(items)
        logits_LV = self._graphs.forward(batch)
        if is_short and len(logits_LV) > len(chains):
            logits_LV = logits_LV[np.cumsum(spans) - 1]
        for chain in chains:
            self._lanes.computed(chain.row, chain.start, chain.stop, chain.num_known)
        return logits_LV

    def _draw(self, chains: Sequence[_Chain], logits_LV: F32) -> None:
        positions_L = np.array([chain.stop for chain in chains], np.int32)
        args = self._rows.sample_args([chain.row for chain in chains], positions_L)
        args.num_logprobs = 0
        if self._columns is not None:
            logits_LV = self._ops.spread(logits_LV, self._columns)
        result = self._ops.sample(logits_LV, args)
        pairs = zip(result.ids.tolist(), result.logprobs.tolist(), strict=True)
        for chain, (token, logprob) in zip(chains, pairs, strict=True):
            chain.guess.tokens.append(token)
            # Shared noise makes unlikely tokens likely drafts, too (docs/speculation.md).
            chain.guess.chances.append((1 + math.exp(logprob)) / 2)
            # Penalties of the next position count it, and the next forward reads it.
            self._rows.token_ids[chain.row, chain.stop] = token

    def observe(self, seen: Seen) -> None:
        pass

    def forget(self, row: int) -> None:
        self._lanes.leave(row)
