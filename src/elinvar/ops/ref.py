"""The `ref` provider: numpy in float64, obviously right, slow. Every other provider is swept
against it. It rounds where the definition of an op rounds by design (int8 activations, the
cache's dtype), and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from elinvar.base.config import BLOCK_SIZE, KVSpec
from elinvar.ops import ref_sparse
from elinvar.ops.api import (
    F32,
    I32,
    Activation,
    Experts,
    KVLayer,
    Lora,
    SampleArgs,
    SampleResult,
    Scoring,
    new_kv_layers,
)
from elinvar.ops.layout import GROUP, QUANTISED, Weight, unpack, unpack_codes
from elinvar.ops.ref_recurrent import RecurrentRef

F64 = NDArray[np.float64]

MAX_FLOAT = np.finfo(np.float32).max
MAX_KV = {
    "f16": np.float32(65504),
    "bf16": np.float32(float.fromhex("0x1.fep127")),
    "f32": MAX_FLOAT,
}


class RefOps(RecurrentRef):
    name = "ref"

    def __init__(self) -> None:
        self._dense: WeakKeyDictionary[Weight, F32] = WeakKeyDictionary()

    def kv_layers(self, spec: KVSpec, num_blocks: int) -> list[Any]:
        return new_kv_layers(spec, num_blocks)

    def embed(self, ids_T: I32, w_VD: Weight, scale: float) -> F32:
        ids = np.where(ids_T < w_VD.shape[0], ids_T, 0)
        return (self._matrix(w_VD)[ids] * np.float32(scale)).astype(np.float32)

    def rms_norm(self, x_TD: F32, gain_D: F32, eps: float) -> F32:
        x = x_TD.astype(np.float64)
        return (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain_D).astype(np.float32)

    def add(self, x_TD: F32, y_TD: F32) -> F32:
        return x_TD + y_TD

    def concat(self, x_TD: F32, y_TE: F32) -> F32:
        return np.concatenate([x_TD, y_TE], axis=1)

    def add_rms_norm(self, x_TD: F32, y_TD: F32, gain_D: F32, eps: float) -> tuple[F32, F32]:
        s = x_TD + y_TD
        return s, self.rms_norm(s, gain_D, eps)

    def layer_norm(self, x_TD: F32, gain_D: F32, bias_D: F32 | None, eps: float) -> F32:
        x = x_TD.astype(np.float64)
        x -= x.mean(-1, keepdims=True)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain_D
        return (y if bias_D is None else y + bias_D).astype(np.float32)

    def add_layer_norm(
        self, x_TD: F32, y_TD: F32, gain_D: F32, bias_D: F32 | None, eps: float
    ) -> tuple[F32, F32]:
        s = x_TD + y_TD
        return s, self.layer_norm(s, gain_D, bias_D, eps)

    def scale(self, x_TD: F32, factor: float) -> F32:
        return x_TD * np.float32(factor)

    def scale_heads(self, q_THD: F32, positions_T: I32, factors_P: F32) -> F32:
        return q_THD * factors_P[positions_T][:, None, None]

    def softcap(self, x_TD: F32, cap: float) -> F32:
        return (cap * np.tanh(x_TD.astype(np.float64) / cap)).astype(np.float32)

    def activate(self, x_TD: F32, activation: Activation) -> F32:
        return _activated(x_TD, activation).astype(np.float32)

    def linear(self, x_TK: F32, weights: Sequence[Weight], bias_N: F32 | None = None) -> F32:
        y = np.concatenate([self._linear(x_TK, w) for w in weights], axis=1)
        return y if bias_N is None else y + bias_N

    def gated_linear(self, x_TK: F32, gate: Weight, up: Weight, activation: Activation) -> F32:
        return _gated(self._linear(x_TK, gate), self._linear(x_TK, up), activation)

    def gated(self, x_TN: F32, activation: Activation) -> F32:
        gate, up = np.split(x_TN, 2, axis=1)
        return _gated(gate, up, activation)

    def lora(self, y_TN: F32, x_TK: F32, adapters_T: I32, lora: Lora) -> None:
        for column, pairs in zip(lora.columns, lora.pairs, strict=True):
            for adapter, pair in enumerate(pairs):
                rows = np.flatnonzero(adapters_T == adapter)
                if pair is not None and len(rows):
                    a, b = (self._matrix(w).astype(np.float64) for w in (pair.a, pair.b))
                    more = x_TK[rows].astype(np.float64) @ a.T @ b.T * pair.scale
                    y_TN[rows, column : column + len(b)] += more.astype(np.float32)

    def route(
        self,
        logits_TE: F32,
        k: int,
        scoring: Scoring,
        renormalise: bool,
        scaling: float,
        bias_E: F32 | None = None,
        num_groups: int = 1,
        top_groups: int = 1,
    ) -> tuple[I32, F32]:
        ids = np.empty((len(logits_TE), k), np.int32)
        weights = np.empty((len(logits_TE), k), np.float32)
        for t, row in enumerate(logits_TE.astype(np.float64)):
            if scoring == "softmax":
                scores = np.exp(row - row.max())
                scores /= scores.sum()
            else:
                scores = 1 / (1 + np.exp(-row))
            by_logit = bias_E is None and (scoring == "softmax" or num_groups == 1)
            choice = row if by_logit else scores if bias_E is None else scores + bias_E
            groups = choice.reshape(num_groups, -1)
            best = np.sort(groups)[:, -1 if scoring == "softmax" else -2 :].sum(-1)
            kept = np.argsort(-best, kind="stable")[:top_groups]
            closed = ~np.isin(np.arange(num_groups), kept)
            choice = np.where(closed[:, None], -np.inf, groups).reshape(-1)
            ids[t] = np.sort(np.argsort(-choice, kind="stable")[:k])
            chosen = scores[ids[t]]
            weights[t] = (chosen / chosen.sum() if renormalise else chosen) * scaling
        return ids, weights

    def moe(
        self,
        x_TD: F32,
        ids_TK: I32,
        weights_TK: F32,
        experts: Experts,
        activation: Activation,
        scale_inputs: bool = False,
    ) -> F32:
        y = np.zeros(x_TD.shape)
        for e in np.unique(ids_TK):  # ascending
            tokens, places = np.nonzero(ids_TK == e)
            x = x_TD[tokens]
            weights = weights_TK[tokens, places][:, None]
            before, after = (weights, np.ones_like(weights))[:: 1 if scale_inputs else -1]
            g = self._linear(x, experts.gates[e]) * before + _row(experts.gate_bias, e)
            u = self._linear(x, experts.ups[e]) * before + _row(experts.up_bias, e)
            d = self._linear(_gated(g, u, activation), experts.downs[e])
            y[tokens] += after.astype(np.float64) * (d + _row(experts.down_bias, e))
        return y.astype(np.float32)

    def rope_write(
        self,
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
    ) -> F32:
        t = qkv_TN.shape[0]
        num_kv, dim = kv.k.shape[1:3]
        qkv = qkv_TN.reshape(t, -1, dim)
        q, k, v = np.split(qkv, [num_heads, num_heads + num_kv], axis=1)
        if q_gain_D is not None:
            q = self.rms_norm(q.reshape(t, -1, q_gain_D.size), q_gain_D, eps).reshape(q.shape)
        if k_gain_D is not None:
            k = self.rms_norm(k.reshape(t, -1, k_gain_D.size), k_gain_D, eps).reshape(k.shape)
        if v_gain_D is not None:
            v = self.rms_norm(v, v_gain_D, eps)
        table = rope_PD[positions_T].astype(np.float64)
        q, k = _rotate(q, table), _rotate(k, table)
        block, offset = slots_T // BLOCK_SIZE, slots_T % BLOCK_SIZE
        kv.k[block, :, :, offset] = to_kv(k, kv.dtype)
        if not kv.keys_alone:
            kv.v[block, :, offset, :dim] = to_kv(v, kv.dtype)
        return np.ascontiguousarray(q)

    def rope_queries(
        self,
        q_TN: F32,
        positions_T: I32,
        rope_PD: F32,
        num_heads: int,
        gain_D: F32,
        eps: float,
    ) -> F32:
        q = self.rms_norm(q_TN.reshape(len(q_TN), num_heads, -1), gain_D, eps)
        return _rotate(q, rope_PD[positions_T].astype(np.float64))

    def mul(self, x_TD: F32, y_TN: F32, start: int = 0) -> F32:
        return x_TD * y_TN[:, start : start + x_TD.shape[1]]

    def mix(self, xs_TD: Sequence[F32], coefs_TC: F32) -> F32:
        coefs = coefs_TC.reshape(len(coefs_TC), -1, len(xs_TD)).astype(np.float64)
        return np.einsum("tos,std->otd", coefs, np.stack(xs_TD)).astype(np.float32)

    def sparsify(self, x_TN: F32, deviations: float) -> F32:
        x = x_TN.astype(np.float64)
        least = x.mean(-1, keepdims=True) + deviations * x.std(-1, keepdims=True)
        return np.maximum(x - least, 0).astype(np.float32)

    def match_rms(self, x_TD: F32, y_TD: F32) -> F32:
        x, y = ((a.astype(np.float64) ** 2).mean(-1, keepdims=True) for a in (x_TD, y_TD))
        return (x_TD * np.sqrt(y / np.maximum(x, 1e-5))).astype(np.float32)

    def head_linear(self, x_TK: F32, w: Weight, num_heads: int) -> F32:
        y = self._linear(x_TK.reshape(-1, w.shape[1]), w)  # every head by every head's rows
        y = y.reshape(len(x_TK), num_heads, num_heads, -1)
        own = np.arange(num_heads)
        return np.ascontiguousarray(y[:, own, own]).reshape(len(x_TK), -1)

    def latent_query(
        self, q_TN: F32, w: Weight, positions_T: I32, rope_PD: F32, num_heads: int
    ) -> F32:
        t, dim = len(q_TN), w.shape[1]
        q = q_TN.reshape(t, num_heads, -1)
        latent = self.head_linear(q[..., :dim].reshape(t, -1), w, num_heads)
        rotated = _rotate(q[..., dim:], rope_PD[positions_T].astype(np.float64))
        return np.concatenate([latent.reshape(t, num_heads, -1), rotated], -1)

    def latent_write(
        self,
        x_TN: F32,
        positions_T: I32,
        rope_PD: F32,
        kv: KVLayer,
        slots_T: I32,
        gain_R: F32,
        eps: float,
    ) -> None:
        rank = gain_R.size
        rotated = _rotate(x_TN[:, None, rank:], rope_PD[positions_T].astype(np.float64))
        key = np.concatenate([self.rms_norm(x_TN[:, :rank], gain_R, eps), rotated[:, 0]], -1)
        block, offset = slots_T // BLOCK_SIZE, slots_T % BLOCK_SIZE
        kv.k[block, 0, :, offset] = to_kv(key, kv.dtype)

    def attention(
        self,
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
    ) -> F32:
        t, heads, dim = q_THD.shape
        num_kv, value_dim = kv.k.shape[1], kv.value_dim
        out = np.zeros((t, heads, value_dim), np.float32)
        for r, length in enumerate(seq_lens):
            blocks = block_table_RB[r, : -(-int(length) // BLOCK_SIZE)]
            k = from_kv(kv.k[blocks], kv.dtype).transpose(1, 0, 3, 2).reshape(num_kv, -1, dim)
            v = from_kv(kv.v[blocks], kv.dtype)[..., :value_dim]
            v = v.transpose(1, 0, 2, 3).reshape(num_kv, -1, value_dim)
            for i in range(query_start_loc[r], query_start_loc[r + 1]):
                last = int(positions_T[i])
                least = first if window is None else max(first, last - window + 1)
                least = least if chunk is None else max(least, last // chunk * chunk)
                for h in range(heads):
                    keys = k[h // (heads // num_kv), least : last + 1].astype(np.float64)
                    values = v[h // (heads // num_kv), least : last + 1].astype(np.float64)
                    s = keys @ q_THD[i, h].astype(np.float64) * scale
                    if softcap is not None:
                        s = softcap * np.tanh(s / softcap)
                    sink = -np.inf if sinks_H is None else sinks_H[h].astype(np.float64)
                    largest = max(s.max(), sink)
                    p = np.exp(s - largest)
                    out[i, h] = (p / (p.sum() + np.exp(sink - largest))) @ values
        return out.reshape(t, heads * value_dim)

    def pool(self, x_TD: F32, starts: I32, weights_T: F32) -> F32:
        weighted = x_TD.astype(np.float64) * weights_T[:, None]
        sums = [weighted[a:b].sum(0) for a, b in pairwise(starts)]
        return np.array(sums, np.float32).reshape(-1, x_TD.shape[1])

    def index_select(
        self,
        q_THD: F32,
        weights_TH: F32,
        kv: KVLayer,
        query_start_loc: I32,
        block_table_RB: I32,
        positions_T: I32,
        k: int,
        first: int = 0,
    ) -> I32:
        keys, where = from_kv(kv.k[:, 0], kv.dtype), (query_start_loc, block_table_RB, positions_T)
        return ref_sparse.index_select(q_THD, weights_TH, keys, *where, k, first)

    def sparse_attention(
        self,
        q_THD: F32,
        kv: KVLayer,
        query_start_loc: I32,
        block_table_RB: I32,
        positions_T: I32,
        chosen_TK: I32,
        scale: float,
    ) -> F32:
        keys, where = from_kv(kv.k[:, 0], kv.dtype), (query_start_loc, block_table_RB, positions_T)
        return ref_sparse.sparse_attention(q_THD, keys, kv.value_dim, *where, chosen_TK, scale)

    def record(self, run: Callable[[], F32]) -> Callable[[], F32]:
        return run

    def sample(self, logits_LV: F32, args: SampleArgs) -> SampleResult:
        num_rows, vocab = logits_LV.shape
        ids = np.empty(num_rows, np.int32)
        logprobs = np.empty(num_rows, np.float32)
        top_ids = np.empty((num_rows, args.num_logprobs), np.int32)
        top = np.empty((num_rows, args.num_logprobs), np.float32)
        for i, row in enumerate(logits_LV.astype(np.float64)):
            z = row - row.max()
            lse = np.log(np.exp(z).sum())
            order = np.lexsort((np.arange(vocab), -row))
            if args.temperature[i] == 0:
                ids[i] = order[0]
            else:
                kept = _kept(
                    z / args.temperature[i], order, args.top_k[i], args.top_p[i], args.min_p[i]
                )
                noise = gumbel(int(args.seeds[i]), int(args.positions[i]), kept)
                scores = z[kept] / args.temperature[i] + noise
                ids[i] = kept[np.lexsort((kept, -scores))[0]]
            logprobs[i] = z[ids[i]] - lse
            top_ids[i] = order[: args.num_logprobs]
            top[i] = z[top_ids[i]] - lse
        return SampleResult(ids, logprobs, top_ids, top)

    def _matrix(self, w: Weight) -> F32:
        dense = self._dense.get(w)
        if dense is None:
            dense = self._dense[w] = unpack(w)
        return dense

    def _linear(self, x_TK: F32, w: Weight) -> F32:
        if w.kind not in QUANTISED:
            return (x_TK.astype(np.float64) @ self._matrix(w).T.astype(np.float64)).astype(
                np.float32
            )
        x_codes, x_scales = quantize_rows(x_TK)
        codes, scales, mins = unpack_codes(w)
        t, k = x_TK.shape
        xg = x_codes.reshape(t, k // GROUP, GROUP).astype(np.float64)
        wg = codes.reshape(w.shape[0], k // GROUP, GROUP).astype(np.float64)
        y = np.zeros((t, w.shape[0]))
        for g in range(k // GROUP):
            factor = (x_scales[:, g, None] * scales[None, :, g]).astype(np.float64)
            y += xg[:, g] @ wg[:, g].T * factor
            if mins is not None:
                sums = x_scales[:, g] * xg[:, g].sum(-1).astype(np.float32)
                y += sums[:, None].astype(np.float64) * mins[None, :, g]
        return y.astype(np.float32)


def quantize_rows(x_TK: F32) -> tuple[NDArray[np.int8], F32]:
    """int8 codes [T, K] and scales [T, K/32]; groups whose largest |x| is below 1e-30 are zero."""
    t, k = x_TK.shape
    groups = saturate(x_TK, MAX_FLOAT).reshape(t, k // GROUP, GROUP)
    largest = np.abs(groups).max(-1)
    live = largest >= np.float32(1e-30)
    safe = np.where(live, largest, np.float32(1))
    scales = np.where(live, safe / np.float32(127), np.float32(0))
    inverse = np.where(live, np.float32(127) / safe, np.float32(0))
    codes = np.rint(groups * inverse[..., None]).astype(np.int8)
    return codes.reshape(t, k), scales


def gumbel(seed: int, position: int, token_ids: NDArray[Any]) -> F64:
    """Gumbel noise of (seed, position, token id): word id % 4 of Philox4x32-10 with counter
    (id // 4, position, 0, 0) and the seed's two halves as key; 23 bits of it are uniform."""
    ids = np.asarray(token_ids, np.uint64)
    words = philox(ids >> np.uint64(2), position, seed)
    bits = words[(ids & np.uint64(3)).astype(np.int64), np.arange(len(ids))]
    uniform = ((bits >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23
    return -np.log(-np.log(uniform))


def philox(counter: NDArray[np.uint64], position: int, seed: int) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al., 2011) -> [4, n] words."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0 = counter & low
    c1 = np.full_like(c0, position)
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> shift) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> shift) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def saturate(x: F32, limit: np.float32) -> F32:
    """Within -limit .. limit; NaN becomes limit."""
    return np.where(np.isnan(x), limit, np.clip(x, -limit, limit)).astype(np.float32)


def to_kv(x: F32, dtype: str) -> NDArray[Any]:
    """Round to the cache's dtype, to nearest even, saturating; bf16 is returned as bits."""
    x = saturate(x, MAX_KV[dtype])
    if dtype == "f16":
        return x.astype(np.float16)
    if dtype == "bf16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return x


def from_kv(x: NDArray[Any], dtype: str) -> F32:
    if dtype == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _activated(x: F32, activation: Activation) -> F64:
    g = x.astype(np.float64)
    with np.errstate(over="ignore"):
        if activation == "silu":
            return g / (1 + np.exp(-g))
        if activation == "gelu_tanh":
            return 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
        if activation == "gelu":
            return 0.5 * g * _erfc(-g / np.sqrt(2))
        if activation == "relu2":
            return np.maximum(g, 0) ** 2
        low = np.minimum(g, 7)
        return low / (1 + np.exp(-1.702 * low))


def _gated(g: F32, u: F32, activation: Activation) -> F32:
    factor = np.clip(u.astype(np.float64), -7, 7) + 1 if activation == "swiglu_oai" else u
    return (_activated(g, activation) * factor).astype(np.float32)


def _row(bias: F32 | None, e: int) -> F32 | float:
    return 0.0 if bias is None else bias[e]


def _rotate(x: F32, table_TR: F64) -> F32:
    rotary = table_TR.shape[-1]
    half = rotary // 2
    cos, sin = table_TR[:, None, :half], table_TR[:, None, half:]
    a, b = x[..., :half].astype(np.float64), x[..., half:rotary].astype(np.float64)
    turned = [a * cos - b * sin, b * cos + a * sin]
    return np.concatenate([*turned, x[..., rotary:]], -1).astype(np.float32)


def _kept(z: F64, order: NDArray[Any], top_k: int, top_p: float, min_p: float) -> NDArray[Any]:
    """Token ids that the filters leave, likeliest first."""
    if 0 < top_k < len(order):
        order = order[:top_k]
    if top_p < 1:
        p = np.exp(z[order])
        reached = np.cumsum(p) >= np.float64(np.float32(top_p)) * p.sum()
        order = order[: int(np.argmax(reached)) + 1] if reached.any() else order
    if min_p > 0:
        order = order[z[order] >= np.log(np.float64(min_p))]
    return order
