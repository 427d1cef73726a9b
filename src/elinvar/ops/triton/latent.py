"""Latent attention (DeepSeek-AI, 2024) on a GPU: one key a token for all heads, the first R dims of
which are its value too. Keys are read once for both.

Legend: T tokens, H heads, R dims of a latent, P dims that are rotated and follow it. The walk over
keys and its arithmetic: attention.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from elinvar.base.config import BLOCK_SIZE
from elinvar.ops.api import ATTENTION_SPLIT
from elinvar.ops.triton import attention
from elinvar.ops.triton.attention import (
    decode_elements,
    find_tile,
    finish,
    fold,
    merge,
    rows_of,
)
from elinvar.ops.triton.caches import KVLayer
from elinvar.ops.triton.cases import KernelCase, spills_elsewhere
from elinvar.ops.triton.numbers import dot, saturate_int8, to_cache, to_int8

_LOG2E = tl.constexpr(1.4426950408889634)
_SPLIT = tl.constexpr(ATTENTION_SPLIT)
_BLOCK = tl.constexpr(BLOCK_SIZE)
_ROWS, _KEYS, _WARPS, _STAGES = 16, 32, 4, 2
"""A tile: the heads of V2-Lite, or of a rank of V3, are 16; with more rows 512 dims of values for each
would not fit the registers."""


@triton.jit
def rotated(row, rope, at, HALF: tl.constexpr, SIDE: tl.constexpr):
    """The two halves of the HALF * 2 dims at `row`, rotated by the table's row `at`; f32."""
    i = tl.arange(0, SIDE)
    held = i < HALF
    a = tl.load(row + i, mask=held, other=0).to(tl.float32)
    b = tl.load(row + HALF + i, mask=held, other=0).to(tl.float32)
    cos = tl.load(rope + at * (2 * HALF) + i, mask=held, other=0)
    sin = tl.load(rope + at * (2 * HALF) + HALF + i, mask=held, other=0)
    return tl.fma(a, cos, -(b * sin)), tl.fma(b, cos, a * sin)


# Reference: AttentionRef.latent_query. latent [T, H, R], q [T, H, K + P] -> out [T, H, R + P].
# Must move (2 R + 2 P) elements a head.
@triton.jit
def query_kernel(
    latent, q, positions, rope, out, num_heads,
    K: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr, DIMS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    at = tl.load(positions + place // num_heads).to(tl.int64)
    dims = tl.arange(0, DIMS)
    out += place * (RANK + 2 * HALF)
    x = tl.load(latent + place * RANK + dims, mask=dims < RANK, other=0)
    tl.store(out + dims, x.to(out.dtype.element_ty), mask=dims < RANK)
    a, b = rotated(q + place * (K + 2 * HALF) + K, rope, at, HALF, SIDE)
    i = tl.arange(0, SIDE)
    tl.store(out + RANK + i, a.to(out.dtype.element_ty), mask=i < HALF)
    tl.store(out + RANK + HALF + i, b.to(out.dtype.element_ty), mask=i < HALF)


# Reference: AttentionRef.latent_write. x [T, N], of which the first R + P columns are read -> a slot of k.
# Must move R + P elements of x and of the cache a token.
@triton.jit
def write_kernel(
    x, positions, rope, k, k_scales, slots, gain, eps, stride_x, stride_block, stride_scales,
    KIND: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
    DIMS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    x += token.to(tl.int64) * stride_x
    slot = tl.load(slots + token)
    block = (slot // _BLOCK).to(tl.int64)
    dims, i = tl.arange(0, DIMS), tl.arange(0, SIDE)
    latent = tl.load(x + dims, mask=dims < RANK, other=0).to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(latent * latent) / RANK + eps)
    latent = latent * inverse * tl.load(gain + dims, mask=dims < RANK, other=0)
    a, b = rotated(x + RANK, rope, tl.load(positions + token).to(tl.int64), HALF, SIDE)
    k += block * stride_block + slot % _BLOCK * PADDED
    if KIND == "int8":
        latent, a, b = saturate_int8(latent, 1), saturate_int8(a, 1), saturate_int8(b, 1)
        largest = tl.maximum(tl.max(tl.abs(a)), tl.max(tl.abs(b)))
        largest = tl.maximum(largest, tl.max(tl.abs(latent)))
        latent, scale = to_int8(latent, largest)
        a, scale = to_int8(a, largest)
        b, scale = to_int8(b, largest)
        tl.store(k_scales + block * stride_scales + slot % _BLOCK, scale)
    else:
        latent, a, b = to_cache(latent, KIND), to_cache(a, KIND), to_cache(b, KIND)
    tl.store(k + dims, latent, mask=dims < RANK)
    tl.store(k + RANK + i, a, mask=i < HALF)
    tl.store(k + RANK + HALF + i, b, mask=i < HALF)


@triton.jit
def _walk(
    m, t, a, q, q_rope, position, last, first, first_key, stop, table, k, k_scales,
    stride_block, stride_scales, unit,
    KIND: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr, SIDE: tl.constexpr,
    OF_SLOTS: tl.constexpr,
):  # fmt: skip
    """The state after keys first_key .. stop in tiles."""
    dims, turned = tl.arange(0, DIMS), tl.arange(0, SIDE)
    for start in range(first_key, stop, KEYS):
        keys = start + tl.arange(0, KEYS)
        if OF_SLOTS:
            slot = tl.load(table + keys, mask=keys <= last, other=0)
            block, slot = (slot // _BLOCK).to(tl.int64), slot % _BLOCK
        else:
            block = tl.load(table + keys // _BLOCK, mask=keys <= last, other=0).to(tl.int64)
            slot = keys % _BLOCK
        at = k + block * stride_block + slot * PADDED
        if RANK == DIMS:
            latent = tl.load(at[:, None] + dims[None, :])
        else:
            latent = tl.load(at[:, None] + dims[None, :], mask=dims[None, :] < RANK, other=0)
        if ROPE == SIDE:
            rope = tl.load(at[:, None] + RANK + turned[None, :])
        else:
            rope = tl.load(
                at[:, None] + RANK + turned[None, :], mask=turned[None, :] < ROPE, other=0
            )
        latent = decode_elements(latent, KIND, q.dtype)
        rope = decode_elements(rope, KIND, q.dtype)
        s = dot(q, tl.trans(latent), tl.zeros([ROWS, KEYS], tl.float32))
        s = dot(q_rope, tl.trans(rope), s)
        if KIND == "int8":
            scale = tl.load(k_scales + block * stride_scales + slot)
            s = s * (scale * unit)[None, :]
        seen = (keys[None, :] <= position[:, None]) & (keys[None, :] >= first)
        s = tl.where(seen, s, float("-inf"))
        m, t, a, p = fold(m, t, a, s, unit, KIND != "int8")
        if KIND == "int8":
            p = p * scale[None, :]
        a = dot(p.to(q.dtype), latent, a)
    return m, t, a


# Reference: AttentionRef.attention over latents. q [T, H, R + P] -> out [T, H, R]; maxima, sums
# [S, T, H] and weighted [S, T, H, R] of splits (PARTIAL), as in attention.py.
# Must move, of each sequence, its keys once for each 16 rows: 1,152 bytes a key of 512 + 64 dims in bf16.
@triton.jit(do_not_specialize=["num_sequences", "num_tokens", "stride_table", "first"])
def latent_kernel(
    q, out, starts, table, positions, k, k_scales, maxima, sums, weighted,
    num_sequences, num_tokens, stride_table, stride_block, stride_scales, scale, first,
    KIND: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    PADDED: tl.constexpr, DTYPE: tl.constexpr, PARTIAL: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, DIMS: tl.constexpr, SIDE: tl.constexpr, OF_SLOTS: tl.constexpr,
):  # fmt: skip
    """A program has GROUP of the heads; all see the same keys. OF_SLOTS: the table has slots, one a key,
    instead of blocks."""
    TOKENS: tl.constexpr = ROWS // GROUP
    num_heads = tl.num_programs(0) * GROUP
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence, token, begin, count = find_tile(tile, starts, num_sequences, TOKENS)
    if token >= count:
        return
    token_M, head_M, own = rows_of(begin, count, token, tl.program_id(0), ROWS, GROUP)
    place_M = token_M.to(tl.int64) * num_heads + head_M
    position = tl.load(positions + token_M)
    dims, turned = tl.arange(0, DIMS), tl.arange(0, SIDE)
    row = q + place_M * (RANK + ROPE)
    q_latent = tl.load(row[:, None] + dims[None, :], mask=dims[None, :] < RANK, other=0).to(DTYPE)
    q_rope = tl.load(row[:, None] + RANK + turned[None, :], mask=turned[None, :] < ROPE, other=0)
    q_rope = q_rope.to(DTYPE)
    table += sequence.to(tl.int64) * stride_table
    last = tl.max(position)
    m_all = tl.full([ROWS], float("-inf"), tl.float32)
    l_all = tl.zeros([ROWS], tl.float32)
    a_all = tl.zeros([ROWS, DIMS], tl.float32)
    for split in range(first // _SPLIT + tl.program_id(2), last // _SPLIT + 1, tl.num_programs(2)):
        m = tl.full([ROWS], float("-inf"), tl.float32)
        t = tl.zeros([ROWS], tl.float32)
        a = tl.zeros([ROWS, DIMS], tl.float32)
        m, t, a = _walk(
            m, t, a, q_latent, q_rope, position, last, first,
            tl.maximum(split * _SPLIT, first // KEYS * KEYS),
            tl.minimum(split * _SPLIT + _SPLIT, last + 1),
            table, k, k_scales, stride_block, stride_scales, scale * _LOG2E,
            KIND, RANK, ROPE, PADDED, ROWS, KEYS, DIMS, SIDE, OF_SLOTS,
        )  # fmt: skip
        if PARTIAL:
            at = place_M + split * (num_tokens * num_heads)
            tl.store(maxima + at, m, mask=own)
            tl.store(sums + at, t, mask=own)
            stored = own[:, None] & (dims[None, :] < RANK)
            tl.store(weighted + at[:, None] * RANK + dims[None, :], a, mask=stored)
        else:
            m_all, l_all, a_all = merge(m_all, l_all, a_all, m, t, a)
    if not PARTIAL:
        stored = own[:, None] & (dims[None, :] < RANK)
        o = finish(m_all, l_all, a_all, tl.full([ROWS], float("-inf"), tl.float32))
        to = out + place_M[:, None] * RANK + dims[None, :]
        tl.store(to, o.to(out.dtype.element_ty), mask=stored)


def latent_query(
    q_TN: torch.Tensor,
    latent_THR: torch.Tensor,
    positions_T: torch.Tensor,
    rope_PD: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """What follows `head_linear` in `Ops.latent_query`: its products [T, H R], then the other dims of
    each head of q, rotated -> [T, H, R + rope]."""
    tokens, rope = len(q_TN), rope_PD.shape[1]
    rank, dim = latent_THR.numel() // max(1, tokens * num_heads), q_TN.shape[1] // num_heads - rope
    out = latent_THR.new_empty(tokens, num_heads, rank + rope)
    query_kernel[tokens * num_heads,](
        latent_THR, q_TN, positions_T, rope_PD, out, num_heads,
        K=dim, RANK=rank, HALF=rope // 2, DIMS=attention.power(rank),
        SIDE=attention.power(rope // 2),
    )  # fmt: skip
    return out


def latent_write(
    x_TN: torch.Tensor,
    positions_T: torch.Tensor,
    rope_PD: torch.Tensor,
    kv: KVLayer,
    slots_T: torch.Tensor,
    gain_R: torch.Tensor,
    eps: float,
) -> None:
    """`Ops.latent_write`."""
    rank, half = gain_R.numel(), rope_PD.shape[1] // 2
    write_kernel[len(x_TN),](
        x_TN, positions_T, rope_PD, kv.k, kv.k_scales, slots_T, gain_R, eps, x_TN.stride(0),
        kv.k.stride(0), 0 if kv.k_scales is None else kv.k_scales.stride(0),
        KIND=kv.dtype, RANK=rank, HALF=half, PADDED=kv.k.stride(2), DIMS=attention.power(rank),
        SIDE=attention.power(half),
    )  # fmt: skip


def latent_attention(
    q_THD: torch.Tensor,
    kv: KVLayer,
    query_start_loc: torch.Tensor,
    block_table_RB: torch.Tensor,
    positions_T: torch.Tensor,
    scale: float,
    first: int = 0,
    *,
    of_slots: bool = False,
) -> torch.Tensor:
    """`attention.attention` where kv holds latents -> [T, H, R]. of_slots: block_table_RB says of each key
    in which slot of the cache it lies."""
    num_tokens, num_heads, dim = q_THD.shape
    num_sequences, num_keys = block_table_RB.shape
    num_keys *= 1 if of_slots else BLOCK_SIZE
    group = attention.fitting(num_heads, _ROWS)
    tiles = num_tokens // (_ROWS // group) + num_sequences
    splits = -(-num_keys // ATTENTION_SPLIT)
    out = q_THD.new_empty(num_tokens, num_heads, kv.value_dim)
    workspace = attention.workspace(out, splits)
    maxima, sums, weighted = workspace or (None, None, None)
    rope = dim - kv.value_dim
    latent_kernel[
        num_heads // group, tiles, attention.shared(workspace, splits, tiles * num_heads // group)
    ](
        q_THD, out, query_start_loc, block_table_RB, positions_T, kv.k, kv.k_scales,
        maxima, sums, weighted, num_sequences, num_tokens, block_table_RB.stride(0),
        kv.k.stride(0), 0 if kv.k_scales is None else kv.k_scales.stride(0), scale, first,
        KIND=kv.dtype, GROUP=group, RANK=kv.value_dim, ROPE=rope, PADDED=kv.k.stride(2),
        DTYPE=attention.TYPES[attention.product_dtype(q_THD.dtype, kv.dtype)],
        PARTIAL=workspace is not None, ROWS=_ROWS, KEYS=_KEYS,
        DIMS=attention.power(kv.value_dim), SIDE=attention.power(rope), OF_SLOTS=of_slots,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    if workspace is not None:
        attention.merge_splits(workspace, out, query_start_loc, positions_T, None, first=first)
    return out


def _case(kind: str, partial: bool, of_slots: bool = False) -> KernelCase:
    """What DeepSeek-V2-Lite launches, and V3.2, which has more programs."""
    cache = {"bf16": "*bf16", "int8": "*i8"}[kind]
    states: dict[str, Any] = {} if partial else dict.fromkeys(("maxima", "sums", "weighted"))
    signature = {
        **{"q": "*bf16", "out": "*bf16", "starts": "*i32", "table": "*i32", "positions": "*i32"},
        **{"k": cache, "k_scales": "*fp32", "scale": "fp32", "stride_block": "i32:16"},
        **dict.fromkeys(("maxima", "sums", "weighted"), "*fp32"),
        **dict.fromkeys(("num_sequences", "num_tokens", "stride_table"), "i32"),
        **dict.fromkeys(("stride_scales", "first"), "i32"),
    }
    sides = {"ROWS": _ROWS, "KEYS": _KEYS, "DIMS": 512, "SIDE": 64}
    constexprs = {
        **{"KIND": kind, "GROUP": 16, "RANK": 512, "ROPE": 64, "PADDED": 576, "DTYPE": tl.bfloat16},
        **{"PARTIAL": partial, "OF_SLOTS": of_slots, **sides, **states},
        **({} if kind == "int8" else {"k_scales": None}),
    }
    name = f"latent/{kind}/16x512+64{'/splits' * partial}{'/slots' * of_slots}"
    launch: dict[str, Any] = {"num_warps": _WARPS, "num_stages": _STAGES}
    return KernelCase(name, latent_kernel, signature, constexprs, wants="mma", **launch)


COMPILED = [
    *spills_elsewhere(
        _case("bf16", True),
        _case("bf16", False),
        _case("bf16", True, of_slots=True),
    ),
    replace(_case("bf16", False, of_slots=True), max_spills=64),
    replace(_case("int8", True), max_spills=1024),
    KernelCase(
        "latent/query",
        query_kernel,
        {
            **{"latent": "*bf16", "q": "*bf16", "positions": "*i32", "rope": "*fp32"},
            **{"out": "*bf16", "num_heads": "i32"},
        },
        {"K": 128, "RANK": 512, "HALF": 32, "DIMS": 512, "SIDE": 32},
    ),
    KernelCase(
        "latent/write",
        write_kernel,
        {
            **{"x": "*bf16", "positions": "*i32", "rope": "*fp32", "k": "*bf16", "slots": "*i32"},
            **{"gain": "*fp32", "eps": "fp32", "stride_x": "i32", "stride_block": "i32:16"},
            **{"stride_scales": "i32"},
        },
        {
            **{"KIND": "bf16", "RANK": 512, "HALF": 32, "PADDED": 576, "DIMS": 512, "SIDE": 32},
            **{"k_scales": None},
        },
    ),
]
