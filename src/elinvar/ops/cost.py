"""What an op call has to move and to compute, from its arguments alone: the one place that says.

Bytes are those that the op's meaning makes unavoidable: every input read once, every output
written once, weights and cache as they are stored. Operations count a multiply-add as two.
A kernel that reads a weight twice is slower than its roof, not busier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from elinvar.base.config import Activation, Scoring
from elinvar.ops.api import F32, I32
from elinvar.ops.arguments import Experts, Lora, SampleArgs
from elinvar.ops.caches import KVLayer, StateLayer
from elinvar.ops.layout import QUANTISED, Weight

Unit = Literal["f32", "int8"]


@dataclass(frozen=True, slots=True)
class Cost:
    label: str
    """What tells calls of one op apart: weight kinds and shapes; empty where nothing does."""
    streamed: int
    """Bytes of weights and cache: what a step reads once, from wherever the model lies."""
    moved: int
    """All bytes, activations too (they come from the op before, through a cache)."""
    ops: int
    unit: Unit = "f32"


def embed(ids_T: I32, w_VD: Weight, scale: float) -> Cost:
    rows, (vocab, dim) = ids_T.size, w_VD.shape
    read = rows * w_VD.nbytes // vocab
    return Cost(_name(w_VD), read, read + 4 * rows * (1 + dim), rows * dim)


def rms_norm(x_TD: F32, gain_D: F32, eps: float) -> Cost:
    return Cost("", 0, 2 * x_TD.nbytes + gain_D.nbytes, 4 * x_TD.size)


def add(x_TD: F32, y_TD: F32) -> Cost:
    return Cost("", 0, 3 * x_TD.nbytes, x_TD.size)


def concat(x_TD: F32, y_TE: F32) -> Cost:
    return Cost("", 0, 2 * (x_TD.nbytes + y_TE.nbytes), 0)


def add_rms_norm(x_TD: F32, y_TD: F32, gain_D: F32, eps: float) -> Cost:
    return Cost("", 0, 4 * x_TD.nbytes + gain_D.nbytes, 5 * x_TD.size)


def layer_norm(x_TD: F32, gain_D: F32, bias_D: F32 | None, eps: float) -> Cost:
    return Cost("", 0, 2 * x_TD.nbytes + gain_D.nbytes + _bytes(bias_D), 7 * x_TD.size)


def add_layer_norm(x_TD: F32, y_TD: F32, gain_D: F32, bias_D: F32 | None, eps: float) -> Cost:
    return Cost("", 0, 4 * x_TD.nbytes + gain_D.nbytes + _bytes(bias_D), 8 * x_TD.size)


def scale(x_TD: F32, factor: float) -> Cost:
    return Cost("", 0, 2 * x_TD.nbytes, x_TD.size)


def scale_heads(q_THD: F32, positions_T: I32, factors_P: F32) -> Cost:
    return Cost("", 0, 2 * q_THD.nbytes + 8 * positions_T.size, q_THD.size)


def softcap(x_TD: F32, cap: float) -> Cost:
    return Cost("", 0, 2 * x_TD.nbytes, 3 * x_TD.size)


def activate(x_TD: F32, activation: Activation) -> Cost:
    return Cost(activation, 0, 2 * x_TD.nbytes, 2 * x_TD.size)


def linear(x_TK: F32, weights: Sequence[Weight], bias_N: F32 | None = None) -> Cost:
    rows, outputs = x_TK.shape[0], sum(w.shape[0] for w in weights)
    streamed = sum(w.nbytes for w in weights)
    moved = streamed + x_TK.nbytes + 4 * rows * outputs + _bytes(bias_N)
    return Cost(_names(weights), streamed, moved, _products(rows, weights), _unit(weights))


def gated_linear(x_TK: F32, gate: Weight, up: Weight, activation: Activation) -> Cost:
    rows, both = x_TK.shape[0], (gate, up)
    streamed = gate.nbytes + up.nbytes
    moved = streamed + x_TK.nbytes + 4 * rows * gate.shape[0]
    return Cost(_names(both), streamed, moved, _products(rows, both), _unit(both))


def gated(x_TN: F32, activation: Activation) -> Cost:
    return Cost(activation, 0, 3 * x_TN.nbytes // 2, 3 * x_TN.size // 2)


def lora(y_TN: F32, x_TK: F32, adapters_T: I32, lora: Lora) -> Cost:
    """Adapters that no row has are not read, and rows without one neither."""
    adapters, rows = np.unique(adapters_T[adapters_T >= 0], return_counts=True)
    streamed = moved = ops = 0
    for a, count in zip(adapters.tolist(), rows.tolist(), strict=True):
        pairs = [pairs[a] for pairs in lora.pairs]
        for pair in pairs:
            if pair is not None:
                streamed += pair.a.nbytes + pair.b.nbytes
                moved += 8 * count * pair.b.shape[0]
                ops += _products(count, [pair.a, pair.b])
        if any(pairs):
            moved += 4 * count * x_TK.shape[1]
    return Cost(f"{len(adapters)} adapters", streamed, streamed + moved, ops)


def route(
    logits_TE: F32,
    k: int,
    scoring: Scoring,
    renormalise: bool,
    scaling: float,
    bias_E: F32 | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
) -> Cost:
    rows, experts = logits_TE.shape
    return Cost("", 0, logits_TE.nbytes + 8 * rows * k, 4 * rows * experts)


def moe(
    x_TD: F32,
    ids_TK: I32,
    weights_TK: F32,
    experts: Experts,
    activation: Activation,
    scale_inputs: bool = False,
) -> Cost:
    """Experts that no token goes to are not read."""
    parts = experts.gates, experts.ups, experts.downs
    first = [part[0] for part in parts]
    streamed = sum(part[e].nbytes for e in np.unique(ids_TK) for part in parts)
    moved = streamed + 2 * x_TD.nbytes + 8 * ids_TK.size
    label = f"{len(experts.gates)} x {_names(first)}, top {ids_TK.shape[1]}"
    return Cost(label, streamed, moved, _products(ids_TK.size, first), _unit(first))


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
    written = (1 if kv.keys_alone else 2) * rows * num_kv * dim * kv.k.itemsize
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


def mul(x_TD: F32, y_TN: F32, start: int = 0) -> Cost:
    return Cost("", 0, 3 * x_TD.nbytes, x_TD.size)


def mix(xs_TD: Sequence[F32], coefs_TC: F32) -> Cost:
    (rows, dim), outputs = xs_TD[0].shape, coefs_TC.shape[1] // len(xs_TD)
    moved = 4 * rows * dim * (len(xs_TD) + outputs) + coefs_TC.nbytes
    return Cost(f"{len(xs_TD)} to {outputs}", 0, moved, 2 * coefs_TC.size * dim)


def sparsify(x_TN: F32, deviations: float) -> Cost:
    return Cost("", 0, 2 * x_TN.nbytes, 6 * x_TN.size)


def match_rms(x_TD: F32, y_TD: F32) -> Cost:
    return Cost("", 0, 3 * x_TD.nbytes, 5 * x_TD.size)


def head_linear(x_TK: F32, w: Weight, num_heads: int) -> Cost:
    rows = len(x_TK)
    moved = w.nbytes + x_TK.nbytes + 4 * rows * w.shape[0]
    return Cost(f"{num_heads} heads {_name(w)}", w.nbytes, moved, _products(rows, [w]), _unit([w]))


def latent_query(q_TN: F32, w: Weight, positions_T: I32, rope_PD: F32, num_heads: int) -> Cost:
    rows, rotated = len(q_TN), rope_PD.shape[1]
    out = 4 * rows * (w.shape[0] + num_heads * rotated)
    moved = w.nbytes + q_TN.nbytes + 4 * rows * (1 + rotated) + out
    ops = _products(rows, [w]) + 3 * rows * num_heads * rotated
    return Cost(f"{num_heads} heads {_name(w)}", w.nbytes, moved, ops, _unit([w]))


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
    written = x_TN.size * kv.k.itemsize
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
    stored = dim if kv.value_dim < dim else 2 * dim
    streamed = keys * num_kv * stored * kv.k.itemsize
    switches = {"window": window, "chunk": chunk, "softcap": softcap}
    label = " ".join([kv.dtype, *(f"{name} {x}" for name, x in switches.items() if x)])
    outputs = 4 * heads * kv.value_dim * len(q_THD)
    ops = 2 * heads * (dim + kv.value_dim) * int(seen.sum())
    return Cost(label, streamed, streamed + q_THD.nbytes + outputs, ops)


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


def gated_rms_norm(x_TN: F32, gate_TN: F32, first: int, gain_D: F32, eps: float) -> Cost:
    return Cost("", 0, 3 * x_TN.nbytes + gain_D.nbytes, 6 * x_TN.size)


def sigmoid_gate(x_TN: F32, gate_TN: F32) -> Cost:
    return Cost("", 0, 3 * x_TN.nbytes, 2 * x_TN.size)


def pool(x_TD: F32, starts: I32, weights_T: F32) -> Cost:
    outputs = 4 * (starts.size - 1) * x_TD.shape[1]
    return Cost("", 0, x_TD.nbytes + weights_T.nbytes + outputs, 2 * x_TD.size)


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
    streamed = sum(lengths) * dim * kv.k.itemsize
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
    streamed = chosen * dim * kv.k.itemsize
    moved = streamed + q_THD.nbytes + chosen_TK.nbytes + 4 * len(q_THD) * heads * kv.value_dim
    return Cost(kv.dtype, streamed, moved, 2 * heads * (dim + kv.value_dim) * chosen)


def sample(logits_LV: F32, args: SampleArgs) -> Cost:
    """One pass with an exponential, whatever the filters: they decide how many more there are."""
    return Cost("", 0, logits_LV.nbytes, 4 * logits_LV.size)


COSTS: dict[str, Callable[..., Cost]] = {
    function.__name__: function
    for function in (
        *(embed, rms_norm, add, concat, add_rms_norm, linear, gated_linear, route, moe),
        *(rope_write, attention, index_select, sparse_attention, pool, sample),
        *(rope_queries, mul, mix, sparsify, match_rms),
        *(head_linear, latent_query, latent_write),
        *(layer_norm, add_layer_norm, scale, scale_heads, softcap, activate),
        *(gated, lora),
        *(causal_conv, delta_rule, gated_rms_norm, sigmoid_gate),
    )
}
"""By the op's name: every op of `Ops` that computes."""


def _bytes(bias: F32 | None) -> int:
    return 0 if bias is None else bias.nbytes


def _products(rows: int, weights: Sequence[Weight]) -> int:
    return sum(2 * rows * w.shape[0] * w.shape[1] for w in weights)


def _unit(weights: Sequence[Weight]) -> Unit:
    return "int8" if weights[0].kind in QUANTISED else "f32"


def _names(weights: Sequence[Weight]) -> str:
    """q4 576+192+192x576, or f16 64x32 + q4 64x32 where the kinds differ."""
    if len({(w.kind, w.shape[1]) for w in weights}) > 1:
        return " + ".join(map(_name, weights))
    outputs = "+".join(str(w.shape[0]) for w in weights)
    return f"{weights[0].kind} {outputs}x{weights[0].shape[1]}"


def _name(w: Weight) -> str:
    return f"{w.kind} {w.shape[0]}x{w.shape[1]}"
