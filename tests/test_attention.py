"""nn.Attention: what a layer's kind and the model's switches ask of the op, and of the cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from elinvar.base.config import LayerKind, ModelConfig, RopeConfig
from elinvar.nn.attention import Attention, Step, kv_specs
from elinvar.nn.rope import RopeTable
from elinvar.ops import load_provider
from engines import random_weight
from families.base import LLAMA
from helpers import Span, make_batch
from sweeps import BASE, CPUS, REF, close, normal, same, spec

LENGTH = 75


def config(*kinds: LayerKind) -> ModelConfig:
    rope = {kind: RopeConfig(10_000.0, 16) for kind in kinds}
    return replace(
        LLAMA, layer_kinds=kinds, num_layers=len(kinds), rope=rope,
        window=8, attn_chunk=20, attn_softcap=1.5,
    )  # fmt: skip


def test_chunked_layers_share_the_blocks_of_full_ones() -> None:
    [spec] = kv_specs(config("chunked", "full", "chunked"), "f16")
    assert (spec.kind, spec.layers, spec.window) == ("full", (0, 1, 2), None)
    full, sliding = kv_specs(config("sliding", "chunked"), "f16")
    assert (full.kind, full.layers, full.window) == ("full", (1,), None)
    assert (sliding.kind, sliding.layers, sliding.window) == ("sliding", (0,), 8)


def test_switches_reach_the_op_and_pieces_give_the_same_bits() -> None:
    rng = np.random.default_rng(3)
    c = config("chunked")
    weights = [random_weight(rng, "f32", n, 64) for n in (64, 32, 32, 64)]
    sinks = rng.standard_normal(4).astype(np.float32)
    x = rng.standard_normal((LENGTH, 64)).astype(np.float32)

    def run(provider: str, step: int, model: ModelConfig = c, s: np.ndarray | None = sinks):  # type: ignore[no-untyped-def]
        ops = load_provider(provider, 2)
        q, k, v, o = weights
        layer = Attention(model, 0, (q, k, v), o, ops, sinks=s)
        [spec] = kv_specs(model, "f32")
        [kv] = ops.kv_layers(spec, 3)
        rope = RopeTable(model.rope["chunked"]).upto(LENGTH)
        out = []
        for start in range(0, LENGTH, step):
            stop = min(start + step, LENGTH)
            batch = make_batch([Span(range(LENGTH), start, stop, [2, 0, 1])], 1)
            out.append(layer(x[start:stop], Step(batch, {"chunked": rope}), kv))
        return np.concatenate(out)

    whole, oracle = run("cpu", LENGTH), run("ref", LENGTH)
    assert np.abs(whole - oracle).max() < 1e-5 * np.abs(oracle).max()
    for step in (1, 7, 33):
        assert np.array_equal(run("cpu", step), whole)
    # Each switch changes the answer.
    for other in (replace(c, attn_chunk=200), replace(c, attn_softcap=None)):
        assert np.abs(run("cpu", LENGTH, other) - whole).max() > 0.01
    assert np.abs(run("cpu", LENGTH, c, None) - whole).max() > 0.01


@pytest.mark.parametrize("first", [1, 33, 1050])
def test_nothing_is_seen_before_the_first_key(first: int) -> None:
    rng = np.random.default_rng(first)
    length, rows = 1100, 5
    [kv] = BASE.kv_layers(spec(16, "f32", 1), 35)
    kv.k[...], kv.v[...] = normal(rng, *kv.k.shape), normal(rng, *kv.v.shape)
    table = rng.permutation(35).astype(np.int32)[None]
    slots = [(table[0, p // 32], 0, p % 32) for p in range(first)]
    for block, head, at in slots:
        kv.k[block, head, :, at], kv.v[block, head, at] = np.nan, np.nan
    q, starts = normal(rng, rows, 2, 16), np.array([0, rows], np.int32)
    positions = np.array([first, first + 1, first + 30, length - 2, length - 1], np.int32)
    args = (kv, starts, positions[-1:] + 1, table, positions, 0.25, None)
    outputs = [ops.attention(q, *args, first=first) for ops in CPUS.values()]
    same(outputs)
    close(outputs[0], REF.attention(q, *args, first=first), 3e-6)
