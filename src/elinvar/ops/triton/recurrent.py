"""Layers with a recurrent state: the short convolution and the gated delta rule (ops/api.py).

Legend: T tokens, R sequences, C channels, K taps, H heads, D key dims, V value dims.
Docs: docs/design/045-gpu-recurrence.md.

A sequence's tokens go one after the other, decoded or of a prompt, through the same loop: so a state
does not depend on chunks. It is read once, stays in registers over all tokens of the step, and is
written once. Programs share heads and value dims, which do not touch each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elinvar.base.config import BLOCK_SIZE
from elinvar.ops.triton.activations import activated
from elinvar.ops.triton.attention import find_tile
from elinvar.ops.triton.caches import StateLayer
from elinvar.ops.triton.cases import KernelCase
from elinvar.ops.triton.device import INTERPRETER

_BLOCK = tl.constexpr(BLOCK_SIZE)
_COLUMNS = 1024 if INTERPRETER else 8
"""Value dims of a program: with 128 key dims one warp holds its part of the state in 32 registers a
thread, and sums over key dims need no barrier. Qwen3-Next has 512 such programs a sequence. (The
interpreter, which is slow to start a program, gives it all of them.)"""
_CHANNELS = 256
"""Most channels of a program."""


@triton.jit
def _blocks(past, count, table):
    """Of a sequence that computes `count` > 0 tokens after `past`: the blocks of its states before them,
    which means nothing where there was none, and after."""
    before = tl.load(table + tl.maximum(past - 1, 0) // _BLOCK)
    after = tl.load(table + (past + count - 1) // _BLOCK)
    return before.to(tl.int64), after.to(tl.int64)


# Reference: RecurrentRef.causal_conv. x [T, N], w [K, C], tails [B, K - 1, C] -> out [T, C], all f32.
# Must move 8 C bytes a token and 8 (K - 1) C a sequence.
@triton.jit(do_not_specialize=["num_sequences", "stride_table"])
def conv_kernel(
    x, w, tails, out, starts, lens, table, num_sequences, stride_table, stride_x, stride_block,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has TOKENS >= K - 1 tokens of a sequence: only that of its first ones reads a tail,
    and so it writes the new one, which may lie in the same block."""
    sequence, token, begin, count = find_tile(tl.program_id(1), starts, num_sequences, TOKENS)
    if token >= count:
        return
    past = tl.load(lens + sequence) - count
    before, after = _blocks(past, count, table + sequence.to(tl.int64) * stride_table)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = channels < CHANNELS
    x += begin.to(tl.int64) * stride_x + channels[None, :]
    old = tails + before * stride_block + channels[None, :]

    tokens = token + tl.arange(0, TOKENS)
    own = (tokens < count)[:, None] & held[None, :]
    acc = tl.zeros([TOKENS, BLOCK], tl.float32)
    for tap in range(TAPS):
        at = tokens[:, None] - (TAPS - 1) + tap
        value = tl.load(x + at.to(tl.int64) * stride_x, mask=own & (at >= 0), other=0.0)
        kept = own & (at < 0) & (at >= -past)
        value += tl.load(old + (at + TAPS - 1) * CHANNELS, mask=kept, other=0.0)
        weight = tl.load(w + tap * CHANNELS + channels, mask=held, other=0.0)
        acc = tl.fma(value, weight[None, :], acc)
    place = (begin + tokens).to(tl.int64)[:, None] * CHANNELS + channels[None, :]
    tl.store(out + place, activated(acc, "silu"), mask=own)

    if TAPS > 1 and token == 0:
        row = tl.arange(0, TAIL)[:, None]
        at = count - (TAPS - 1) + row
        stored = (row < TAPS - 1) & held[None, :]
        value = tl.load(x + at.to(tl.int64) * stride_x, mask=stored & (at >= 0), other=0.0)
        kept = stored & (at < 0) & (at >= -past)
        value += tl.load(old + (row + count) * CHANNELS, mask=kept, other=0.0)
        tl.debug_barrier()  # others of the program read what is overwritten now
        new = tails + after * stride_block + channels[None, :]
        tl.store(new + row * CHANNELS, value, mask=stored)


@triton.jit
def _softplus(x):
    """ln(1 + e^x) = max(x, 0) + ln(1 + e) with e = e^-|x|; ln(1 + e) = 2 atanh(s), s = e / (2 + e) <=
    1/3, so that the result is as precise where it is tiny (as csrc/rows_recurrent.h)."""
    e = tl.exp(-tl.abs(x))
    s = e / (e + 2.0)
    z = s * s
    p = 0.1538461538 + z * 0.1333333333
    p = 0.1818181818 + z * p
    p = 0.2222222222 + z * p
    p = 0.2857142857 + z * p
    p = 0.4 + z * p
    p = 0.6666666667 + z * p
    return tl.maximum(x, 0.0) + s * (2.0 + z * p)


# Reference: RecurrentRef.delta_rule. qkv [T, C], x [T, N], states [B, H, D, V] -> out [T, H, V], all f32.
# Must move 8 D V bytes a head of a sequence, 4 (C + H V) a token.
@triton.jit(do_not_specialize=["stride_table"])
def delta_kernel(
    qkv, x, a_log, dt_bias, states, out, starts, lens, table, stride_table, stride_x, stride_block,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    PADDED: tl.constexpr, DIMS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both sums of a token over the state, k S and q S, are of the state before it, so that they do
    not wait for each other: with S' = S * decay + k u, q S' is decay * q S + (q k) u. Norms of q and
    k are factors of sums, as well."""
    PARTS: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    head, sequence = tl.program_id(0) // PARTS, tl.program_id(1)
    begin = tl.load(starts + sequence).to(tl.int64)
    count = (tl.load(starts + sequence + 1) - begin).to(tl.int32)
    if count == 0:
        return
    past = tl.load(lens + sequence) - count
    before, after = _blocks(past, count, table + sequence.to(tl.int64) * stride_table)
    dims = tl.arange(0, DIMS)
    columns = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    key, value = dims < D, columns < V
    inside = key[:, None] & (columns < PADDED)[None, :]
    place = (head * D + dims)[:, None] * PADDED + columns[None, :]
    known = inside & (dims < tl.where(past > 0, D, 0))[:, None]
    s = tl.load(states + before * stride_block + place, mask=known, other=0.0)

    KEYS: tl.constexpr = KEY_HEADS * D
    CHANNELS: tl.constexpr = 2 * KEYS + HEADS * V
    q_at = head // (HEADS // KEY_HEADS) * D + dims
    v_at = 2 * KEYS + head * V + columns
    rate, shift = tl.exp(tl.load(a_log + head)), tl.load(dt_bias + head)
    for nth in tl.range(count, num_stages=STAGES):
        token = begin + nth
        row, gates = qkv + token * CHANNELS, x + token * stride_x + head
        q = tl.load(row + q_at, mask=key, other=0.0)
        k = tl.load(row + KEYS + q_at, mask=key, other=0.0)
        v = tl.load(row + v_at, mask=value, other=0.0)
        beta = 1.0 / (1.0 + tl.exp(-tl.load(gates)))
        decay = tl.exp(-rate * _softplus(tl.load(gates + HEADS) + shift))
        k_norm = tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        q_norm = tl.rsqrt((tl.sum(q * q, 0) + 1e-6) * D)
        k_s, q_s = tl.sum(k[:, None] * s, 0), tl.sum(q[:, None] * s, 0)
        u = (v - decay * k_norm * k_s) * (beta * k_norm)
        s = tl.fma(k[:, None], u[None, :], s * decay)
        y = tl.fma(tl.sum(q * k, 0), u, decay * q_s) * q_norm
        tl.store(out + (token * HEADS + head) * V + columns, y, mask=value)
    tl.debug_barrier()  # threads may hold copies of a number that is overwritten now
    tl.store(states + after * stride_block + place, s, mask=inside)


def causal_conv(
    x_TN: torch.Tensor,
    w_KC: torch.Tensor,
    state: StateLayer,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table_RB: torch.Tensor,
) -> torch.Tensor:
    """`Ops.causal_conv` -> [T, C] f32. Tokens after the last that query_start_loc tells of, and sequences
    without tokens, only fill the batch up: they have no state, and what is returned for them means
    nothing. Nothing here depends on what tensors hold."""
    taps, channels = w_KC.shape
    out = x_TN.new_empty(len(x_TN), channels, dtype=torch.float32)
    cut, sequences = conv_cut(taps, channels), len(seq_lens)
    tiles = len(x_TN) // cut["TOKENS"] + sequences
    conv_kernel[triton.cdiv(channels, cut["BLOCK"]), tiles](
        x_TN, w_KC, state.tails, out, query_start_loc, seq_lens, block_table_RB,
        sequences, block_table_RB.stride(0), x_TN.stride(0), state.tails.stride(0),
        CHANNELS=channels, TAPS=taps, **cut,
    )  # fmt: skip
    return out


def delta_rule(
    qkv_TC: torch.Tensor,
    x_TN: torch.Tensor,
    a_log_H: torch.Tensor,
    dt_bias_H: torch.Tensor,
    state: StateLayer,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table_RB: torch.Tensor,
) -> torch.Tensor:
    """`Ops.delta_rule` -> [T, H V] f32; as `causal_conv`."""
    c = state.config
    out = qkv_TC.new_empty(len(qkv_TC), c.heads * c.value_dim)
    cut = delta_cut(c.key_dim, c.value_dim)
    parts = triton.cdiv(c.value_dim, cut["COLUMNS"])
    delta_kernel[c.heads * parts, len(seq_lens)](
        qkv_TC, x_TN[:, -2 * c.heads :], a_log_H, dt_bias_H, state.states, out,
        query_start_loc, seq_lens, block_table_RB,
        block_table_RB.stride(0), x_TN.stride(0), state.states.stride(0),
        HEADS=c.heads, KEY_HEADS=c.key_heads, D=c.key_dim, V=c.value_dim, PADDED=c.padded_dim,
        **cut,
    )  # fmt: skip
    return out


def conv_cut(taps: int, channels: int) -> dict[str, int]:
    """How `conv_kernel` is cut. No sum crosses tokens or channels."""
    tail = triton.next_power_of_2(max(1, taps - 1))
    block = min(_CHANNELS, triton.next_power_of_2(channels))
    return {"TOKENS": max(8, tail), "TAIL": tail, "BLOCK": block}


def delta_cut(key_dim: int, value_dim: int) -> dict[str, int]:
    """How `delta_kernel` is cut, for every number of tokens: 32 numbers of a state a thread."""
    dims = triton.next_power_of_2(key_dim)
    columns = min(_COLUMNS, triton.next_power_of_2(value_dim))
    return {"DIMS": dims, "COLUMNS": columns, "STAGES": 3, "num_warps": max(1, dims // 128)}


_PLACES = {
    **dict.fromkeys(("starts", "lens", "table"), "*i32"),
    **{"stride_table": "i32", "stride_x": "i32:16", "stride_block": "i32:16"},
}


def _delta_case(key_heads: int, heads: int, key_dim: int, value_dim: int) -> KernelCase:
    cut = delta_cut(key_dim, value_dim)
    num_warps = cut.pop("num_warps")
    floats = ("qkv", "x", "a_log", "dt_bias", "states", "out")
    return KernelCase(
        f"delta_rule/{heads}x{key_dim}x{value_dim}",
        delta_kernel,
        {**dict.fromkeys(floats, "*fp32"), **_PLACES},
        {
            **{"HEADS": heads, "KEY_HEADS": key_heads, "D": key_dim, "V": value_dim},
            **{"PADDED": -(-value_dim // 16) * 16, **cut},
        },
        num_warps=num_warps,
    )


def _conv_case(channels: int, taps: int) -> KernelCase:
    return KernelCase(
        f"causal_conv/{channels}x{taps}",
        conv_kernel,
        {
            **dict.fromkeys(("x", "w", "tails", "out"), "*fp32"),
            **{**_PLACES, "num_sequences": "i32"},
        },
        {
            **{"CHANNELS": channels, "TAPS": taps},
            **conv_cut(taps, channels),
        },
    )


# Qwen3-Next's and Qwen3.5's layers; heads so large that a state takes more warps.
COMPILED = [_conv_case(8192, 4), _delta_case(16, 32, 128, 128), _delta_case(4, 8, 256, 256)]
