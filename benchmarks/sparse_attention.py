"""What sparse attention saves (docs/design/014): one layer of DeepSeek V3.2's sizes at some context,
dense, and with an index that chooses 2,048 keys; the index's own cost apart.

    python benchmarks/sparse_attention.py [--context 4096 32768] [--queries 1 64] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from elinvar.base.config import KVSpec
from elinvar.ops import load_provider

HEADS, RANK, ROPE, INDEX_HEADS, INDEX_DIM, TOP_K = 128, 512, 64, 64, 128, 2048


def best(call: Callable[[], Any], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    ops, rng = load_provider("cpu", options.threads), np.random.default_rng(0)
    for context in options.context:
        blocks = -(-context // 32)
        latents, keys = (
            ops.kv_layers(KVSpec("full", (0,), 1, dim, latent_dim=values), blocks)[0]
            for dim, values in ((RANK + ROPE, RANK), (INDEX_DIM, INDEX_DIM))
        )
        for cache in (latents, keys):
            cache.k[...] = rng.standard_normal(cache.k.shape, np.float32).astype(np.float16)
        table = rng.permutation(blocks).astype(np.int32)[None]
        for count in options.queries:
            q = rng.standard_normal((count, HEADS, RANK + ROPE), np.float32)
            index = rng.standard_normal((count, INDEX_HEADS, INDEX_DIM), np.float32)
            weights = rng.standard_normal((count, INDEX_HEADS), np.float32)
            positions = np.arange(context - count, context, dtype=np.int32)
            starts, lengths = np.array([0, count], np.int32), np.array([context], np.int32)
            where = starts, table, positions
            chosen = ops.index_select(index, weights, keys, *where, TOP_K)
            dense = starts, lengths, table, positions, 0.1, None
            found = {
                "dense": partial(ops.attention, q, latents, *dense),
                "index": partial(ops.index_select, index, weights, keys, *where, TOP_K),
                "sparse": partial(ops.sparse_attention, q, latents, *where, chosen, 0.1),
            }
            parts = ", ".join(f"{n} {best(f, options.repeat):.1f} ms" for n, f in found.items())
            print(f"{context} keys, {count} queries: {parts}")


if __name__ == "__main__":
    main()
