"""What an op call has to move and to compute, from its arguments alone.

Bytes are those that the op's meaning makes unavoidable: every input read once, every output
written once, weights and cache as they are stored. Operations count a multiply-add as two.
A kernel that reads a weight twice is slower than its roof, not busier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from elinvar.base.config import Activation, Scoring
from elinvar.ops.api import F32, I32
from elinvar.ops.arguments import Experts, Lora, SampleArgs
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


def gated_rms_norm(x_TN: F32, gate_TN: F32, first: int, gain_D: F32, eps: float) -> Cost:
    return Cost("", 0, 3 * x_TN.nbytes + gain_D.nbytes, 6 * x_TN.size)


def sigmoid_gate(x_TN: F32, gate_TN: F32) -> Cost:
    return Cost("", 0, 3 * x_TN.nbytes, 2 * x_TN.size)


def pool(x_TD: F32, starts: I32, weights_T: F32 | None) -> Cost:
    outputs = 4 * (starts.size - 1) * x_TD.shape[1]
    if weights_T is None:
        return Cost("", 0, x_TD.nbytes + outputs, x_TD.size)
    return Cost("", 0, x_TD.nbytes + weights_T.nbytes + outputs, 2 * x_TD.size)


def spread(x_LC: F32, columns_V: I32) -> Cost:
    return Cost("", 0, x_LC.nbytes + 4 * len(x_LC) * columns_V.size, 0)


def sample(logits_LV: F32, args: SampleArgs) -> Cost:
    """One pass with an exponential, whatever the filters: they decide how many more there are."""
    return Cost("", 0, logits_LV.nbytes, 4 * logits_LV.size)


def score(logits_LV: F32, ids_L: I32, num_logprobs: int) -> Cost:
    return Cost("", 0, logits_LV.nbytes, 4 * logits_LV.size)


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
