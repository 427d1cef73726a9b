"""ForwardBatch: the one input of every model's forward. Flat and ragged, no padding.
DecodeBatch: the same for a step of decode alone, before anybody needs its arrays one by one.

Legend: T tokens of this step, R sequences, L rows that need logits, G KV groups, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elinvar.base.config import BLOCK_SIZE

I32 = NDArray[np.int32]


@dataclass(slots=True, eq=False)
class Sight:
    """What full attention sees, where sequences see a part of their past alone: the blocks of that
    part side by side, as if they were all. What is seen changes amid a span, so there may be more
    sequences here than in the batch; their tokens are the batch's, in its order."""

    query_start_loc: I32
    seq_lens: I32
    block_tables: tuple[I32, ...]
    """Of groups without full attention those of the batch: nobody looks."""
    positions: I32
    """[T] places of the tokens among what they see."""

    @property
    def width(self) -> int:
        """Columns of the block tables."""
        return max(table.shape[1] for table in self.block_tables)

    @property
    def arrays(self) -> tuple[I32, ...]:
        return self.query_start_loc, self.seq_lens, self.positions, *self.block_tables

    def copy(self) -> Sight:
        starts, lens, positions, *tables = (array.copy() for array in self.arrays)
        return Sight(starts, lens, tuple(tables), positions)


@dataclass(slots=True, eq=False)
class Watch:
    """Tokens of which it is noted what they attend to. They see everything."""

    sequences: I32
    """[R] those of the batch that they are of."""
    query_start_loc: I32
    """[R + 1] where the tokens of each begin in W."""
    tokens: I32
    """[W] indices into T."""
    positions: I32
    """[W]"""
    shares: NDArray[np.float32]
    """[W, B] what each block of keys gets at most, of all heads and layers; 0 before the forward."""


@dataclass(slots=True, eq=False)
class ForwardBatch:
    input_ids: I32
    """[T] token ids, sequence after sequence."""
    positions: I32
    """[T] absolute positions."""
    query_start_loc: I32
    """[R + 1] where each sequence's tokens begin in T."""
    seq_lens: I32
    """[R] keys of each sequence after this step's tokens are written."""
    block_tables: tuple[I32, ...]
    """G arrays [R, B]: block id of each 32 positions; columns past a sequence's end say nothing."""
    slot_mapping: tuple[I32, ...]
    """G arrays [T]: block id * block_size + offset where each token's K and V are written."""
    logit_rows: I32
    """[L] indices into T."""
    type_ids: I32 | None = None
    """[T] for encoders: which of the texts of a pair a token is of."""
    last_keys: I32 | None = None
    """[T] for encoders: the last position that each token sees."""
    adapters: I32 | None = None
    """[T] number of the adapter of each token's request, -1: none; None: nobody has one."""
    sight: Sight | None = None
    """None: everybody sees everything."""
    watch: Watch | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_positions(self) -> int:
        """No position is this large: what the block tables can hold."""
        return self.block_tables[0].shape[1] * BLOCK_SIZE

    @property
    def all_logits(self) -> bool:
        """Whether every token's logits are asked for, as in a step of decode alone."""
        return len(self.logit_rows) == len(self.input_ids)

    def where_logits(self, x_TD: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rows [L, D] that need logits."""
        return x_TD if self.all_logits else x_TD[self.logit_rows]


@dataclass(slots=True, eq=False)
class DecodeBatch:
    """Every sequence computes one token and samples."""

    numbers: I32
    """[3 + G, R]: token ids, positions, lengths, and each group's slots."""
    block_tables: tuple[I32, ...]
    """As in ForwardBatch."""
    adapters: I32 | None = None
    sight: Sight | None = None

    @property
    def num_tokens(self) -> int:
        return self.numbers.shape[1]

    def flat(self) -> ForwardBatch:
        """The batch for a model, of views of `numbers`."""
        ids, positions, seq_lens, *slots = self.numbers
        starts = np.arange(len(ids) + 1, dtype=np.int32)
        tables = self.block_tables
        return ForwardBatch(
            ids,
            positions,
            starts,
            seq_lens,
            tables,
            tuple(slots),
            logit_rows=starts[:-1],
            adapters=self.adapters,
            sight=self.sight,
        )
