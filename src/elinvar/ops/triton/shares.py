"""What part of its attention a token gives to each block of keys: `block_shares` of ops/api.py for a GPU.

Legend: W watched tokens, H query heads, G of them a KV head, D dims of a head, B blocks of 32 keys.

Of each row and block a first kernel notes the largest score and the sum behind it, in units of log 2
as in attention.py. A second one has a row: its largest score, the sum of all blocks, then each block's
share, which is added to what is there by an atomic maximum: that has no order. A block's numbers
depend on nothing beside it, so programs may divide the blocks in any way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from elinvar.base.config import BLOCK_SIZE
from elinvar.ops.triton.attention import (
    TYPES,
    decode_elements,
    find_tile,
    fitting,
    load_queries,
    power,
    product_dtype,
    rows_of,
    softcap_log2,
)
from elinvar.ops.triton.caches import KVLayer
from elinvar.ops.triton.cases import KernelCase
from elinvar.ops.triton.numbers import dot

_LOG2E = tl.constexpr(1.4426950408889634)
_BLOCK = tl.constexpr(BLOCK_SIZE)
_ROWS, _PART = 64, 128
"""Rows of a tile, and dims that are multiplied at once."""
_BLOCKS = 256
"""Of a row that are summed at once. Part of the order of that sum."""
_PROGRAMS = 1024
"""So many programs are wanted to divide the blocks."""


# Reference: AttentionRef.block_shares up to `s`. q [W, H, D] -> maxima, sums [W, H, B] f32.
# Must move, of each sequence, its keys once for each 64 rows, and 8 bytes a row and block.
@triton.jit(do_not_specialize=["num_sequences", "num_blocks", "stride_table"])
def block_kernel(
    q, maxima, sums, starts, table, positions, k, k_scales,
    num_sequences, num_blocks, stride_table, stride_block, stride_head, stride_scales,
    stride_scales_head, scale,
    KIND: tl.constexpr, SOFTCAP: tl.constexpr, TURNED: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """A program has GROUP of the heads; GROUPS such share a KV head."""
    tile = tl.program_id(1)
    num_heads = tl.num_programs(0) * GROUP
    kv_head = tl.program_id(0) // GROUPS
    sequence, token, begin, count = find_tile(tile, starts, num_sequences, ROWS // GROUP)
    if token >= count:
        return
    token_M, head_M, own = rows_of(begin, count, token, tl.program_id(0), ROWS, GROUP)
    place_M = token_M.to(tl.int64) * num_heads + head_M
    position = tl.load(positions + token_M)
    table += sequence.to(tl.int64) * stride_table
    k += kv_head * stride_head
    unit = scale * _LOG2E if SOFTCAP == 0.0 else scale / SOFTCAP
    slot = tl.arange(0, _BLOCK)
    for nth in range(tl.program_id(2), tl.max(position) // _BLOCK + 1, tl.num_programs(2)):
        block = tl.load(table + nth).to(tl.int64)
        s = tl.zeros([ROWS, _BLOCK], tl.float32)
        for part in range(0, D, PART):
            q_tile = load_queries(q + place_M * D, part, D, PART, ROWS, TURNED, DTYPE)
            dims = part + tl.arange(0, PART)
            key = k + block * stride_block + slot[:, None] * PADDED + dims[None, :]
            k_tile = tl.load(key, mask=dims[None, :] < D, other=0)
            s = dot(q_tile, tl.trans(decode_elements(k_tile, KIND, DTYPE)), s)
        if KIND == "int8":
            at = block * stride_scales + kv_head * stride_scales_head + slot
            s = s * tl.load(k_scales + at)[None, :]
        s = s * unit
        if SOFTCAP != 0.0:
            s = softcap_log2(s, SOFTCAP)
        keys = slot + nth * _BLOCK
        s = tl.where(keys[None, :] <= position[:, None], s, float("-inf"))
        top = tl.max(s, 1)
        least = tl.where(top == float("-inf"), 0.0, top)  # no key of the block is seen
        tl.store(maxima + place_M * num_blocks + nth, top, mask=own)
        total = tl.sum(tl.exp2(s - least[:, None]), 1)
        tl.store(sums + place_M * num_blocks + nth, total, mask=own)


# Reference: the rest of AttentionRef.block_shares. maxima, sums [W, H, B] -> shares [W, B], f32 at or above
# 0 by their bits, which order as they do. Must move 8 bytes a row and block, and moves 20.
@triton.jit(do_not_specialize=["num_blocks"])
def share_kernel(maxima, sums, positions, sinks, shares, num_blocks, BLOCKS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = (token * tl.num_programs(1) + tl.program_id(1)) * num_blocks
    maxima += row
    sums += row
    seen = tl.load(positions + token) // _BLOCK + 1
    i, one = tl.arange(0, BLOCKS), tl.arange(0, 1)
    sink = tl.full([1], float("-inf"), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + tl.program_id(1) + one) * _LOG2E
    top = sink
    for start in range(0, seen, BLOCKS):
        found = tl.load(maxima + start + i, mask=start + i < seen, other=float("-inf"))
        top = tl.maximum(top, tl.max(found))
    total = tl.zeros([1], tl.float32)
    for start in range(0, seen, BLOCKS):
        inside = start + i < seen
        m = tl.load(maxima + start + i, mask=inside, other=float("-inf"))
        total += tl.sum(tl.load(sums + start + i, mask=inside, other=0) * tl.exp2(m - top))
    total += tl.exp2(sink - top)
    for start in range(0, seen, BLOCKS):
        inside = start + i < seen
        m = tl.load(maxima + start + i, mask=inside, other=float("-inf"))
        share = tl.load(sums + start + i, mask=inside, other=0) * tl.exp2(m - top) / total
        share = tl.where(share > 0, share, 0.0)  # nor one that is no number
        at = shares + token * num_blocks + start + i
        tl.atomic_max(at, share.to(tl.int32, bitcast=True), mask=inside)


def block_shares(
    q_THD: torch.Tensor,
    kv: KVLayer,
    query_start_loc: torch.Tensor,
    block_table_RB: torch.Tensor,
    positions_T: torch.Tensor,
    scale: float,
    shares_TB: torch.Tensor,
    *,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
) -> None:
    """`Ops.block_shares`."""
    (num_tokens, num_heads, dim), num_kv = q_THD.shape, kv.k.shape[1]
    num_blocks, dtype = shares_TB.shape[1], product_dtype(q_THD.dtype, kv.dtype)
    cut = _cut(dim, dtype)
    shared = num_heads // num_kv
    group = fitting(shared, cut["ROWS"])
    tiles = num_tokens // (cut["ROWS"] // group) + len(block_table_RB)
    maxima, sums = q_THD.new_empty(2, num_tokens, num_heads, num_blocks, dtype=torch.float32)
    scales = (0, 0) if kv.k_scales is None else kv.k_scales.stride()[:2]
    programs = num_heads // group, tiles
    block_kernel[*programs, min(num_blocks, -(-_PROGRAMS // (programs[0] * tiles)))](
        q_THD, maxima, sums, query_start_loc, block_table_RB, positions_T, kv.k, kv.k_scales,
        len(block_table_RB), num_blocks, block_table_RB.stride(0), kv.k.stride(0), kv.k.stride(1),
        *scales, scale,
        KIND=kv.dtype, SOFTCAP=softcap or 0.0, TURNED=kv.turned_dims, GROUP=group,
        GROUPS=shared // group, D=dim, PADDED=kv.k.stride(2), DTYPE=TYPES[dtype], **cut,
    )  # fmt: skip
    share_kernel[num_tokens, num_heads](
        maxima, sums, positions_T, sinks_H, shares_TB.view(torch.int32), num_blocks,
        BLOCKS=_BLOCKS,
    )  # fmt: skip


def _cut(dim: int, dtype: torch.dtype) -> dict[str, int]:
    rows, part = (16, 64) if dtype == torch.float32 else (_ROWS, _PART)
    return {"ROWS": rows, "PART": min(part, power(dim)), "num_warps": 4, "num_stages": 2}


def _case(kind: str, heads: int, kv_heads: int, dim: int) -> KernelCase:
    cache = {"bf16": "*bf16", "int8": "*i8"}[kind]
    signature = {
        **{"q": "*bf16", "maxima": "*fp32", "sums": "*fp32", "starts": "*i32", "table": "*i32"},
        **{"positions": "*i32", "k": cache, "k_scales": "*fp32", "scale": "fp32"},
        **{"stride_block": "i32:16", "stride_head": "i32:16", "stride_scales": "i32"},
        **dict.fromkeys(("num_sequences", "num_blocks", "stride_table"), "i32"),
        **{"stride_scales_head": "i32"},
    }
    cut, scaled = _cut(dim, torch.bfloat16), kind == "int8"
    launch: dict[str, Any] = {name: cut.pop(name) for name in ("num_warps", "num_stages")}
    group = min(cut["ROWS"], heads // kv_heads)
    constexprs = {
        **{"KIND": kind, "SOFTCAP": 0.0, "TURNED": dim // 16 if scaled else 1, "GROUP": group},
        **{"GROUPS": heads // kv_heads // group, "D": dim, "PADDED": dim, "DTYPE": tl.bfloat16},
        **({} if scaled else {"k_scales": None}),
        **cut,
    }
    name = f"shares/block/{kind}/{heads}x{kv_heads}x{dim}"
    return KernelCase(name, block_kernel, signature, constexprs, wants="wgmma", **launch)


COMPILED = [
    _case("bf16", 32, 8, 128),
    _case("int8", 32, 8, 128),
    _case("bf16", 16, 1, 576),
    KernelCase(
        "shares/share",
        share_kernel,
        {
            **dict.fromkeys(("maxima", "sums", "sinks"), "*fp32"),
            **dict.fromkeys(("positions", "shares"), "*i32"),
            "num_blocks": "i32",
        },
        {"BLOCKS": _BLOCKS},
    ),
]
