"""The oracle of the ops of layers with a recurrent state (see ref.py)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from elinvar.base.config import BLOCK_SIZE
from elinvar.ops.api import F32, I32
from elinvar.ops.caches import StateLayer

F64 = NDArray[np.float64]


class RecurrentRef:
    def causal_conv(
        self,
        x_TN: F32,
        w_KC: F32,
        state: StateLayer,
        query_start_loc: I32,
        seq_lens: I32,
        block_table_RB: I32,
    ) -> F32:
        taps, channels = w_KC.shape
        out = np.empty((len(x_TN), channels), np.float32)
        for tokens, before, after in _spans(query_start_loc, seq_lens, block_table_RB):
            tail = np.zeros_like(state.tails[after]) if before is None else state.tails[before]
            inputs = np.concatenate([tail, x_TN[tokens, :channels]])
            windows = np.lib.stride_tricks.sliding_window_view(inputs.astype(np.float64), taps, 0)
            out[tokens] = _silu(np.einsum("tck,kc->tc", windows, w_KC.astype(np.float64)))
            state.tails[after] = inputs[len(inputs) - taps + 1 :]
        return out

    def delta_rule(
        self,
        qkv_TC: F32,
        x_TN: F32,
        a_log_H: F32,
        dt_bias_H: F32,
        state: StateLayer,
        query_start_loc: I32,
        seq_lens: I32,
        block_table_RB: I32,
    ) -> F32:
        c, t = state.config, len(qkv_TC)
        keys = c.key_heads * c.key_dim
        q, k = (
            _l2_normed(part.astype(np.float64).reshape(t, c.key_heads, c.key_dim)).repeat(
                c.heads // c.key_heads, axis=1
            )
            for part in (qkv_TC[:, :keys], qkv_TC[:, keys : 2 * keys])
        )
        v = qkv_TC[:, 2 * keys :].astype(np.float64).reshape(t, c.heads, c.value_dim)
        gates = x_TN[:, -2 * c.heads :].astype(np.float64)
        beta = 1 / (1 + np.exp(-gates[:, : c.heads]))
        step = np.logaddexp(0, gates[:, c.heads :] + dt_bias_H)
        decay = np.exp(-np.exp(a_log_H.astype(np.float64)) * step)
        out = np.empty((t, c.heads, c.value_dim), np.float32)
        for tokens, before, after in _spans(query_start_loc, seq_lens, block_table_RB):
            s: F64 = np.zeros((c.heads, c.key_dim, c.value_dim))
            if before is not None:
                s = state.states[before, ..., : c.value_dim].astype(np.float64)
            for i in range(tokens.start, tokens.stop):
                s = s * decay[i, :, None, None]
                u = (v[i] - np.einsum("hd,hdv->hv", k[i], s)) * beta[i, :, None]
                s = s + k[i, :, :, None] * u[:, None, :]
                out[i] = np.einsum("hd,hdv->hv", q[i], s) * c.key_dim**-0.5
            state.states[after, ..., : c.value_dim] = s
        return out.reshape(t, -1)

    def gated_rms_norm(self, x_TN: F32, gate_TN: F32, first: int, gain_D: F32, eps: float) -> F32:
        x = x_TN.astype(np.float64).reshape(len(x_TN), -1, len(gain_D))
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain_D
        gate = gate_TN[:, first : first + x_TN.shape[1]].astype(np.float64)
        return (x.reshape(x_TN.shape) * _silu(gate)).astype(np.float32)

    def sigmoid_gate(self, x_TN: F32, gate_TN: F32) -> F32:
        return (x_TN / (1 + np.exp(-gate_TN.astype(np.float64)))).astype(np.float32)


def _spans(
    query_start_loc: I32, seq_lens: I32, block_table_RB: I32
) -> Iterator[tuple[slice, int | None, int]]:
    """Per sequence: its tokens, the blocks of the state before (None: there is none) and after."""
    starts = query_start_loc.tolist()
    for first, stop, end, table in zip(starts, starts[1:], seq_lens, block_table_RB, strict=False):
        begin = end - (stop - first)
        before = int(table[(begin - 1) // BLOCK_SIZE]) if begin else None
        yield slice(first, stop), before, int(table[(end - 1) // BLOCK_SIZE])


def _silu(x: F64) -> F64:
    return x / (1 + np.exp(-x))


def _l2_normed(x: F64) -> F64:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
