"""Attention over the paged cache: prefill, decode and drafts are one kernel (ops/api.py `attention`).

Legend: T tokens, H query heads, G of them a KV head, D dims of a head, S splits of 1,024 keys.
Docs: docs/design/041-gpu-attention.md.

A program has a tile of rows, tokens of one sequence times the G heads that share a KV head, and walks
keys in tiles whose borders are absolute positions. Rows of a tile do not touch each other, and a tile
of keys of which a row sees nothing leaves the row's bits as they were: p = 0, and what was is
multiplied by 1. So a row's bits do not depend on who shares its tile, nor on which keys are skipped.

Every SPLIT keys the softmax begins anew, and its state (m, t, a), the largest score, the sum of weights
and the values weighted by them, is merged into the row's in
ascending order. Where there are few rows, programs share the splits of a row, and the same merge is
done by a second kernel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from elinvar.base.config import BLOCK_SIZE, KVDtype
from elinvar.ops.api import ATTENTION_SPLIT
from elinvar.ops.triton.caches import KVLayer
from elinvar.ops.triton.cases import KernelCase, spills_elsewhere
from elinvar.ops.triton.configs import Tile
from elinvar.ops.triton.numbers import dot, from_e4m3

_LOG2E = tl.constexpr(1.4426950408889634)
_SPLIT = tl.constexpr(ATTENTION_SPLIT)
_BLOCK = tl.constexpr(BLOCK_SIZE)
_VALUES = 128
"""Dims of a value that one program weighs: more would not fit its registers."""
_NO_LIMIT = 1 << 30
"""A window, or chunk, that holds every position."""
_OFTEN_NEW = ["num_sequences", "num_tokens", "stride_table", "window", "chunk", "first"]
"""Arguments for whose values nothing is compiled anew."""
_PROGRAMS = 2048
"""Few rows: so many programs are wanted, to keep every multiprocessor of a large chip reading."""
_AMD_STAGES = 1
"""More tiles of keys at once do not fit the 64 KiB that a block has there."""
_WORKSPACE = 256 << 20
"""Bytes for states of splits; rows that would need more have all their splits walked by one program."""


def tile_of(dims: int, dtype: torch.dtype, kind: KVDtype) -> Tile:
    """What any chip can run, until the tuner has said better: of one height, as what is equal has to be
    seen first (Tile.tall)."""
    if dtype == torch.float32:  # no matrix instructions
        return Tile(16, 16, 32, 1)
    stages = 3 if torch.version.hip is None else _AMD_STAGES
    if dims > 128:
        return Tile(128, 128, 64, stages)
    return Tile(64, 64, 32 if kind in ("int8", "fp8") else 64, stages)


@triton.jit
def merge(m, t, a, m2, t2, a2):
    """The state of a row's keys (max, sum, weighted values) and that of those that follow, as one.
    A state without keys (-inf, 0, 0) changes nothing."""
    n = tl.maximum(m, m2)
    safe = tl.where(n == float("-inf"), 0.0, n)
    c, c2 = tl.exp2(m - safe), tl.exp2(m2 - safe)
    return n, tl.fma(t, c, t2 * c2), tl.fma(a, c[:, None], a2 * c2[:, None])


@triton.jit
def finish(m, t, a, sink):
    """Values of a row: a / t, with the head's sink joined last (-inf: none)."""
    n = tl.maximum(m, sink)
    c = tl.exp2(m - n)
    return (a * c[:, None]) / tl.fma(t, c, tl.exp2(sink - n))[:, None]


@triton.jit
def fold(m, t, a, s, unit, RAW: tl.constexpr):
    """The state with scores s [M, N] in: max and sum are new, `a` is rescaled, and the weights are
    for the caller to multiply with values. RAW: scores are yet to be multiplied by `unit`."""
    top = tl.max(s, 1)
    n = tl.maximum(m, top * unit if RAW else top)
    safe = tl.where(n == float("-inf"), 0.0, n)
    p = tl.exp2(tl.fma(s, unit, -safe[:, None])) if RAW else tl.exp2(s - safe[:, None])
    c = tl.exp2(m - safe)
    return n, tl.fma(t, c, tl.sum(p, 1)), a * c[:, None], p


@triton.jit
def find_tile(tile, starts, num_sequences, TOKENS: tl.constexpr):
    """The sequence of a tile of TOKENS tokens, which of its tokens the tile begins with, where they
    begin in the batch, and how many they are. Sequence r begins with tile starts[r] // TOKENS + r: so no
    table is needed, and some tiles are empty: they begin behind the last token."""
    low = tl.zeros_like(tile)
    high = low + num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts + middle) // TOKENS + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    begin = tl.load(starts + low)
    token = (tile - begin // TOKENS - low) * TOKENS
    return low, token, begin, tl.load(starts + low + 1) - begin


@triton.jit
def rows_of(begin, count, token, group, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Token and head of each row of the tile that begins with `token` of the sequence, and whether
    they are its own: rows that are left over do what the last token does, and nothing of it is
    stored."""
    row = tl.arange(0, ROWS)
    nth = tl.minimum(token + tl.minimum(row // GROUP, ROWS // GROUP - 1), count - 1)
    own = (row // GROUP < ROWS // GROUP) & (token + row // GROUP < count)
    return begin + nth, group * GROUP + row % GROUP, own


@triton.jit
def first_seen(position, window, chunk, first):
    """The first key that a query at `position` sees. (Branches here would end the pipelining of all
    loops of the kernel.)"""
    least = tl.maximum(position - window + 1, position // chunk * chunk)
    return tl.maximum(least, first)


@triton.jit
def softcap_log2(x, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(x) in units of log 2."""
    return (SOFTCAP * _LOG2E) * (1.0 - 2.0 / (tl.exp2(x * (2 * _LOG2E)) + 1.0))


@triton.jit
def load_queries(
    rows,
    first,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    TURNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Dims first .. first + DIMS - 1 of the queries at pointers `rows`; TURNED > 1: times Hadamard's
    matrix over so many dims 16 apart, as keys of int8 are kept."""
    dims = first + tl.arange(0, DIMS)
    if TURNED == 1:
        return tl.load(rows[:, None] + dims[None, :], mask=dims[None, :] < D, other=0).to(DTYPE)
    own = dims // 16 % TURNED
    q = _zeros(ROWS, DIMS)
    for other in range(TURNED):
        partner = dims + (other - own) * 16
        x = tl.load(rows[:, None] + partner[None, :], mask=dims[None, :] < D, other=0)
        odd = (0x6996 >> (own & other)) & 1  # bits in common
        q += tl.where(odd[None, :] == 1, -1.0, 1.0) * x.to(tl.float32)
    return q.to(DTYPE)


@triton.jit
def decode_elements(x, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """What the cache holds, without scales, in the dtype of products."""
    if KIND == "fp8":
        x = from_e4m3(x)
    elif KIND == "int8":
        x = x.to(tl.float32)  # the interpreter makes no bf16 of integers
    return x.to(DTYPE)


@triton.jit
def _walk(
    m, t, a, q, position, least, last, first_key, stop,
    table, k, v, k_scales, v_scales, stride_block, stride_scales, first_value, unit,
    KIND: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, VALUES: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
    PART: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The state after keys first_key .. stop in tiles. MASKED: not every row sees all of them."""
    RAW: tl.constexpr = KIND != "int8" and SOFTCAP == 0.0
    dims = tl.arange(0, DIMS)
    values = first_value + tl.arange(0, PART)
    for start in range(first_key, stop, KEYS):
        keys = start + tl.arange(0, KEYS)
        held = keys <= last  # the table may end where the sequence does
        block = (
            tl.load(table + keys // _BLOCK, mask=held, other=0)
            if MASKED
            else tl.load(table + keys // _BLOCK)
        )
        slot = keys % _BLOCK
        at = block.to(tl.int64) * stride_block + slot * PADDED
        if D == DIMS:
            k_tile = tl.load(k + at[:, None] + dims[None, :])
        else:
            k_tile = tl.load(k + at[:, None] + dims[None, :], mask=dims[None, :] < D, other=0)
        s = dot(q, tl.trans(decode_elements(k_tile, KIND, q.dtype)), _zeros(ROWS, KEYS))
        if KIND == "int8":
            scale_at = block.to(tl.int64) * stride_scales + slot
            s = s * (tl.load(k_scales + scale_at) * unit)[None, :]
            if SOFTCAP != 0.0:
                s = softcap_log2(s, SOFTCAP)
        elif SOFTCAP != 0.0:
            s = softcap_log2(s * unit, SOFTCAP)
        if MASKED:
            seen = (keys[None, :] <= position[:, None]) & (keys[None, :] >= least[:, None])
            s = tl.where(seen, s, float("-inf"))
        m, t, a, p = fold(m, t, a, s, unit, RAW)
        if KIND == "int8":
            p = p * tl.load(v_scales + scale_at)[None, :]
        if VALUES % PART == 0:
            v_tile = tl.load(v + at[:, None] + values[None, :])
        else:
            v_tile = tl.load(
                v + at[:, None] + values[None, :], mask=values[None, :] < VALUES, other=0
            )
        a = dot(p.to(q.dtype), decode_elements(v_tile, KIND, q.dtype), a)
    return m, t, a


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


# Reference: AttentionRef.attention (ref_attention.py).
# q, out [T, H, D]; k, v the layer's cache; states [S, T, H], sums [S, T, H, D] of splits (PARTIAL).
# Must move, of each sequence: its keys and values once for each tile of rows, of all rows q and out:
# decode of 32/8 heads of 128 dims in bf16 reads 4,096 bytes a key of a sequence.
@triton.jit(do_not_specialize=_OFTEN_NEW)
def attention_kernel(
    q, out, starts, table, positions, sinks, k, v, k_scales, v_scales, maxima, sums, weighted,
    num_sequences, num_tokens, stride_table, stride_block, stride_head, stride_scales,
    stride_scales_head, scale, window, chunk, first,
    KIND: tl.constexpr, SOFTCAP: tl.constexpr, TURNED: tl.constexpr,
    GROUP: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, VALUES: tl.constexpr,
    PADDED: tl.constexpr, DTYPE: tl.constexpr, LIMITED: tl.constexpr, PARTIAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """A program has GROUP of the heads, all those of a KV head, or one SHARE'th where a tile is too low
    for so many."""
    TOKENS: tl.constexpr = ROWS // GROUP
    PARTS: tl.constexpr = (VALUES + PART - 1) // PART
    group = tl.program_id(0) // PARTS
    kv_head = group // SHARE
    first_value = tl.program_id(0) % PARTS * PART
    num_heads = tl.num_programs(0) // PARTS * GROUP
    # The last tile first: of a prompt it has the most keys.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence, token, begin, count = find_tile(tile, starts, num_sequences, TOKENS)
    if token >= count:
        return
    token_M, head_M, _ = rows_of(begin, count, token, group, ROWS, GROUP)
    place_M = token_M.to(tl.int64) * num_heads + head_M
    position = tl.load(positions + token_M)
    least = tl.zeros_like(position)
    if LIMITED:
        least = first_seen(position, window, chunk, first)

    q_tile = load_queries(q + place_M * D, 0, D, DIMS, ROWS, TURNED, DTYPE)
    unit = scale * _LOG2E if SOFTCAP == 0.0 else scale / SOFTCAP
    table += sequence.to(tl.int64) * stride_table
    k += kv_head * stride_head
    v += kv_head * stride_head
    if KIND == "int8":
        k_scales += kv_head * stride_scales_head
        v_scales += kv_head * stride_scales_head

    last = tl.max(position)
    # Tiles that all rows see whole need no mask.
    whole_from = (tl.max(least) + KEYS - 1) // KEYS * KEYS
    whole_to = (tl.min(position) + 1) // KEYS * KEYS
    begin_key = tl.min(least) // KEYS * KEYS
    value = first_value + tl.arange(0, PART)
    m_all = tl.full([ROWS], float("-inf"), tl.float32)
    l_all = tl.zeros([ROWS], tl.float32)
    a_all = _zeros(ROWS, PART)
    for split in range(
        begin_key // _SPLIT + tl.program_id(2), last // _SPLIT + 1, tl.num_programs(2)
    ):
        m = tl.full([ROWS], float("-inf"), tl.float32)
        t = tl.zeros([ROWS], tl.float32)
        a = _zeros(ROWS, PART)
        low = tl.maximum(split * _SPLIT, begin_key)
        high = tl.minimum(split * _SPLIT + _SPLIT, last + 1)
        whole_low = tl.minimum(tl.maximum(low, whole_from), high)
        whole_high = tl.maximum(tl.minimum(high, whole_to), whole_low)
        if LIMITED:
            m, t, a = _walk(
                m, t, a, q_tile, position, least, last, low, whole_low,
                table, k, v, k_scales, v_scales, stride_block, stride_scales, first_value, unit,
                KIND, SOFTCAP, D, VALUES, PADDED, ROWS, KEYS, DIMS, PART, True,
            )  # fmt: skip
        m, t, a = _walk(
            m, t, a, q_tile, position, least, last, whole_low, whole_high,
            table, k, v, k_scales, v_scales, stride_block, stride_scales, first_value, unit,
            KIND, SOFTCAP, D, VALUES, PADDED, ROWS, KEYS, DIMS, PART, False,
        )  # fmt: skip
        m, t, a = _walk(
            m, t, a, q_tile, position, least, last, whole_high, high,
            table, k, v, k_scales, v_scales, stride_block, stride_scales, first_value, unit,
            KIND, SOFTCAP, D, VALUES, PADDED, ROWS, KEYS, DIMS, PART, True,
        )  # fmt: skip
        if PARTIAL:
            token_M, head_M, own = rows_of(begin, count, token, group, ROWS, GROUP)
            at = token_M.to(tl.int64) * num_heads + head_M + split * (num_tokens * num_heads)
            if first_value == 0:
                tl.store(maxima + at, m, mask=own)
                tl.store(sums + at, t, mask=own)
            stored = own[:, None] & (value[None, :] < VALUES)
            tl.store(weighted + at[:, None] * VALUES + value[None, :], a, mask=stored)
        else:
            m_all, l_all, a_all = merge(m_all, l_all, a_all, m, t, a)
    if not PARTIAL:
        # Read anew, or registers would hold the places of rows all the time.
        begin = tl.load(starts + sequence, volatile=True)
        token_M, head_M, own = rows_of(begin, count, token, group, ROWS, GROUP)
        place_M = token_M.to(tl.int64) * num_heads + head_M
        sink = tl.full([ROWS], float("-inf"), tl.float32)
        if sinks is not None:
            sink = tl.load(sinks + head_M) * _LOG2E
        o = finish(m_all, l_all, a_all, sink).to(out.dtype.element_ty)
        stored = own[:, None] & (value[None, :] < VALUES)
        tl.store(out + place_M[:, None] * VALUES + value[None, :], o, mask=stored)


# Reference: the merge of attention_kernel with PARTIAL off: the same bits.
# maxima, sums [S, T, H], weighted [S, T, H, V] f32 -> out [T, H, V].
# Must move 4 (V + 2) bytes a row and split that it sees, and out.
@triton.jit(do_not_specialize=["num_sequences", "num_rows", "window", "chunk", "first"])
def merge_kernel(
    maxima, sums, weighted, out, starts, positions, sinks,
    num_sequences, num_rows, num_heads, window, chunk, first,
    VALUES: tl.constexpr, LIMITED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, head = row // num_heads, row % num_heads
    if token >= tl.load(starts + num_sequences):
        return  # a row that only fills the batch up
    position = tl.load(positions + token)
    least = tl.zeros_like(position)
    if LIMITED:
        least = first_seen(position, window, chunk, first)
    one = tl.arange(0, 1)
    value = tl.program_id(1) * PART + tl.arange(0, PART)
    stored = value[None, :] < VALUES
    m = tl.full([1], float("-inf"), tl.float32)
    t = tl.zeros([1], tl.float32)
    a = _zeros(1, PART)
    for split in range(least // _SPLIT, position // _SPLIT + 1):
        at = row + split * num_rows
        a2 = tl.load(weighted + at * VALUES + value[None, :], mask=stored, other=0)
        m2, t2 = tl.load(maxima + at + one), tl.load(sums + at + one)
        m, t, a = merge(m, t, a, m2, t2, a2)
    sink = tl.full([1], float("-inf"), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head + one) * _LOG2E
    o = finish(m, t, a, sink).to(out.dtype.element_ty)
    tl.store(out + row * VALUES + value[None, :], o, mask=stored)


def attention(
    q_THD: torch.Tensor,
    kv: KVLayer,
    query_start_loc: torch.Tensor,
    block_table_RB: torch.Tensor,
    positions_T: torch.Tensor,
    scale: float,
    window: int | None = None,
    *,
    softcap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    chunk: int | None = None,
    first: int = 0,
    tile: Tile | None = None,
    most: int | None = None,
) -> torch.Tensor:
    """`Ops.attention` of q [T, H, D] -> [T, H, value dim], in q's dtype. Indices are i32. tile: what the
    tuner chose for all calls with such heads; most: bytes that states of splits may take.

    Rows after the last that query_start_loc tells of, and sequences without rows, only fill the batch
    up: what is returned for them means nothing. Nothing here depends on what tensors hold.
    """
    num_tokens, num_heads, dim = q_THD.shape
    num_sequences, num_blocks = block_table_RB.shape
    num_kv = kv.k.shape[1]
    dtype = product_dtype(q_THD.dtype, kv.dtype)
    tile = tile or tile_of(dim, dtype, kv.dtype)
    part = min(_VALUES, power(kv.value_dim))
    parts = -(-kv.value_dim // part)
    splits = -(-num_blocks * BLOCK_SIZE // ATTENTION_SPLIT)
    out = q_THD.new_empty(num_tokens, num_heads, kv.value_dim)
    states = workspace(out, splits, most)
    cut = tile.height(states is not None)
    group = fitting(num_heads // num_kv, cut["ROWS"])
    programs = num_heads // group * parts
    tiles = num_tokens // (cut["ROWS"] // group) + num_sequences
    limits = window or _NO_LIMIT, chunk or _NO_LIMIT, first
    limited = limits != (_NO_LIMIT, _NO_LIMIT, 0)
    maxima, sums, weighted = states or (None, None, None)
    scales = kv.k_scales if kv.k_scales is None else kv.k_scales.stride()
    attention_kernel[programs, tiles, shared(states, splits, tiles * programs // parts)](
        q_THD, out, query_start_loc, block_table_RB, positions_T, sinks_H,
        kv.k, kv.v, kv.k_scales, kv.v_scales, maxima, sums, weighted,
        num_sequences, num_tokens, block_table_RB.stride(0), kv.k.stride(0), kv.k.stride(1),
        *(scales[:2] if scales else (0, 0)), scale, *limits,
        KIND=kv.dtype, SOFTCAP=softcap or 0.0, TURNED=kv.turned_dims,
        GROUP=group, SHARE=num_heads // num_kv // group, D=dim, VALUES=kv.value_dim,
        PADDED=kv.k.stride(2),
        DTYPE=TYPES[dtype], LIMITED=limited, PARTIAL=states is not None,
        DIMS=power(dim), PART=part, **cut,
        num_stages=tile.num_stages,
    )  # fmt: skip
    if states is not None:
        merge_splits(states, out, query_start_loc, positions_T, sinks_H, *limits)
    return out


States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def workspace(out_THV: torch.Tensor, splits: int, most: int | None = None) -> States | None:
    """Room for the state of each split of each row: maxima, sums, weighted values. None where one
    program walks all splits of a row, as there is but one or they would take too much."""
    shape = splits, *out_THV.shape
    floats = splits * (out_THV.numel() + 2 * out_THV.shape[0] * out_THV.shape[1])
    if splits == 1 or floats * 4 > (_WORKSPACE if most is None else most):
        return None
    maxima, sums = out_THV.new_empty(2, *shape[:-1], dtype=torch.float32)
    return maxima, sums, out_THV.new_empty(shape, dtype=torch.float32)


def shared(states: States | None, splits: int, programs: int) -> int:
    """How many programs share the splits of a row."""
    return 1 if states is None else min(splits, -(-_PROGRAMS // max(1, programs)))


def merge_splits(
    states: States,
    out_THV: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions_T: torch.Tensor,
    sinks_H: torch.Tensor | None,
    window: int = _NO_LIMIT,
    chunk: int = _NO_LIMIT,
    first: int = 0,
) -> None:
    num_tokens, num_heads, values = out_THV.shape
    part = min(_VALUES, power(values))
    merge_kernel[num_tokens * num_heads, -(-values // part)](
        *states, out_THV, query_start_loc, positions_T, sinks_H,
        len(query_start_loc) - 1, num_tokens * num_heads, num_heads, window, chunk, first,
        VALUES=values, LIMITED=(window, chunk, first) != (_NO_LIMIT, _NO_LIMIT, 0), PART=part,
        num_warps=1,
    )  # fmt: skip


def fitting(heads: int, rows: int) -> int:
    """Of so many heads that see the same keys those that a tile takes at once."""
    return next(n for n in range(min(heads, rows), 0, -1) if heads % n == 0)


TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def product_dtype(dtype: torch.dtype, kind: KVDtype) -> torch.dtype:
    """In which queries, keys, weights and values are multiplied: that of the cache, as far as it has
    one; a model in f32 has all in f32."""
    if dtype == torch.float32 or kind == "f32":
        return torch.float32
    return {"f16": torch.float16, "bf16": torch.bfloat16}.get(kind, dtype)


def power(n: int) -> int:
    """A side of a tile, 16 or more, that holds n."""
    return max(16, int(triton.next_power_of_2(n)))


def _case(
    kind: KVDtype, heads: int, kv_heads: int, dim: int, *, partial: bool = False, tall: int = 0,
    **other: Any,
) -> KernelCase:  # fmt: skip
    """What `attention` launches for bf16 queries (f16 with a cache in f16). tall: as the tuner may
    have it."""
    q = "fp16" if kind == "f16" else "bf16"
    cache = {"f16": "*fp16", "bf16": "*bf16", "int8": "*i8", "fp8": "*u8"}[kind]
    scaled, states = kind == "int8", ("maxima", "sums", "weighted")
    signature = {
        **{"q": f"*{q}", "out": f"*{q}", "starts": "*i32", "table": "*i32", "positions": "*i32"},
        **{"sinks": "*fp32", "k": cache, "v": cache, "k_scales": "*fp32", "v_scales": "*fp32"},
        **dict.fromkeys(states, "*fp32"),
        **{"num_sequences": "i32", "num_tokens": "i32", "stride_table": "i32"},
        **{"stride_block": "i32:16", "stride_head": "i32:16", "scale": "fp32"},
        **{"stride_scales": "i32", "stride_scales_head": "i32"},
        **{"window": "i32", "chunk": "i32", "first": "i32"},
    }
    tile, part = tile_of(dim, torch.bfloat16, kind), min(_VALUES, power(dim))
    tile = replace(tile, tall=tall or tile.tall)
    cut = tile.height(partial)
    num_warps = cut.pop("num_warps")
    constexprs = {
        **{"KIND": kind, "SOFTCAP": 0.0, "TURNED": dim // 16 if scaled else 1, "DTYPE": _NAMES[q]},
        **{
            "GROUP": heads // kv_heads,
            "SHARE": 1,
            "D": dim,
            "VALUES": dim,
            "PADDED": dim,
            "LIMITED": False,
        },
        **{"PARTIAL": partial, "DIMS": power(dim), "PART": part, "sinks": None, **cut},
        **({} if scaled else {"k_scales": None, "v_scales": None}),
        **({} if partial else dict.fromkeys(states)),
        **other,
    }
    name = f"attention/{kind}/{heads}x{kv_heads}x{dim}" + "/splits" * partial
    name += f"/{tall}" if tall else ""
    name += "".join(f"/{switch.lower()}" for switch in other)
    launch: dict[str, Any] = {"num_warps": num_warps, "num_stages": tile.num_stages}
    launch |= {"wants": "wgmma", "on_amd": {"num_stages": _AMD_STAGES}}
    if dim == 128 and cut["ROWS"] == 64 and not partial:
        # Both states in one warp group: some of the long one waits in memory for the next split.
        launch["max_spills"] = 128
    return KernelCase(name, attention_kernel, signature, constexprs, **launch)


_NAMES = {"fp16": tl.float16, "bf16": tl.bfloat16}

COMPILED = spills_elsewhere(
    _case("bf16", 32, 8, 128),
    _case("bf16", 32, 8, 128, partial=True),
    _case("bf16", 32, 8, 128, tall=128),
    _case("bf16", 32, 4, 128, partial=True),
    _case("f16", 32, 8, 128),
    _case("int8", 32, 8, 128),
    _case("int8", 32, 8, 128, partial=True),
    _case("int8", 32, 8, 128, tall=128),
    _case("fp8", 32, 8, 128),
    _case("fp8", 32, 8, 128, partial=True),
    _case("bf16", 64, 8, 64, LIMITED=True),
    _case("bf16", 64, 8, 64, partial=True, LIMITED=True),
    _case("bf16", 16, 8, 256, SOFTCAP=50.0, LIMITED=True),
    _case("bf16", 16, 8, 256, partial=True),
    KernelCase(
        "attention/merge/128",
        merge_kernel,
        {
            **dict.fromkeys(("maxima", "sums", "weighted"), "*fp32"),
            **{"out": "*bf16", "starts": "*i32", "positions": "*i32", "sinks": "*fp32"},
            **dict.fromkeys(("num_sequences", "num_rows", "num_heads"), "i32"),
            **dict.fromkeys(("window", "chunk", "first"), "i32"),
        },
        {"VALUES": 128, "LIMITED": True, "PART": 128},
        num_warps=1,
    ),
)
