"""The oracle of attention, and of what is written to its cache (see ref.py)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar.base.config import BLOCK_SIZE
from elinvar.ops import ref_sparse
from elinvar.ops.api import F32, I32
from elinvar.ops.caches import KVLayer
from elinvar.ops.layout import Weight
from elinvar.ops.ref_linear import LinearRef
from elinvar.ops.ref_rows import F64, MAX_FLOAT, RowsRef, saturate

MAX_KV = {
    "f16": np.float32(65504),
    "bf16": np.float32(float.fromhex("0x1.fep127")),
    "f32": MAX_FLOAT,
    "int8": np.float32(float.fromhex("0x1.fcp127")),
}


class AttentionRef(RowsRef, LinearRef):
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
        write_keys(kv, slots_T, k)
        if not kv.keys_alone:
            write_values(kv, slots_T, v)
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
        write_keys(kv, slots_T, key[:, None])

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
            k = read_keys(kv, blocks).transpose(1, 0, 3, 2).reshape(num_kv, -1, dim)
            v = read_values(kv, blocks)[..., :value_dim]
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

    def block_shares(
        self,
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
    ) -> None:
        heads, num_kv = q_THD.shape[1], kv.k.shape[1]
        for table, (start, stop) in zip(block_table_RB, pairwise(query_start_loc), strict=True):
            for t in range(start, stop):
                last = int(positions_T[t])
                starts = np.arange(0, last + 1, BLOCK_SIZE)
                keys = read_keys(kv, table[: len(starts)]).transpose(1, 0, 3, 2)
                for h in range(heads):
                    k = keys[h // (heads // num_kv)].reshape(-1, keys.shape[-1])[: last + 1]
                    s = k.astype(np.float64) @ q_THD[t, h].astype(np.float64) * scale
                    if softcap is not None:
                        s = softcap * np.tanh(s / softcap)
                    sink = -np.inf if sinks_H is None else sinks_H[h].astype(np.float64)
                    largest = max(s.max(), sink)
                    p = np.exp(s - largest)
                    p /= p.sum() + np.exp(sink - largest)
                    own = shares_TB[t, : len(starts)]
                    own[:] = np.fmax(own, np.add.reduceat(p, starts).astype(np.float32))

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
        keys, where = read_keys(kv)[:, 0], (query_start_loc, block_table_RB, positions_T)
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
        keys, where = read_keys(kv)[:, 0], (query_start_loc, block_table_RB, positions_T)
        return ref_sparse.sparse_attention(q_THD, keys, kv.value_dim, *where, chosen_TK, scale)


def write_keys(kv: KVLayer, slots_T: I32, k_THD: F32) -> None:
    block, offset = slots_T // BLOCK_SIZE, slots_T % BLOCK_SIZE
    count = _turned_dims(kv)
    if count > 1:
        k_THD = spread(saturate(k_THD, MAX_KV["int8"] / np.float32(count)), count)
    kv.k[block, :, :, offset], scales_TH = _stored(k_THD, kv.dtype)
    if kv.k_scales is not None and scales_TH is not None:
        scales_TH = scales_TH / np.float32(count)
        kv.k_scales[block, :, offset] = scales_TH


def write_values(kv: KVLayer, slots_T: I32, v_THD: F32) -> None:
    block, offset = slots_T // BLOCK_SIZE, slots_T % BLOCK_SIZE
    kv.v[block, :, offset, : v_THD.shape[2]], scales_TH = _stored(v_THD, kv.dtype)
    if kv.v_scales is not None:
        kv.v_scales[block, :, offset] = scales_TH


def read_keys(kv: KVLayer, blocks: Any = slice(None)) -> F32:
    """What they stand for -> [B, H, D, 32]"""
    keys = from_kv(kv.k[blocks], kv.dtype)
    if kv.k_scales is None:
        return keys
    keys = keys * kv.k_scales[blocks][..., None, :]
    return spread(keys.swapaxes(-1, -2), _turned_dims(kv)).swapaxes(-1, -2)


def read_values(kv: KVLayer, blocks: Any = slice(None)) -> F32:
    """-> [B, H, 32, D]"""
    values = from_kv(kv.v[blocks], kv.dtype)
    return values if kv.v_scales is None else values * kv.v_scales[blocks][..., None]


def _turned_dims(kv: KVLayer) -> int:
    """How many dims, 16 apart, are turned together; 1: none."""
    whole, rest = divmod(kv.k.shape[2], 16)
    return 1 if kv.dtype != "int8" or kv.keys_alone or rest else whole & -whole


def spread(x: F32, count: int) -> F32:
    """Hadamard's matrix times the dims 16 apart; twice it is `count` times x."""
    shape = x.shape
    step = 1
    while step < count:
        x = x.reshape(*shape[:-1], -1, 2, step * 16)
        a, b = x[..., 0, :], x[..., 1, :]
        x = np.stack([a + b, a - b], -2)
        step *= 2
    return x.reshape(shape)


def _stored(x_THD: F32, dtype: str) -> tuple[NDArray[Any], F32 | None]:
    """What the cache holds of each vector, and its scale."""
    return to_int8(x_THD) if dtype == "int8" else (to_kv(x_THD, dtype), None)


def to_int8(x: F32) -> tuple[NDArray[np.int8], F32]:
    """Codes, and a scale for each vector along the last axis."""
    x = saturate(x, MAX_KV["int8"])
    largest = np.abs(x).max(-1)
    live = largest >= np.float32(1e-30)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=live)
    scales = np.where(live, largest / np.float32(127), np.float32(0))
    return np.rint(x * inverse[..., None]).astype(np.int8), scales


def to_kv(x: F32, dtype: str) -> NDArray[Any]:
    """Round to the cache's dtype, if that is a float's, to nearest even, saturating; bf16 is returned as bits."""
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


def _rotate(x: F32, table_TR: F64) -> F32:
    rotary = table_TR.shape[-1]
    half = rotary // 2
    cos, sin = table_TR[:, None, :half], table_TR[:, None, half:]
    a, b = x[..., :half].astype(np.float64), x[..., half:rotary].astype(np.float64)
    turned = [a * cos - b * sin, b * cos + a * sin]
    return np.concatenate([*turned, x[..., rotary:]], -1).astype(np.float32)
