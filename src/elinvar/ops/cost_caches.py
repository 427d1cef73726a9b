"""What ops cost that read or write a cache (see cost.py): attention, and layers with a state."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from elinvar.base.config import BLOCK_SIZE
from elinvar.ops.api import F32, I32
from elinvar.ops.caches import KVLayer, StateLayer
from elinvar.ops.cost import Cost


def rope_write(
    qkv_TN: F32,
    positions_T: I32,
    rope_PD: F32,
    kv: KVLayer,
    slots_T: I32,
    num_heads: int,
    q_gain_D: F32 | None,
    k_gain_D: F32 | None,
    eps: float,
    v_gain_D: F32 | None = None,
) -> Cost:
    rows, (num_kv, dim) = positions_T.size, kv.k.shape[1:3]
    written = (1 if kv.keys_alone else 2) * rows * num_kv * kv.vector_bytes
    rotary = rope_PD.shape[1]
    moved = qkv_TN.nbytes + 4 * rows * rotary + 8 * rows + written + 4 * rows * num_heads * dim
    ops = 3 * rows * (num_heads + num_kv) * rotary
    ops += 0 if q_gain_D is None else 4 * rows * num_heads * dim
    ops += sum(4 * rows * num_kv * dim for gain in (k_gain_D, v_gain_D) if gain is not None)
    return Cost("", written, moved, ops)


def rope_queries(
    q_TN: F32, positions_T: I32, rope_PD: F32, num_heads: int, gain_D: F32, eps: float
) -> Cost:
    rotated = rope_PD.shape[1]
    moved = 2 * q_TN.nbytes + 4 * len(q_TN) * (1 + rotated)
    return Cost("", 0, moved, 4 * q_TN.size + 3 * len(q_TN) * num_heads * rotated)


def latent_write(
    x_TN: F32,
    positions_T: I32,
    rope_PD: F32,
    kv: KVLayer,
    slots_T: I32,
    gain_R: F32,
    eps: float,
) -> Cost:
    rows, rotated = len(x_TN), rope_PD.shape[1]
    written = rows * kv.vector_bytes
    moved = x_TN.nbytes + 4 * rows * rotated + 8 * rows + gain_R.nbytes + written
    return Cost(kv.dtype, written, moved, rows * (4 * gain_R.size + 3 * rotated))


def attention(
    q_THD: F32,
    kv: KVLayer,
    query_start_loc: I32,
    seq_lens: I32,
    block_table_RB: I32,
    positions_T: I32,
    scale: float,
    window: int | None,
    *,
    softcap: float | None = None,
    sinks_H: F32 | None = None,
    chunk: int | None = None,
    first: int = 0,
) -> Cost:
    """Each key and value that any query of a sequence sees is read once; a query and a key it sees
    cost a dot and a weighted sum."""
    heads, dim = q_THD.shape[1:]
    num_kv, positions = kv.k.shape[1], positions_T.astype(np.int64)
    seen = positions + 1 if window is None else np.minimum(positions + 1, window)
    seen = seen if chunk is None else np.minimum(seen, positions % chunk + 1)
    seen = np.minimum(seen, positions + 1 - first)
    begin = positions[query_start_loc[:-1]] + 1 - seen[query_start_loc[:-1]]
    keys = int((seq_lens - begin).sum())
    # A latent, which is key and value, is read once.
    vectors = 1 if kv.value_dim < dim else 2
    streamed = keys * num_kv * vectors * kv.vector_bytes
    switches = {"window": window, "chunk": chunk, "softcap": softcap}
    label = " ".join([kv.dtype, *(f"{name} {x}" for name, x in switches.items() if x)])
    outputs = 4 * heads * kv.value_dim * len(q_THD)
    ops = 2 * heads * (dim + kv.value_dim) * int(seen.sum())
    return Cost(label, streamed, streamed + q_THD.nbytes + outputs, ops)


def index_select(
    q_THD: F32,
    weights_TH: F32,
    kv: KVLayer,
    query_start_loc: I32,
    block_table_RB: I32,
    positions_T: I32,
    k: int,
    first: int = 0,
) -> Cost:
    """Each key that any query of a sequence sees is read once, where more than k are seen."""
    heads, dim = q_THD.shape[1:]
    seen = positions_T.astype(np.int64) + 1 - first
    seen[seen <= k] = 0
    lengths = [int(seen[a:b].max(initial=0)) for a, b in pairwise(query_start_loc)]
    streamed = sum(lengths) * kv.vector_bytes
    moved = streamed + q_THD.nbytes + weights_TH.nbytes + 4 * len(q_THD) * k
    return Cost(f"{kv.dtype} {k}", streamed, moved, 2 * heads * (dim + 1) * int(seen.sum()))


def sparse_attention(
    q_THD: F32,
    kv: KVLayer,
    query_start_loc: I32,
    block_table_RB: I32,
    positions_T: I32,
    chosen_TK: I32,
    scale: float,
) -> Cost:
    """Each token reads the keys chosen for it."""
    heads, dim = q_THD.shape[1:]
    chosen = int(np.minimum(positions_T.astype(np.int64) + 1, chosen_TK.shape[1]).sum())
    streamed = chosen * kv.vector_bytes
    moved = streamed + q_THD.nbytes + chosen_TK.nbytes + 4 * len(q_THD) * heads * kv.value_dim
    return Cost(kv.dtype, streamed, moved, 2 * heads * (dim + kv.value_dim) * chosen)


def block_shares(
    q_THD: F32,
    kv: KVLayer,
    query_start_loc: I32,
    block_table_RB: I32,
    positions_T: I32,
    scale: float,
    shares_TB: F32,
    *,
    softcap: float | None = None,
    sinks_H: F32 | None = None,
) -> Cost:
    """Each key that any query of a sequence sees is read once; a query and a key cost a dot."""
    heads, dim = q_THD.shape[1:]
    seen = positions_T.astype(np.int64) + 1
    keys = sum(int(seen[a:b].max(initial=0)) for a, b in pairwise(query_start_loc))
    streamed = keys * kv.k.shape[1] * kv.vector_bytes
    added = 8 * int((-(-seen // BLOCK_SIZE)).sum())
    return Cost(
        kv.dtype, streamed, streamed + q_THD.nbytes + added, 2 * heads * dim * int(seen.sum())
    )


def causal_conv(
    x_TN: F32,
    w_KC: F32,
    state: StateLayer,
    query_start_loc: I32,
    seq_lens: I32,
    block_table_RB: I32,
) -> Cost:
    """A state is read and written once."""
    rows, (taps, channels) = len(x_TN), w_KC.shape
    kept = 8 * seq_lens.size * (taps - 1) * channels
    moved = kept + w_KC.nbytes + 8 * rows * channels
    return Cost(f"{taps} taps", kept + w_KC.nbytes, moved, 2 * rows * taps * channels)


def delta_rule(
    qkv_TC: F32,
    x_TN: F32,
    a_log_H: F32,
    dt_bias_H: F32,
    state: StateLayer,
    query_start_loc: I32,
    seq_lens: I32,
    block_table_RB: I32,
) -> Cost:
    """A token decays a state, reads it by k, adds to it, and reads it by q."""
    c, rows = state.config, len(qkv_TC)
    size = c.heads * c.key_dim * c.value_dim
    kept = 8 * seq_lens.size * size
    moved = kept + qkv_TC.nbytes + 4 * rows * c.heads * (2 + c.value_dim)
    return Cost(f"{c.heads} x {c.key_dim}x{c.value_dim}", kept, moved, 7 * rows * size)
