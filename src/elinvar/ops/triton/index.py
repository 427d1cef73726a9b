"""Which keys each token attends to, where an index chooses (DeepSeek-AI, 2025): `index_select` of
ops/api.py for a GPU. Docs: docs/design/041-gpu-attention.md.

Legend: T tokens, H heads of the index, D dims of a head, B blocks, k keys chosen.

A first kernel scores keys, a second chooses among a token's scores. What a key is worth to a token is
a sum over heads inside one tile, whatever else the tile holds, so programs may share the keys in any
way. Scores are kept as whole numbers of their order. Nothing is sorted: the least score that is chosen is
searched for bit by bit, by counts, which have no order, until it tells k keys from the others; one walk
then takes what reaches it, of equal ones the first, and writes their positions as they come. Tokens that
see no more keys than they may choose are not scored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from elinvar.base.config import BLOCK_SIZE, KVDtype
from elinvar.ops.triton.attention import TYPES, decode_elements, find_tile, power, product_dtype
from elinvar.ops.triton.caches import KVLayer
from elinvar.ops.triton.cases import KernelCase, spills_elsewhere
from elinvar.ops.triton.numbers import dot, keys_of

_BLOCK = tl.constexpr(BLOCK_SIZE)
_LOWEST = tl.constexpr(-(2**31))
_SCORES = 4096
"""Of a token that a program looks at together."""
_PROGRAMS = 1024
"""Few tokens: so many programs are wanted to share their keys."""
_WORKSPACE = 256 << 20
"""Bytes for scores: of so many tokens at a time."""


def _cut(num_heads: int, dtype: torch.dtype, kind: KVDtype) -> dict[str, int]:
    """A tile of scores, by the index alone: tokens times heads, of which there are a power of two, and
    keys. Two groups of four warps with 64 rows each, for DeepSeek V3.2 a token each."""
    side = int(triton.next_power_of_2(num_heads))
    rows, keys, warps = (128, 64 if kind in ("int8", "fp8") else 128, 8)
    if dtype == torch.float32:  # no matrix instructions
        rows, keys, warps = 16, 32, 4
    tokens = max(1, rows // side)
    return {"SIDE": side, "TOKENS": tokens, "KEYS": keys, "num_warps": warps}


# Reference: ref_sparse.index_select up to `worth`. q [T, H, D], weights [T, H] -> scores [T, 32 B] i32 that
# order as what keys are worth does, NaN as -inf; of tokens that see more than k keys, and of all blocks
# that they see a key of: what they do not see has the lowest number.
# Must move, of each sequence, its keys once for each tile of tokens (256 bytes of 128 dims in bf16), and
# 4 bytes a token and key.
@triton.jit(do_not_specialize=["num_sequences", "stride_table", "k", "first"])
def score_kernel(
    q, weights, scores, starts, table, positions, keys, key_scales,
    num_sequences, stride_table, stride_block, stride_scales, stride_scores, k, first,
    KIND: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr,
    DTYPE: tl.constexpr, TOKENS: tl.constexpr, SIDE: tl.constexpr, KEYS: tl.constexpr,
    DIMS: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, token, begin, count = find_tile(tile, starts, num_sequences, TOKENS)
    if token >= count:
        return
    nth = token + tl.arange(0, TOKENS)
    position = tl.load(positions + begin + tl.minimum(nth, count - 1))
    if tl.max(position) + 1 - first <= k:
        return
    end = (tl.max(position) // _BLOCK + 1) * _BLOCK
    row, dims = tl.arange(0, TOKENS * SIDE), tl.arange(0, DIMS)
    head = row % SIDE
    place = (begin + tl.minimum(token + row // SIDE, count - 1)).to(tl.int64) * HEADS + head
    held = (head < HEADS)[:, None] & (dims < D)[None, :]
    q_tile = tl.load(q + place[:, None] * D + dims[None, :], mask=held, other=0).to(DTYPE)
    weight = tl.load(weights + place, mask=head < HEADS, other=0)
    to = scores + (begin + nth).to(tl.int64)[:, None] * stride_scores
    table += sequence.to(tl.int64) * stride_table
    step = tl.num_programs(1) * KEYS
    for start in range((first // KEYS + tl.program_id(1)) * KEYS, end, step):
        at = start + tl.arange(0, KEYS)
        block = tl.load(table + at // _BLOCK, mask=at < end, other=0).to(tl.int64)
        key = keys + block * stride_block + at % _BLOCK * PADDED
        if D == DIMS:
            k_tile = tl.load(key[:, None] + dims[None, :])
        else:
            k_tile = tl.load(key[:, None] + dims[None, :], mask=dims[None, :] < D, other=0)
        k_tile = decode_elements(k_tile, KIND, DTYPE)
        s = dot(q_tile, tl.trans(k_tile), tl.zeros([TOKENS * SIDE, KEYS], tl.float32))
        if KIND == "int8":
            s = s * tl.load(key_scales + block * stride_scales + at % _BLOCK)[None, :]
        s = tl.where(s > 0, s, 0.0) * weight[:, None]  # where NaN is 0
        worth = tl.sum(tl.reshape(s, [TOKENS, SIDE, KEYS]), 1)
        worth = keys_of(tl.where(worth == worth, worth, float("-inf")))
        seen = (at[None, :] <= position[:, None]) & (at[None, :] >= first)
        stored = (nth < count)[:, None] & (at < end)[None, :]
        tl.store(to + at[None, :], tl.where(seen, worth, _LOWEST), mask=stored)


# Reference: the rest of ref_sparse.index_select. scores [T, 32 B] -> chosen [T, k].
# Must move a token's scores once, and k positions; moves the scores some 20 times, up to 32,768 of them from
# the L1 cache, more from the L2 cache.
@triton.jit(do_not_specialize=["num_sequences", "k", "first"])
def choose_kernel(
    scores, chosen, starts, positions, num_sequences, stride_scores, k, first, SCORES: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(starts + num_sequences):
        return  # it only fills the batch up
    chosen += token * k
    last = tl.load(positions + token)
    i = tl.arange(0, SCORES)
    if last - first < k:
        for start in range(0, k, SCORES):
            at = first + start + i
            tl.store(chosen + start + i, tl.where(at <= last, at, -1), mask=start + i < k)
        return
    scores += token * stride_scores
    begin, end = first // _BLOCK * _BLOCK, (last // _BLOCK + 1) * _BLOCK  # known to be aligned
    # The greatest score that k scores reach, bit by bit; `count` reach what is known of it.
    least = tl.zeros_like(last) + _LOWEST
    bit = tl.zeros_like(last).to(tl.uint32) + 0x80000000
    count = last + 1 - first
    while (bit != 0) & (count > k):
        trial = least ^ bit.to(tl.int32, bitcast=True)
        found = _reaching(scores, begin, end, trial, SCORES)
        least = tl.where(found >= k, trial, least)
        count = tl.where(found >= k, found, count)
        bit = bit >> 1
    spare = tl.zeros_like(last) + k  # how many that are equal to it are taken
    if count > k:
        spare -= _reaching(scores, begin, end, least + 1, SCORES)
    num_kept, num_equal = tl.zeros_like(last), tl.zeros_like(last)
    for start in range(begin, end, SCORES):
        score = tl.load(scores + start + i, mask=start + i < end, other=_LOWEST)
        kept = (score >= least).to(tl.int32)
        if count > k:
            equal = (score == least).to(tl.int32)
            kept = tl.where((equal == 1) & (num_equal + tl.cumsum(equal) > spare), 0, kept)
            num_equal += tl.sum(equal)
        place = num_kept + tl.cumsum(kept) - 1
        tl.store(chosen + place, start + i, mask=kept == 1)
        num_kept += tl.sum(kept)


@triton.jit
def _reaching(scores, begin, end, least, SCORES: tl.constexpr):
    """How many scores are `least` or greater; it is above the lowest number."""
    i = tl.arange(0, SCORES)
    counts = tl.zeros([SCORES], tl.int32)
    for start in range(begin, end, SCORES):
        score = tl.load(scores + start + i, mask=start + i < end, other=_LOWEST)
        counts += (score >= least).to(tl.int32)
    return tl.sum(counts)


def index_select(
    q_THD: torch.Tensor,
    weights_TH: torch.Tensor,
    kv: KVLayer,
    query_start_loc: torch.Tensor,
    block_table_RB: torch.Tensor,
    positions_T: torch.Tensor,
    k: int,
    first: int = 0,
) -> torch.Tensor:
    """`Ops.index_select` -> i32 [T, k]. Nothing here depends on what tensors hold."""
    num_tokens, width = len(q_THD), block_table_RB.shape[1] * BLOCK_SIZE
    chosen = block_table_RB.new_empty(num_tokens, k)
    at_once = max(4, _WORKSPACE // (4 * width) // 4 * 4)  # what is cut begins at 16 bytes
    for start in range(0, num_tokens, at_once):
        stop = min(start + at_once, num_tokens)
        own, starts = slice(start, stop), query_start_loc
        if stop - start < num_tokens:  # as if they were the batch
            starts = query_start_loc.clamp(start, stop) - start
        where = starts, block_table_RB, positions_T[own]
        if width - first > k:
            scores = _score(q_THD[own], weights_TH[own], kv, *where, k, first)
        else:  # nobody sees more, and no score is read
            scores = weights_TH
        choose_kernel[stop - start,](
            scores, chosen[own], starts, positions_T[own], len(block_table_RB), width, k, first,
            SCORES=_SCORES, num_warps=16,
        )  # fmt: skip
    return chosen


def _score(
    q_THD: torch.Tensor,
    weights_TH: torch.Tensor,
    kv: KVLayer,
    query_start_loc: torch.Tensor,
    block_table_RB: torch.Tensor,
    positions_T: torch.Tensor,
    k: int,
    first: int,
) -> torch.Tensor:
    (num_tokens, num_heads, dim), (num_sequences, num_blocks) = q_THD.shape, block_table_RB.shape
    dtype, width = product_dtype(q_THD.dtype, kv.dtype), num_blocks * BLOCK_SIZE
    cut = _cut(num_heads, dtype, kv.dtype)
    tiles = num_tokens // cut["TOKENS"] + num_sequences
    share = min(-(-width // cut["KEYS"]), -(-_PROGRAMS // tiles))
    scores = block_table_RB.new_empty(num_tokens, width)
    score_kernel[tiles, share](
        q_THD, weights_TH, scores, query_start_loc, block_table_RB, positions_T, kv.k, kv.k_scales,
        num_sequences, block_table_RB.stride(0), kv.k.stride(0),
        0 if kv.k_scales is None else kv.k_scales.stride(0), width, k, first,
        KIND=kv.dtype, HEADS=num_heads, D=dim, PADDED=kv.k.stride(2), DTYPE=TYPES[dtype],
        DIMS=power(dim), **cut, num_stages=3,
    )  # fmt: skip
    return scores


def _case(kind: KVDtype, heads: int) -> KernelCase:
    """What DeepSeek V3.2 (64 heads) and GLM-5 (32) launch."""
    cache = {"bf16": "*bf16", "int8": "*i8", "fp8": "*u8"}[kind]
    signature = {
        **{"q": "*bf16", "weights": "*fp32", "scores": "*i32", "starts": "*i32", "table": "*i32"},
        **{"positions": "*i32", "keys": cache, "key_scales": "*fp32", "stride_block": "i32:16"},
        **dict.fromkeys(("num_sequences", "stride_table", "stride_scales", "k", "first"), "i32"),
        "stride_scores": "i32:16",
    }
    cut = _cut(heads, torch.bfloat16, kind)
    num_warps = cut.pop("num_warps")
    constexprs: dict[str, Any] = {
        **{"KIND": kind, "HEADS": heads, "D": 128, "PADDED": 128, "DTYPE": tl.bfloat16},
        **{"DIMS": 128, **cut},
        **({} if kind == "int8" else {"key_scales": None}),
    }
    name = f"index/score/{kind}/{heads}x128"
    return KernelCase(name, score_kernel, signature, constexprs, num_warps, 3, wants="wgmma")


COMPILED = [
    *spills_elsewhere(_case("bf16", 64), _case("bf16", 32), _case("int8", 64)),
    KernelCase(
        "index/choose",
        choose_kernel,
        {
            **dict.fromkeys(("scores", "chosen", "starts", "positions"), "*i32"),
            **dict.fromkeys(("num_sequences", "k", "first"), "i32"),
            "stride_scores": "i32:16",
        },
        {"SCORES": _SCORES},
        num_warps=16,
    ),
]
