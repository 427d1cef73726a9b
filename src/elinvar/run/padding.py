"""Batches filled up to sizes that recordings exist for, where a recording is costly, as on a GPU.

What fills up computes token 0 at position 0 and writes to a block that nobody reads; no token depends
on another sequence's, so the bits of the others stay.

Legend: T tokens, R sequences, G KV groups, each with more of them behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from elinvar.base.batch import I32, DecodeBatch, ForwardBatch
from elinvar.base.config import BLOCK_SIZE


def padded(
    batch: DecodeBatch | ForwardBatch, size_of: Callable[[int], int], spare: Sequence[int]
) -> DecodeBatch | ForwardBatch:
    """size_of: how many tokens, or sequences, for so many; spare: a block of each group. Without one
    batches stay as they are, and so do those in which some see a part of their past alone."""
    if batch.sight is not None or not spare:
        return batch
    slots = [block * BLOCK_SIZE for block in spare]
    if isinstance(batch, DecodeBatch):
        count = batch.numbers.shape[1]
        more = size_of(count) - count
        if not more:
            return batch
        columns = np.tile(np.array([[0, 0, 1, *slots]], np.int32).T, more)
        numbers = np.concatenate([batch.numbers, columns], axis=1)
        return DecodeBatch(numbers, _tables(batch, more, spare), _adapters(batch, more))
    tokens, sequences = len(batch.input_ids), len(batch.seq_lens)
    more, others = size_of(tokens) - tokens, size_of(sequences) - sequences
    if not (more or others):
        return batch
    return replace(  # the sequences that fill up have no tokens, the tokens no sequence
        batch,
        input_ids=_filled(batch.input_ids, more, 0),
        positions=_filled(batch.positions, more, 0),
        query_start_loc=_filled(batch.query_start_loc, others, tokens),
        seq_lens=_filled(batch.seq_lens, others, 0),
        block_tables=_tables(batch, others, spare),
        slot_mapping=tuple(map(_filled, batch.slot_mapping, [more] * len(slots), slots)),
        logit_rows=np.arange(tokens + more, dtype=np.int32),
        adapters=_adapters(batch, more),
    )


def _filled(array: I32, count: int, value: int) -> I32:
    return np.concatenate([array, np.full((count, *array.shape[1:]), value, np.int32)])


def _tables(batch: DecodeBatch | ForwardBatch, count: int, spare: Sequence[int]) -> tuple[I32, ...]:
    return tuple(map(_filled, batch.block_tables, [count] * len(spare), spare))


def _adapters(batch: DecodeBatch | ForwardBatch, count: int) -> I32 | None:
    return None if batch.adapters is None else _filled(batch.adapters, count, -1)
