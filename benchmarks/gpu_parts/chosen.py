"""DeepSeek V3.2's sizes: an index of 64 heads of 128 dims chooses 2,048 keys for each token, to which 128
heads attend, over latents of 512 + 64 dims. Right, the same in prefill and decode and in every batch,
fast; latent attention to all keys beside it. And of Llama-3.1-8B's heads, what a prompt attends to."""

from __future__ import annotations

from typing import Any

import torch

from elinvar.base.config import KVSpec
from elinvar.ops import load_provider
from gpu_parts.attention import Cache
from gpu_parts.base import Part, error_of

DECODE = ((1, 8192), (1, 32768), (1, 131072), (32, 32768))
"""Sequences and their context."""
SIZES = {"index_heads": 64, "index_dim": 128, "heads": 128, "rank": 512, "rope": 64, "k": 2048}
SMALL = {"index_heads": 4, "index_dim": 32, "heads": 4, "rank": 32, "rope": 16, "k": 24}
SCALE = 0.1


class Chosen:
    """Latents and the index's keys of `count` sequences of one length, in blocks that lie in no order."""

    def __init__(self, part: Part, count: int, context: int) -> None:
        self.part, self.count, self.context = part, count, context
        self.ops: Any = load_provider("cuda")
        self.sizes = s = SMALL if part.small else SIZES
        per = -(-context // 32)
        dims = s["rank"] + s["rope"], s["rank"]
        self.latents, self.keys = (
            self.ops.kv_layers(KVSpec("full", (0,), 1, d, "bf16", latent_dim=r), per * count)[0]
            for d, r in (dims, (s["index_dim"], s["index_dim"]))
        )
        for seed, each in enumerate((self.latents.k, self.keys.k)):
            each.normal_(generator=torch.Generator(part.device).manual_seed(seed))
        order = torch.randperm(per * count, generator=torch.Generator().manual_seed(0))
        self.tables = order.view(count, per).to(part.device, torch.int32)

    def queries(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of n tokens a sequence: the index's, what its heads count, and those of attention."""
        s, tokens = self.sizes, self.count * n
        return (
            self.part.randn(tokens, s["index_heads"], s["index_dim"]),
            self.part.randn(tokens, s["index_heads"], dtype=torch.float32, seed=1),
            self.part.randn(tokens, s["heads"], s["rank"] + s["rope"], seed=2),
        )

    def where(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The last n tokens of each sequence."""
        device = self.part.device
        starts = torch.arange(self.count + 1, device=device, dtype=torch.int32) * n
        at = torch.arange(self.context - n, self.context, device=device, dtype=torch.int32)
        return starts, self.tables, at.repeat(self.count)

    def choose(self, q: torch.Tensor, weights: torch.Tensor, n: int, k: int = 0) -> torch.Tensor:
        chosen = self.ops.index_select(q, weights, self.keys, *self.where(n), k or self.sizes["k"])
        return torch.as_tensor(chosen)

    def attend(self, q: torch.Tensor, chosen: torch.Tensor, n: int) -> torch.Tensor:
        found = self.ops.sparse_attention(q, self.latents, *self.where(n), chosen, SCALE)
        return torch.as_tensor(found)

    def dense(self, q: torch.Tensor, n: int) -> torch.Tensor:
        starts, tables, at = self.where(n)
        lens = torch.full((self.count,), self.context, device=self.part.device, dtype=torch.int32)
        where = starts, lens, tables, at
        return torch.as_tensor(self.ops.attention(q, self.latents, *where, SCALE, None))

    def flat(self, cache: torch.Tensor, dims: int) -> torch.Tensor:
        """Keys of all sequences [count, context, dims] in f64."""
        return cache[self.tables.long()][:, :, 0].flatten(1, 2)[:, : self.context, :dims].double()


def measure(part: Part) -> None:
    part.attempt("right", lambda: right(part))
    for count, context in ((2, 70),) if part.small else DECODE:
        part.attempt(f"{count}x{context}", lambda c=count, n=context: speed(part, c, n, 1))
        if not part.small:
            torch.cuda.empty_cache()
    size = (1, 70, 9) if part.small else (1, 32768, 2048)
    part.attempt("prefill", lambda: speed(part, *size))
    part.attempt("shares", lambda: shares(part))


def right(part: Part) -> dict[str, Any]:
    made, n = Chosen(part, 2, 75 if part.small else 5000), 5
    q_index, weights, q = made.queries(n)
    chosen = made.choose(q_index, weights, n)
    found = made.attend(q, chosen, n)
    count, k, s = made.count, made.sizes["k"], made.sizes
    at = torch.arange(made.context - n, made.context, device=part.device)
    unseen = torch.arange(made.context, device=part.device) > at[:, None]
    dots = torch.einsum(
        "rthd,rkd->rthk", q_index.double().view(count, n, *q_index.shape[1:]),
        made.flat(made.keys.k, s["index_dim"]),
    )  # fmt: skip
    worth = torch.einsum("rthk,rth->rtk", dots.clamp_min(0), weights.double().view(count, n, -1))
    best = worth.masked_fill(unseen, -torch.inf).topk(k).indices
    mine = torch.zeros_like(worth, dtype=torch.bool).scatter_(
        2, chosen.view(count, n, k).long(), True
    )
    keys = made.flat(made.latents.k, s["rank"] + s["rope"])
    scores = torch.einsum("rthd,rkd->rthk", q.double().view(count, n, *q.shape[1:]), keys) * SCALE
    weighed = torch.softmax(scores.masked_fill(~mine[:, :, None], -torch.inf), 3)
    exact = torch.einsum("rthk,rkd->rthd", weighed, keys[..., : s["rank"]])
    error = error_of(found.view_as(exact), exact)
    common = float(mine.gather(2, best).double().mean())
    few = made.choose(q_index, weights, n, made.context + 1)
    last = [
        each.view(count, n, *each.shape[1:])[:, -1].contiguous() for each in (q_index, weights, q)
    ]
    decoded = made.choose(last[0], last[1], 1)
    as_decoded = torch.equal(decoded, chosen.view(count, n, k)[:, -1])
    rows = torch.equal(made.attend(last[2], decoded, 1), found.view(count, n, -1)[:, -1])
    return {
        "error_of_largest": error,
        "chosen_as_in_f64": common,
        "right": error < part.tolerance(8e-3) and common > 0.98,
        "decode_is_prefill": as_decoded and rows,
        "all_keys_is_dense": torch.equal(made.attend(q, few, n), made.dense(q, n)),
    }


def speed(part: Part, count: int, context: int, n: int) -> dict[str, Any]:
    """Of n tokens a sequence: the index's scores and choice, attention to it, and to all keys."""
    made = Chosen(part, count, context)
    q_index, weights, q = made.queries(n)
    chosen, s = made.choose(q_index, weights, n), made.sizes
    seen = count * n * (context - n / 2)
    taken = 2 * count * n * s["k"] * s["heads"] * (2 * s["rank"] + s["rope"])
    index = part.seconds([lambda: made.choose(q_index, weights, n)])
    sparse = part.seconds([lambda: made.attend(q, chosen, n)])
    dense = part.seconds([lambda: made.dense(q, n)])
    width = 2 * (s["rank"] + s["rope"])
    return {
        "index": part.rates(
            index, count * context * 2 * s["index_dim"],
            2 * seen * s["index_heads"] * s["index_dim"],
        ),
        "sparse": part.rates(sparse, count * n * s["k"] * width, taken),
        "dense_us": dense * 1e6,
    }  # fmt: skip


def shares(part: Part) -> dict[str, Any]:
    """Of a prompt's last 32 tokens."""
    cache = Cache(part, 1, 75 if part.small else 32768)
    n, blocks = (4 if part.small else 32), cache.tables.shape[1]
    q = part.randn(n, cache.heads, cache.dims)
    starts = torch.tensor([0, n], device=part.device, dtype=torch.int32)
    at = torch.arange(cache.context - n, cache.context, device=part.device, dtype=torch.int32)
    found = torch.zeros(n, blocks, device=part.device)

    def run() -> None:
        where = starts, cache.tables, at, cache.dims**-0.5
        cache.ops.block_shares(q, cache.kv, *where, found)

    seconds = part.seconds([run])
    keys = cache.dense()[0].double().repeat_interleave(cache.heads // cache.kv_heads, 1)[0]
    scores = torch.einsum("thd,hkd->thk", q.double(), keys) * cache.dims**-0.5
    unseen = torch.arange(cache.context, device=part.device) > at[:, None]
    weights = torch.softmax(scores.masked_fill(unseen[:, None], -torch.inf), 2)
    padded = torch.nn.functional.pad(weights, (0, blocks * 32 - cache.context))
    exact = padded.unflatten(2, (blocks, 32)).sum(3).amax(1)
    error = error_of(found, exact)
    moved = cache.context * 2 * cache.kv_heads * cache.dims
    return {
        **part.rates(seconds, moved), "error_of_largest": error,
        "right": error < part.tolerance(8e-3),
    }  # fmt: skip
