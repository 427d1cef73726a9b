"""Attention of Llama-3.1-8B's heads (32 of queries, 8 of keys, 128 dims): right, the same in prefill and
decode and in every batch, fast; torch's SDPA beside it, which reads keys that lie together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from elinvar.base.config import KVSpec
from elinvar.ops import load_provider
from elinvar.ops.triton.attention import tile_of
from elinvar.ops.triton.tuner_heads import Filled, Heads
from gpu_parts.base import Part, error_of

HEADS, KV_HEADS, DIMS = 32, 8, 128
DECODE = ((1, 4096), (1, 32768), (8, 8192), (32, 8192), (128, 4096), (128, 32768))
"""Sequences and their context."""


class Cache:
    """Keys and values of `count` sequences of one length, in blocks that lie in no order."""

    def __init__(self, part: Part, count: int, context: int, dtype: Any = "bf16") -> None:
        self.part, self.count, self.context = part, count, context
        self.ops: Any = load_provider("cuda")
        self.heads, self.kv_heads, self.dims = (4, 2, 32) if part.small else (HEADS, KV_HEADS, DIMS)
        per = -(-context // 32)
        spec = KVSpec("full", (0,), self.kv_heads, self.dims, dtype)
        (self.kv,) = self.ops.kv_layers(spec, per * count)
        if dtype == "bf16":  # others hold codes: their speed alone is measured, of zeros
            for each in (self.kv.k, self.kv.v):
                each.normal_(
                    generator=torch.Generator(part.device).manual_seed(each.data_ptr() % 97)
                )
        order = torch.randperm(per * count, generator=torch.Generator().manual_seed(0))
        self.tables = order.view(count, per).to(part.device, torch.int32)

    def call(self, q: torch.Tensor) -> Any:
        """q [count n, H, D]: of the last n tokens of each sequence."""
        n, device = len(q) // self.count, self.part.device
        starts = torch.arange(self.count + 1, device=device, dtype=torch.int32) * n
        lens = torch.full((self.count,), self.context, device=device, dtype=torch.int32)
        at = torch.arange(self.context - n, self.context, device=device, dtype=torch.int32)
        where, scale = (starts, lens, self.tables, at.repeat(self.count)), self.dims**-0.5
        return lambda: self.ops.attention(q, self.kv, *where, scale, None)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [count, Hkv, context, D]."""
        found = []
        for each in (self.kv.k, self.kv.v):
            picked = each[self.tables.long()]  # [count, blocks, Hkv, 32, D]
            flat = picked.transpose(1, 2).flatten(2, 3)[:, :, : self.context, : self.dims]
            found.append(flat)
        return found[0], found[1]


def measure(part: Part) -> None:
    part.attempt("right", lambda: right(part))
    for count, context in ((2, 70),) if part.small else DECODE:
        for dtype in ("bf16",) if part.small else ("bf16", "fp8"):
            part.attempt(
                f"decode/{dtype}/{count}x{context}",
                lambda c=count, n=context, d=dtype: decode(part, c, n, d),
            )
            torch.cuda.empty_cache()
    part.attempt("prefill", lambda: prefill(part, 40 if part.small else 8192))


def right(part: Part) -> dict[str, Any]:
    count, context = (2, 75) if part.small else (3, 2500)
    cache = Cache(part, count, context)
    n = 9 if part.small else 200
    q = part.randn(count * n, cache.heads, cache.dims)
    whole = cache.call(q)().view(count, n, -1)
    k, v = (
        each.double().repeat_interleave(cache.heads // cache.kv_heads, 1) for each in cache.dense()
    )
    queries = q.double().view(count, n, cache.heads, cache.dims).transpose(1, 2)
    scores = queries @ k.transpose(2, 3) * cache.dims**-0.5
    keys = torch.arange(context, device=part.device)
    unseen = keys[None, :] > torch.arange(context - n, context, device=part.device)[:, None]
    exact = torch.softmax(scores.masked_fill(unseen, -torch.inf), 3) @ v
    error = error_of(whole, exact.transpose(1, 2).flatten(2))
    rows = q.view(count, n, cache.heads, cache.dims)
    one = cache.call(rows[:, n - 1].contiguous())()
    as_decoded = torch.equal(one, whole[:, n - 1])
    some = cache.call(rows[:, n - 5 :].flatten(0, 1).contiguous())().view(count, 5, -1)
    as_drafts = torch.equal(some, whole[:, n - 5 :])
    cache.count, cache.tables = 1, cache.tables[1:2].contiguous()
    alone = torch.equal(cache.call(rows[1].contiguous())(), whole[1])
    return {
        "error_of_largest": error,
        "right": error < part.tolerance(8e-3),
        "decode_is_prefill": as_decoded,
        "drafts_are_prefill": as_drafts,
        "alone_is_batch": alone,
    }


def decode(part: Part, count: int, context: int, dtype: Any) -> dict[str, Any]:
    cache = Cache(part, count, context, dtype)
    q = part.randn(count, cache.heads, cache.dims)
    moved = count * context * 2 * cache.kv_heads * cache.dims * (1 if dtype == "fp8" else 2)
    found = part.rates(part.seconds([cache.call(q)]), moved)
    if dtype == "bf16":
        k, v = (each.contiguous() for each in cache.dense())
        queries = q[:, :, None]
        sdpa = part.seconds([lambda: scaled_dot_product_attention(queries, k, v, enable_gqa=True)])
        found["sdpa_us"] = sdpa * 1e6
    return found


def prefill(part: Part, tokens: int) -> dict[str, Any]:
    cache = Cache(part, 1, tokens)
    q = part.randn(tokens, cache.heads, cache.dims)
    flops = 2 * tokens * tokens * cache.heads * cache.dims  # causal: half of 4 T^2 H D
    found = part.rates(part.seconds([cache.call(q)]), 0, flops)
    if not part.small:  # as the tuner may have it, where the part `bits` saw equal bits
        tall = Filled(Heads(HEADS, KV_HEADS, DIMS, "bf16"), 1, tokens, tokens, part.device)
        call = tall.attend(tokens, replace(tile_of(DIMS, q.dtype, "bf16"), tall=128))
        found["tall"] = part.rates(part.seconds([call]), 0, flops)
    k, v = (each.contiguous() for each in cache.dense())
    queries = q.transpose(0, 1)[None].contiguous()
    sdpa = part.seconds(
        [lambda: scaled_dot_product_attention(queries, k, v, is_causal=True, enable_gqa=True)]
    )
    return {**found, "sdpa_flops": flops / sdpa}
