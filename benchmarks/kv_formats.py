"""What a number format of the KV cache makes of attention's time (docs/design/020): one layer, a token at
the end of a context, and a prompt's last tokens. Formats take turns, the quickest of each counts.

    python benchmarks/kv_formats.py [--formats f16 int8] [--context 512 8192] [--queries 1 256]

As many layers as make up several times the last cache take turns too, so that a token's keys come from
memory, as in a model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import cycle
from typing import Any, get_args

import numpy as np

from elinvar.base.config import BLOCK_SIZE, KVDtype, KVSpec
from elinvar.ops import Ops, load_provider

SHAPES = {
    "9 / 3 x 64 (SmolLM2 135M)": (9, 3, 64, None),
    "32 / 8 x 128 (Llama 3 8B)": (32, 8, 128, None),
    "16 x 512 + 64 (DeepSeek V2 Lite)": (16, 1, 576, 512),
}
"""Heads of queries and of keys, dims, and of latents how many are values too."""
MEMORY = 128 << 20
"""Bytes of cache that calls go round over."""


class Layers:
    """Caches of one format, filled, of which calls take one after the other."""

    def __init__(self, ops: Ops, spec: KVSpec, heads: int, context: int, queries: int) -> None:
        self.ops, rng = ops, np.random.default_rng(0)
        num_blocks = -(-context // BLOCK_SIZE)
        # At least two, so that a call never finds what the one before it read.
        count = max(2, MEMORY // (num_blocks * spec.block_bytes)) if queries == 1 else 1
        self.caches = [ops.kv_layers(spec, num_blocks)[0] for _ in range(count)]
        slots, values = np.arange(context, dtype=np.int32), 1 if spec.latent_dim else 2
        width = (heads + values * spec.num_kv_heads) * spec.head_dim
        qkv = rng.standard_normal((context, width), np.float32)
        for kv in self.caches:
            rope = np.zeros((1, 0), np.float32)
            ops.rope_write(qkv, slots * 0, rope, kv, slots, heads, None, None, 1e-6)
        self.q = rng.standard_normal((queries, heads, spec.head_dim), np.float32)
        last = np.arange(context - queries, context, dtype=np.int32)
        table = np.arange(num_blocks, dtype=np.int32)[None]
        starts, lengths = np.array([0, queries], np.int32), np.array([context], np.int32)
        self.rest = starts, lengths, table, last, spec.head_dim**-0.5, None
        self.turn: Iterator[Any] = cycle(self.caches)

    def seconds(self) -> float:
        """Of one call, the mean of a round over all caches."""
        begin = time.perf_counter()
        for _ in self.caches:
            self.ops.attention(self.q, next(self.turn), *self.rest)
        return (time.perf_counter() - begin) / len(self.caches)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--formats", nargs="+", choices=get_args(KVDtype), default=["f16", "int8"])
    parser.add_argument("--context", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--simd", help="an instruction set (default: the widest)")
    parser.add_argument("--repeat", type=int, default=10)
    options = parser.parse_args()
    ops = load_provider("cpu", options.threads, options.simd)
    first = options.formats[0]
    for name, (heads, kv_heads, dim, latent_dim) in SHAPES.items():
        for context in options.context:
            for queries in (q for q in options.queries if q <= context):
                layers = {}
                for dtype in options.formats:
                    spec = KVSpec("full", (0,), kv_heads, dim, dtype, latent_dim=latent_dim)
                    layers[dtype] = Layers(ops, spec, heads, context, queries)
                best = dict.fromkeys(layers, float("inf"))
                for _ in range(options.repeat):
                    for dtype, one in layers.items():
                        best[dtype] = min(best[dtype], one.seconds())
                told = (f"{d} {1e3 * s:.3f} ms ({s / best[first]:.2f})" for d, s in best.items())
                print(f"{name}, {context} keys, {queries} queries: {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
