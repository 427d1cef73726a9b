"""Recorded decode steps give the bits of a plain forward, whatever was recorded in between."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from elinvar import _cpu
from elinvar.ops import load_provider
from elinvar.run import graphs
from elinvar.run.graphs import Graphs
from engines import tiny_model
from helpers import Span, decode_batch, make_batch, make_cache

BLOCKS = 40
VOCAB = 96


@pytest.mark.parametrize("family", ["llama", "gemma3"])
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
        np.testing.assert_array_equal(a.k, b.k)
        np.testing.assert_array_equal(a.v, b.v)


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


def test_a_failed_recording_leaves_the_provider_as_it_was() -> None:
    ops = load_provider("cpu", num_threads=1)
    x, gain = np.ones((1, 32), np.float32), np.ones(32, np.float32)

    def fail() -> np.ndarray:
        ops.rms_norm(x, gain, 0.0)
        raise KeyError("amid a model")

    with pytest.raises(KeyError, match="amid"):
        ops.record(fail)
    np.testing.assert_array_equal(ops.rms_norm(x, gain, 0.0), x)
