"""ForwardBatch: the one input of every model's forward. Flat and ragged, no padding.

Legend: T tokens of this step, R sequences, L rows that need logits, G KV groups, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
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
    """G arrays [R, B]: block id of each 32 positions; -1 where none is held."""
    slot_mapping: tuple[I32, ...]
    """G arrays [T]: block id * block_size + offset where each token's K and V are written."""
    logit_rows: I32
    """[L] indices into T."""
