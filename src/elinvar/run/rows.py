"""Rows: the fixed per-request state that each step's ForwardBatch is gathered from.

State is not input: a request keeps one row from its start to its end, and every step gathers
fresh flat arrays from the rows it touches. Nothing here decides anything; the plan does.

Legend: T tokens of this step, R planned items, L rows that sample, B blocks, G KV groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from elinvar.base.batch import I32, ForwardBatch
from elinvar.base.config import BLOCK_SIZE
from elinvar.base.plan import PlanItem, RowStart
from elinvar.base.sampling import SamplingParams
from elinvar.ops.api import SampleArgs

_SEED_MASK = 2**64 - 1
_MIN_WIDTH = 16


class Rows:
    """Token ids, block tables and sampling parameters of `max_rows` running requests.

    Memory is reserved, not touched: a row costs pages only as far as its sequence goes.
    """

    def __init__(self, max_rows: int, max_context: int, num_groups: int) -> None:
        max_blocks = table_width(max_context)
        self.token_ids: I32 = np.zeros((max_rows, max_context), np.int32)
        self.tables: list[I32] = [
            np.zeros((max_rows, max_blocks), np.int32) for _ in range(num_groups)
        ]
        self.table_lens: list[list[int]] = [[0] * max_rows for _ in range(num_groups)]
        self.seeds = np.zeros(max_rows, np.uint64)
        self.temperature = np.zeros(max_rows, np.float32)
        self.top_k = np.zeros(max_rows, np.int32)
        self.top_p = np.ones(max_rows, np.float32)
        self.min_p = np.zeros(max_rows, np.float32)
        self.num_logprobs: list[int | None] = [None] * max_rows
        """As in SamplingParams.logprobs."""

    def start(self, started: RowStart) -> None:
        """Take a row: all known tokens, the blocks found in the cache, the parameters."""
        row = started.row
        self.token_ids[row, : len(started.token_ids)] = started.token_ids
        for table, lens, blocks in zip(self.tables, self.table_lens, started.blocks, strict=True):
            table[row] = -1
            table[row, : len(blocks)] = blocks
            lens[row] = len(blocks)
        self._set_params(row, started.params)

    def _set_params(self, row: int, params: SamplingParams) -> None:
        assert params.seed is not None, "the engine draws a seed where the user gave none"
        self.seeds[row] = params.seed & _SEED_MASK
        self.temperature[row] = params.temperature
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.num_logprobs[row] = params.logprobs

    def append_blocks(self, items: Sequence[PlanItem]) -> None:
        """Add each item's new blocks to its row's tables."""
        for item in items:
            for group, blocks in enumerate(item.new_blocks):
                if blocks:
                    held = self.table_lens[group][item.row]
                    self.tables[group][item.row, held : held + len(blocks)] = blocks
                    self.table_lens[group][item.row] = held + len(blocks)

    def gather(self, items: Sequence[PlanItem]) -> tuple[ForwardBatch, NDArray[np.intp], I32]:
        """The flat batch of `items`, and which rows sample: row_L and position_L.

        position_L is the index that the sampled token will have in its sequence.
        """
        num_items = len(items)
        spans = np.array([(i.row, i.start, i.num_tokens, i.sample) for i in items], np.int32)
        row_R, start_R, num_R = spans[:, 0], spans[:, 1], spans[:, 2]
        ends_R = np.cumsum(num_R, dtype=np.int32)
        query_start_loc = np.zeros(num_items + 1, np.int32)
        query_start_loc[1:] = ends_R
        seq_lens = start_R + num_R
        row_T = np.repeat(row_R, num_R)
        positions = np.arange(ends_R[-1], dtype=np.int32)
        positions += np.repeat(start_R - query_start_loc[:-1], num_R)
        width = table_width(int(seq_lens.max()))
        index_T, offset_T = positions // BLOCK_SIZE, positions % BLOCK_SIZE
        sampling = np.flatnonzero(spans[:, 3])
        batch = ForwardBatch(
            input_ids=self.token_ids[row_T, positions],
            positions=positions,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_tables=tuple(t[:, :width].take(row_R, axis=0) for t in self.tables),
            slot_mapping=tuple(t[row_T, index_T] * BLOCK_SIZE + offset_T for t in self.tables),
            logit_rows=ends_R[sampling] - 1,
        )
        return batch, row_R[sampling].astype(np.intp), seq_lens[sampling]

    def sample_args(self, row_L: NDArray[np.intp], position_L: I32) -> SampleArgs:
        """Sampling parameters of the rows that sample."""
        return SampleArgs(
            seeds=self.seeds[row_L],
            positions=position_L,
            temperature=self.temperature[row_L],
            top_k=self.top_k[row_L],
            top_p=self.top_p[row_L],
            min_p=self.min_p[row_L],
            num_logprobs=max(self.num_logprobs[row] or 0 for row in row_L.tolist()),
        )


def table_width(num_positions: int) -> int:
    """Columns of a step's block tables: a power of two, so that steps of one shape come often."""
    num_blocks = -(-num_positions // BLOCK_SIZE)
    return max(_MIN_WIDTH, 1 << (num_blocks - 1).bit_length())
