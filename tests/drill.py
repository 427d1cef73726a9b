"""Drives a target and a drafter by hand as the runner does, one step at a time, without a planner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elinvar.base.batch import DecodeBatch
from elinvar.base.plan import PlanItem, RowStart
from elinvar.base.sampling import SamplingParams
from elinvar.ops import Ops
from elinvar.run.drafters.api import Ask, Drafter, Guess, Seen
from elinvar.run.rows import Rows
from helpers import make_cache


@dataclass
class Progress:
    num_tokens: int
    num_computed: int = 0
    num_proposed: int = 0
    num_accepted: int = 0


class Drill:
    """Rows hold as many blocks as they will ever need, in an order of no meaning."""

    def __init__(
        self,
        model: Any,
        ops: Ops,
        make: Callable[[Rows, list[Any]], Drafter] | None = None,
        max_rows: int = 4,
        max_context: int = 256,
    ) -> None:
        """make: of the rows and all caches of the model; None: nothing is drafted."""
        self.model, self.ops = model, ops
        specs = model.kv_specs("f32")
        self.rows = Rows(max_rows, max_context, specs)
        per_row = max_context // 32
        self.kv = make_cache(model, ops, max_rows * per_row, "f32")
        order = np.random.default_rng(3).permutation(max_rows * per_row)
        self.blocks = order.reshape(max_rows, per_row).tolist()
        self.num_groups = len(specs)
        self.drafter = None if make is None else make(self.rows, self.kv)
        self.live: dict[int, Progress] = {}

    def start(self, row: int, ids: Sequence[int], params: SamplingParams, found: int = 0) -> None:
        """found: tokens whose blocks hold what they should already."""
        blocks = [self.blocks[row]] * self.num_groups
        self.rows.start(RowStart("", row, list(ids), params, blocks, num_prompt_tokens=len(ids)))
        self.live[row] = Progress(len(ids), found)

    def release(self, row: int) -> list[int]:
        """Its tokens; the row is nobody's from now on."""
        ids: list[int] = self.rows.token_ids[row, : self.live.pop(row).num_tokens].tolist()
        if self.drafter is not None:
            self.drafter.forget(row)
        self.rows.release([row])
        return ids

    def step(self, most: int = 0, chunks: Mapping[int, int] | None = None) -> None:
        """Every row goes on: by `most` drafts where its last token alone is not computed, otherwise by
        so many tokens of its own (chunks; rows that are not in it: all)."""
        items, drafts = [], self._drafts(most)
        for row, one in self.live.items():
            left, guess = one.num_tokens - one.num_computed, drafts.get(row, Guess()).tokens
            count = min(left, (chunks or {}).get(row, left)) + len(guess)
            known = one.num_tokens
            self.rows.token_ids[row, known : known + len(guess)] = guess
            last = one.num_computed + count - len(guess) == known
            item = PlanItem("", row, one.num_computed, count, last, [[]] * self.num_groups)
            item.num_drafts = len(guess)
            items.append(item)
        batch, _, _ = self.rows.gather(items)
        flat = batch.flat() if isinstance(batch, DecodeBatch) else batch
        hidden_TD = self.model.hidden(flat, self.kv, all_tokens=True)
        sampled, first = [], 0
        for item in items:
            sampled.append(self._verify(item, hidden_TD[first : first + item.num_tokens]))
            first += item.num_tokens
        if self.drafter is not None:
            firsts = flat.query_start_loc[:-1].tolist()
            self.drafter.observe(Seen(items, sampled, hidden_TD, firsts))

    def _drafts(self, most: int) -> dict[int, Guess]:
        asks = [
            Ask(row, one.num_tokens, most)
            for row, one in self.live.items()
            if one.num_computed == one.num_tokens - 1
        ]
        if not most or not asks or self.drafter is None:
            return {}
        return dict(zip((a.row for a in asks), self.drafter.propose(asks), strict=True))

    def _verify(self, item: PlanItem, hidden_TD: Any) -> list[int]:
        row, one = item.row, self.live[item.row]
        stop, count = item.start + item.num_tokens, item.num_drafts
        one.num_computed = stop - count
        if not item.sample:
            return []
        positions = np.arange(stop - count, stop + 1, dtype=np.int32)
        args = self.rows.sample_args([row] * (count + 1), positions)
        logits = self.model.logits(np.ascontiguousarray(hidden_TD[-count - 1 :]))
        tokens = self.ops.sample(logits, args).ids.tolist()
        drafts = self.rows.token_ids[row, stop - count : stop].tolist()
        accepted = 0
        while accepted < count and drafts[accepted] == tokens[accepted]:
            accepted += 1
        kept: list[int] = tokens[: accepted + 1]
        self.rows.token_ids[row, stop - count : stop - count + len(kept)] = kept
        one.num_tokens = stop - count + len(kept)
        one.num_computed += accepted
        one.num_proposed += count
        one.num_accepted += accepted
        return kept
