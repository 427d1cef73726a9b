"""Rows: the fixed per-request state that each step's ForwardBatch is gathered from.

State is not input: a request keeps one row from its start to its end, and every step gathers
fresh flat arrays from the rows it touches. Nothing here decides anything; the plan does.

Legend: T tokens of this step, R planned items, L rows that sample, B blocks, G KV groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar.base.batch import I32, DecodeBatch, ForwardBatch
from elinvar.base.config import BLOCK_SIZE, KVSpec
from elinvar.base.plan import PlanItem, RowStart
from elinvar.base.sampling import SamplingParams
from elinvar.ops.arguments import SampleArgs
from elinvar.run.edits import RowEdits, edit
from elinvar.run.sights import Sights, table_width
from elinvar.run.watches import Watches

_SEED_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How a row samples, and whose it is."""

    numbers: tuple[float, ...]
    edits: RowEdits | None
    namespace: bytes


class Rows:
    """Token ids, block tables and sampling parameters of `max_rows` running requests.

    Memory is reserved, not touched: a row costs pages only as far as its sequence goes.
    """

    def __init__(self, max_rows: int, max_context: int, specs: Sequence[KVSpec]) -> None:
        max_blocks = table_width(max_context)
        self.token_ids: I32 = np.zeros((max_rows, max_context), np.int32)
        self.tables: list[I32] = [np.zeros((max_rows, max_blocks), np.int32) for _ in specs]
        self.table_lens: list[list[int]] = [[0] * max_rows for _ in specs]
        self.seeds = np.zeros(max_rows, np.uint64)
        self.temperature = np.zeros(max_rows, np.float32)
        self.top_k = np.zeros(max_rows, np.int32)
        self.top_p = np.ones(max_rows, np.float32)
        self.min_p = np.zeros(max_rows, np.float32)
        self.num_logprobs: list[int | None] = [None] * max_rows
        """As in SamplingParams.logprobs."""
        self.scored: dict[int, tuple[int, int]] = {}
        """Of the rows whose prompts get log-probs: how long it is, and how many alternatives."""
        self.edits: dict[int, RowEdits] = {}
        """Of the rows that have any."""
        self.adapters = np.full(max_rows, -1, np.int32)
        self.namespaces = [b""] * max_rows
        """Whose texts each may be compared with."""
        self.sights = Sights(max_rows, [spec.kind == "full" for spec in specs], self.tables)
        self.watches = Watches()
        # Of the last step, until a row or a table changes: most steps are like the one before.
        self._gathered: tuple[tuple[list[int], int], tuple[I32, ...]] | None = None
        self._sampling: tuple[list[int], Any, tuple[Any, ...], int | None] | None = None
        self._adapted: tuple[list[int], I32 | None] = [], None

    def start(self, started: RowStart) -> None:
        """Take a row: all known tokens, the blocks found in the cache, the parameters."""
        row = started.row
        self._gathered = self._sampling = None
        self._adapted = [], None
        self.adapters[row] = started.adapter
        self.namespaces[row] = started.namespace
        self.token_ids[row, : len(started.token_ids)] = started.token_ids
        self.hold(row, started.blocks)
        self._set_params(row, started.params)
        kept = started.params.kept_of_prompt(started.num_prompt_tokens)
        self.watches.start(row, started.num_prompt_tokens, kept)
        self.release([row])
        if started.params.edits_logits:
            self.edits[row] = RowEdits(started)
        if started.params.prompt_logprobs is not None:
            self.scored[row] = started.num_prompt_tokens, started.params.prompt_logprobs

    def hold(self, row: int, blocks: Sequence[Sequence[int]]) -> None:
        """Its tables have these blocks, per group, and no others."""
        self._gathered = None
        for table, lens, held in zip(self.tables, self.table_lens, blocks, strict=True):
            table[row] = -1
            table[row, : len(held)] = held
            lens[row] = len(held)

    def _set_params(self, row: int, params: SamplingParams) -> None:
        assert params.seed is not None, "the engine draws a seed where the user gave none"
        self.seeds[row] = params.seed & _SEED_MASK
        self.temperature[row] = params.temperature
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.num_logprobs[row] = params.logprobs
        self.sights.start(row, params.kept_blocks)

    def sampling_of(self, row: int) -> RowSampling:
        numbers = tuple(array.item(row) for array in self._numbers)
        return RowSampling(numbers, self.edits.get(row), self.namespaces[row])

    def sample_as(self, row: int, sampling: RowSampling) -> None:
        """As a row of others does."""
        self._sampling = None
        for array, number in zip(self._numbers, sampling.numbers, strict=True):
            array[row] = number
        self.release([row])
        if sampling.edits is not None:
            self.edits[row] = sampling.edits
        self.namespaces[row] = sampling.namespace

    @property
    def _numbers(self) -> tuple[NDArray[Any], ...]:
        return self.seeds, self.temperature, self.top_k, self.top_p, self.min_p

    def release(self, rows: Sequence[int]) -> None:
        """They are nobody's for now."""
        for row in rows:
            self.edits.pop(row, None)
            self.scored.pop(row, None)

    def append_blocks(self, items: Sequence[PlanItem]) -> None:
        """Add each item's new blocks to its row's tables."""
        for item in items:
            for group, blocks in enumerate(item.new_blocks):
                if blocks:
                    self._gathered = None
                    held = self.table_lens[group][item.row]
                    self.tables[group][item.row, held : held + len(blocks)] = blocks
                    self.table_lens[group][item.row] = held + len(blocks)

    def gather(
        self, items: Sequence[PlanItem]
    ) -> tuple[ForwardBatch | DecodeBatch, list[int], I32]:
        """The flat batch of `items`, whose spans end with their drafts, and which rows sample: rows_L
        and position_L, the index that the sampled token will have in its sequence. A row with k drafts
        is there k + 1 times.
        """
        watch = self.watches.gather(items)
        if watch is None and all([item.sample and item.num_tokens == 1 for item in items]):
            return self._gather_decode(items)
        rows = [item.row for item in items]
        stops = [item.start + item.num_tokens for item in items]
        ends = list(accumulate(item.num_tokens for item in items))
        ids, positions, slots = self._gather_spans(items)
        sampling = [
            (row, end - after, stop - after)
            for row, end, stop, item in zip(rows, ends, stops, items, strict=True)
            if item.sample
            for after in range(item.num_drafts, -1, -1)
        ]
        rows_L, ends_L, stops_L = map(list, zip(*sampling, strict=True)) if sampling else ([],) * 3
        batch = ForwardBatch(
            input_ids=ids,
            positions=positions,
            query_start_loc=np.array([0, *ends], np.int32),
            seq_lens=np.array(stops, np.int32),
            block_tables=self._block_tables(rows, table_width(max(stops))),
            slot_mapping=slots,
            logit_rows=np.array(ends_L, np.int32) - np.int32(1),
            sight=self.sights.gather(rows, [item.start for item in items], stops),
            watch=watch,
        )
        adapters = self._adapters(rows)
        if adapters is not None:
            batch.adapters = np.repeat(adapters, [item.num_tokens for item in items])
        return batch, rows_L, np.array(stops_L, np.int32)

    def choose(
        self, items: Sequence[PlanItem], batch: ForwardBatch | DecodeBatch
    ) -> dict[int, list[int]]:
        """After the forward of `batch`: as in StepOutput.kept."""
        if isinstance(batch, DecodeBatch) or batch.watch is None:
            return {}
        chosen = self.watches.choose(items, batch.watch)
        for i, blocks in chosen.items():
            stop = items[i].start + items[i].num_tokens
            self.sights.choose(items[i].row, blocks, -(-stop // BLOCK_SIZE))
        return chosen

    def _gather_spans(self, items: Sequence[PlanItem]) -> tuple[I32, I32, tuple[I32, ...]]:
        """Token ids, positions and (per group) slots of the spans."""
        spans = [(i.start, i.start + i.num_tokens) for i in items]
        positions = np.concatenate([np.arange(*span, dtype=np.int32) for span in spans])
        row_T = np.repeat([i.row for i in items], [i.num_tokens for i in items])
        index_T, offset_T = positions // BLOCK_SIZE, positions % BLOCK_SIZE
        slots = tuple(t[row_T, index_T] * BLOCK_SIZE + offset_T for t in self.tables)
        return self.token_ids[row_T, positions], positions, slots

    def _gather_decode(self, items: Sequence[PlanItem]) -> tuple[DecodeBatch, list[int], I32]:
        """The same for spans of one token, where Python's ints beat NumPy's indexing and one array
        is made: such steps come every few milliseconds."""
        rows = [item.row for item in items]
        positions = [item.start for item in items]
        ids = [self.token_ids.item(row, at) for row, at in zip(rows, positions, strict=True)]
        stops = [at + 1 for at in positions]
        numbers = ids + positions + stops
        for table in self.tables:
            numbers += [
                table.item(row, at // BLOCK_SIZE) * BLOCK_SIZE + at % BLOCK_SIZE
                for row, at in zip(rows, positions, strict=True)
            ]
        packed = np.array(numbers, np.int32).reshape(-1, len(rows))
        tables = self._block_tables(rows, table_width(max(stops)))
        sight = self.sights.gather(rows, positions, stops)
        return DecodeBatch(packed, tables, self._adapters(rows), sight), rows, packed[2]

    def _block_tables(self, rows: list[int], width: int) -> tuple[I32, ...]:
        """The last answer again while nothing changed: blocks are added once in 32 steps."""
        key = rows, width
        if self._gathered is None or self._gathered[0] != key:
            tables = tuple(t[:, :width].take(rows, axis=0) for t in self.tables)
            self._gathered = key, tables
        return self._gathered[1]

    def _adapters(self, rows: list[int]) -> I32 | None:
        """Of each row; None where nobody has one. The last answer again, as above."""
        if self._adapted[0] != rows:
            adapters = self.adapters[rows]
            self._adapted = rows, adapters if (adapters >= 0).any() else None
        return self._adapted[1]

    def sample_args(self, rows_L: list[int], position_L: I32) -> SampleArgs:
        """Sampling parameters of the rows that sample."""
        if self._sampling is None or self._sampling[0] != rows_L:
            asked = (self.num_logprobs[row] for row in rows_L)
            most = max((count for count in asked if count is not None), default=None)
            params = (self.temperature, self.top_k, self.top_p, self.min_p)
            self._sampling = rows_L, self.seeds[rows_L], tuple(p[rows_L] for p in params), most
        _, seeds, (temperature, top_k, top_p, min_p), num_logprobs = self._sampling
        args = SampleArgs(seeds, position_L, temperature, top_k, top_p, min_p, num_logprobs)
        if self.edits and not self.edits.keys().isdisjoint(rows_L):
            stops = zip(rows_L, position_L.tolist(), strict=True)
            tokens = [self.token_ids[row, :stop] for row, stop in stops]
            edit(args, [self.edits.get(row) for row in rows_L], tokens)
        return args
