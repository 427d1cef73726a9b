"""What absorbed latent attention costs a prompt (docs/design/009): one attention layer of the shape of
DeepSeek V2 Lite, a prompt in steps of 512 tokens, absorbed as it runs here and expanded to a key and
a value of every head.

    python benchmarks/latent_prefill.py [--tokens 512 4096] [--threads 1] [--repeat 3]

The expanded form expands each latent once, and its values take 192 dims of the cache and of the work
where 128 would do: `attention` has one size for both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from elinvar.base.config import KVSpec
from elinvar.ops import load_provider
from elinvar.ops.layout import Weight, pack_float

DIM, HEADS, RANK, NOPE, ROPE, VALUE = 2048, 16, 512, 128, 64, 128
CHUNK, BLOCK = 512, 32
EPS = 1e-6


def weight(rng: np.random.Generator, n: int, k: int) -> Weight:
    values = rng.standard_normal((n, k), np.float32) / np.float32(k**0.5)
    return pack_float("bf16", (values.view(np.uint32) >> 16).astype(np.uint16))


class Layer:
    """Both forms over the same sizes; weights are random."""

    def __init__(self, ops: Any, tokens: int) -> None:
        rng = np.random.default_rng(0)
        self.ops, self.tokens = ops, tokens
        self.h = rng.standard_normal((tokens, DIM), np.float32)
        self.kv_a, self.q = weight(rng, RANK + ROPE, DIM), weight(rng, HEADS * (NOPE + ROPE), DIM)
        self.k_b, self.v_b = weight(rng, HEADS * RANK, NOPE), weight(rng, HEADS * VALUE, RANK)
        self.kv_b, self.o = weight(rng, HEADS * 256, RANK), weight(rng, DIM, HEADS * VALUE)
        self.gain = np.ones(RANK, np.float32)
        self.rope = np.ones((tokens, ROPE), np.float32)
        blocks = -(-tokens // BLOCK)
        self.table = np.arange(blocks, dtype=np.int32)[None]
        [self.latents] = ops.kv_layers(
            KVSpec("full", (0,), 1, RANK + ROPE, latent_dim=RANK), blocks
        )
        [self.keys] = ops.kv_layers(KVSpec("full", (0,), HEADS, NOPE + ROPE), blocks)

    def chunk(self, start: int, absorbed: bool, spent: dict[str, float]) -> None:
        ops, h = self.ops, self.h[start : start + CHUNK]
        positions = np.arange(start, start + len(h), dtype=np.int32)
        starts, lengths = np.array([0, len(h)], np.int32), positions[-1:] + 1
        seen = starts, lengths, self.table, positions, 0.07, None

        def timed(name: str, call: Callable[[], Any]) -> Any:
            begin = time.perf_counter()
            result = call()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - begin
            return result

        latent = timed("rest", lambda: ops.linear(h, (self.kv_a,)))
        query = timed("rest", lambda: ops.linear(h, (self.q,)))
        if absorbed:
            to = positions, self.rope, self.latents, positions, self.gain, EPS
            timed("rest", lambda: ops.latent_write(latent, *to))
            wide = (query, self.k_b, positions, self.rope, HEADS)
            query = timed("W_uk, W_uv", lambda: ops.latent_query(*wide))
            out = timed("attention", lambda: ops.attention(query, self.latents, *seen))
            out = timed("W_uk, W_uv", lambda: ops.head_linear(out, self.v_b, HEADS))
            timed("rest", lambda: ops.linear(out, (self.o,)))
            return
        latent = np.ascontiguousarray(latent[:, :RANK])
        latent = timed("rest", lambda: ops.rms_norm(latent, self.gain, EPS))
        timed("W_uk, W_uv", lambda: ops.linear(latent, (self.kv_b,)))
        # The layout of keys and values is not the question: any numbers of their sizes do.
        qkv = np.concatenate([query, query, query], axis=1)
        to = positions, self.rope, self.keys, positions, HEADS, None, None, EPS
        query = timed("rest", lambda: ops.rope_write(qkv, *to))
        out = timed("attention", lambda: ops.attention(query, self.keys, *seen))
        out = np.ascontiguousarray(out[:, : HEADS * VALUE])
        timed("rest", lambda: ops.linear(out, (self.o,)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    ops = load_provider("cpu", options.threads)
    for tokens in options.tokens:
        layer = Layer(ops, tokens)
        for absorbed in (True, False):
            best: dict[str, float] = {}
            for _ in range(options.repeat):
                spent: dict[str, float] = {}
                for start in range(0, tokens, CHUNK):
                    layer.chunk(start, absorbed, spent)
                best = {name: min(t, best.get(name, t)) for name, t in spent.items()}
            parts = ", ".join(f"{name} {1e3 * t:.0f} ms" for name, t in best.items())
            form = "absorbed" if absorbed else "expanded"
            print(f"{tokens} tokens, {form}: {1e3 * sum(best.values()):.0f} ms ({parts})")


if __name__ == "__main__":
    main()
