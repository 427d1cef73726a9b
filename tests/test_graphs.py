"""Recorded decode steps give the bits of a plain forward, whatever was recorded in between."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from elinvar import _cpu
from elinvar.base.config import KVSpec
from elinvar.ops import load_provider
from elinvar.ops.caches import StateLayer
from elinvar.run import graphs
from elinvar.run.graphs import Graphs
from engines import random_weight, tiny_model
from helpers import Span, decode_batch, make_batch, make_cache

BLOCKS = 40
VOCAB = 96


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
@pytest.mark.parametrize("simd", _cpu.available())
def test_a_replay_is_a_forward(family: str, simd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of other sizes and longer tables come between, old recordings are dropped, the rope
    table grows (at 512 positions): every step must write and return what a plain one does."""
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    ops = load_provider("cpu", num_threads=2, simd=simd)
    model = tiny_model(ops, family)
    num_groups = len(model.kv_specs("f16"))
    recorded, plain = (make_cache(model, ops, BLOCKS, "f16") for _ in range(2))
    recorder = Graphs(model, ops, recorded)
    rng = np.random.default_rng(5)
    order = rng.permutation(BLOCKS).tolist()
    blocks = [order[:20], order[20:30], order[30:]]
    ids = [rng.integers(0, VOCAB, 640).tolist() for _ in blocks]
    done = [500, 250, 31]
    prompts = make_batch(
        [Span(i, 0, n, b) for i, n, b in zip(ids, done, blocks, strict=True)], num_groups
    )
    recorder.forward(prompts)
    model.forward(prompts, plain)
    for step in range(40):
        rows = [r for r in range(3) if (step >> r) % 3 != 2] or [0]
        batch = decode_batch(
            [Span(ids[r], done[r], done[r] + 1, blocks[r]) for r in rows], num_groups
        )
        for r in rows:
            done[r] += 1
        expected = model.forward(batch.flat(), plain)
        np.testing.assert_array_equal(recorder.forward(batch), expected)
    assert done[0] > 512
    for a, b in zip(recorded, plain, strict=True):
        for name in ("tails", "states") if isinstance(a, StateLayer) else ("k", "v"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_decode_of_a_known_shape_runs_no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = load_provider("cpu", num_threads=1)
    model = tiny_model(ops)
    recorder = Graphs(model, ops, make_cache(model, ops, 2, "f16"))
    calls = count()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a: (next(calls), forward(*a))[1])
    for position in range(20):
        recorder.forward(decode_batch([Span([7] * 20, position, position + 1, [1])], 1))
    assert next(calls) == 1


@pytest.mark.parametrize("simd", _cpu.available())
def test_ops_of_dense_families_are_recorded(simd: str) -> None:
    ops = load_provider("cpu", num_threads=2, simd=simd)
    rng = np.random.default_rng(6)
    shapes = ((2, 32), 32, 32, 48, (12, 4))
    x, gain, bias, of_qkv, table = (rng.standard_normal(s, np.float32) for s in shapes)
    qkv, out = random_weight(rng, "q8", 48, 32), random_weight(rng, "f16", 32, 16)
    [kv] = ops.kv_layers(KVSpec("full", (0,), 1, 16), 2)
    step = decode_batch([Span([1] * 9, 8, 9, [0]), Span([1] * 40, 4, 5, [1])], 1).flat()
    positions, slots = step.positions, step.slot_mapping[0]

    def run() -> np.ndarray:
        h = ops.layer_norm(ops.scale(x, 0.5), gain, bias, 1e-5)
        s, h = ops.add_layer_norm(x, h, gain, None, 1e-5)
        n = ops.linear(h, [qkv], of_qkv)
        q = ops.rope_write(n, positions, table, kv, slots, 1, None, None, 1e-5)
        a = ops.attention(
            q, kv, step.query_start_loc, step.seq_lens, step.block_tables[0], positions, 0.25, None
        )
        return ops.softcap(ops.add(s, ops.activate(ops.linear(a, [out], bias), "gelu")), 3.0)

    replay = ops.record(run)
    for _ in range(2):
        x += 1
        np.testing.assert_array_equal(replay(), run())


def test_a_failed_recording_leaves_the_provider_as_it_was() -> None:
    ops = load_provider("cpu", num_threads=1)
    x, gain = np.ones((1, 32), np.float32), np.ones(32, np.float32)

    def fail() -> np.ndarray:
        ops.rms_norm(x, gain, 0.0)
        raise KeyError("amid a model")

    with pytest.raises(KeyError, match="amid"):
        ops.record(fail)
    np.testing.assert_array_equal(ops.rms_norm(x, gain, 0.0), x)
