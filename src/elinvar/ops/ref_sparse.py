"""The oracle of sparse attention (ops/api.py): which keys a token attends to, and attention to them.
The cache comes as keys_BDN, float32 [B, D, 32] of its one head."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from elinvar.base.config import BLOCK_SIZE
from elinvar.ops.api import F32, I32


def index_select(
    q_THD: F32,
    weights_TH: F32,
    keys_BDN: F32,
    query_start_loc: I32,
    block_table_RB: I32,
    positions_T: I32,
    k: int,
    first: int,
) -> I32:
    chosen_TK = np.full((len(q_THD), k), -1, np.int32)
    for t, keys in _seen(keys_BDN, query_start_loc, block_table_RB, positions_T):
        dots = np.fmax(q_THD[t].astype(np.float64) @ keys[first:].T, 0)
        worth = weights_TH[t].astype(np.float64) @ dots
        chosen = first + np.sort(np.argsort(-worth, kind="stable")[:k])
        chosen_TK[t, : len(chosen)] = chosen
    return chosen_TK


def sparse_attention(
    q_THD: F32,
    keys_BDN: F32,
    value_dim: int,
    query_start_loc: I32,
    block_table_RB: I32,
    positions_T: I32,
    chosen_TK: I32,
    scale: float,
) -> F32:
    out = np.empty((*q_THD.shape[:2], value_dim), np.float32)
    for t, keys in _seen(keys_BDN, query_start_loc, block_table_RB, positions_T):
        own = keys[chosen_TK[t][chosen_TK[t] >= 0]]
        s = q_THD[t].astype(np.float64) @ own.T * scale
        p = np.exp(s - s.max(-1, keepdims=True))
        out[t] = p / p.sum(-1, keepdims=True) @ own[:, :value_dim]
    return out.reshape(len(out), -1)


def _seen(
    keys_BDN: F32, query_start_loc: I32, block_table_RB: I32, positions_T: I32
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Each token, and the keys [positions, D] up to its own."""
    for table, (start, stop) in zip(block_table_RB, pairwise(query_start_loc), strict=True):
        for t in range(start, stop):
            count = int(positions_T[t]) + 1
            blocks = keys_BDN[table[: -(-count // BLOCK_SIZE)]].swapaxes(1, 2)
            yield t, blocks.reshape(-1, blocks.shape[2])[:count].astype(np.float64)
