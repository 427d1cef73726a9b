"""Profiling: what ops cost by their meaning, and a wrapper that times calls and changes no bit."""

from __future__ import annotations

from time import perf_counter_ns
from typing import Any

import numpy as np
import pytest

from elinvar.base.config import KVDtype, KVSpec
from elinvar.base.sampling import SamplingParams
from elinvar.ops import cost, cost_caches, load_provider
from elinvar.ops.api import Ops
from elinvar.ops.arguments import SampleArgs
from elinvar.ops.caches import new_kv_layers
from elinvar.ops.costs import COSTS
from elinvar.ops.profiled import ProfiledOps
from engines import answers, provider, random_weight, tiny_engine

RNG = np.random.default_rng(1)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_every_op_that_computes_has_a_cost() -> None:
    names = {name for name, value in vars(Ops).items() if callable(value) and name[0] != "_"}
    places = {"kv_layers", "prepare", "available_memory", "graph_size", "record", "release"}
    places |= {"upload", "download", "warm_up", "exchange"}
    assert set(COSTS) == names - places


def test_linear_multiplies_every_weight_with_every_row() -> None:
    q4, q8 = random_weight(RNG, "q4", 48, 64), random_weight(RNG, "q8", 32, 64)
    found = cost.linear(zeros(5, 64), [q4, q4])
    assert found.ops == 2 * 5 * 96 * 64 and found.unit == "int8"
    # 64 codes of 4 bits and two groups with an f16 scale and minimum: 40 bytes a column.
    assert found.streamed == 96 * 40
    assert found.moved == found.streamed + 5 * 64 * 4 + 5 * 96 * 4
    assert found.label == "q4 48+48x64"
    assert cost.linear(zeros(1, 64), [q4, q8]).label == "q4 48x64 + q8 32x64"
    assert cost.linear(zeros(5, 64), [q4, q4], zeros(96)).moved == found.moved + 96 * 4
    f16 = random_weight(RNG, "f16", 32, 64)
    assert cost.linear(zeros(1, 64), [f16]).unit == "f32"
    gated = cost.gated_linear(zeros(5, 64), q4, q4, "silu")
    assert gated.ops == found.ops and gated.moved == found.moved - 5 * 48 * 4


def test_elementwise_ops_move_their_arrays_once() -> None:
    x, gain = zeros(3, 64), zeros(64)
    assert cost.add(x, x).moved == 3 * 3 * 64 * 4
    assert cost.rms_norm(x, gain, 1e-5).moved == (2 * 3 + 1) * 64 * 4
    assert cost.add_rms_norm(x, x, gain, 1e-5).moved == (4 * 3 + 1) * 64 * 4
    assert cost.layer_norm(x, gain, gain, 1e-5).moved == (2 * 3 + 2) * 64 * 4
    assert cost.add_layer_norm(x, x, gain, None, 1e-5).moved == (4 * 3 + 1) * 64 * 4
    for found in (cost.scale(x, 2.0), cost.softcap(x, 2.0), cost.activate(x, "gelu")):
        assert found.moved == 2 * 3 * 64 * 4 and found.ops
    table = random_weight(RNG, "f32", 32, 64)
    assert cost.embed(ints(1, 2), table, 1.0).streamed == 2 * 64 * 4


def attention_cost(window: int | None, dtype: KVDtype = "f16", **switches: Any) -> cost.Cost:
    """A prompt of 40 tokens from its start, and one token at position 99."""
    [kv] = new_kv_layers(KVSpec("full", (0,), 2, 16, dtype), 8)
    positions = np.concatenate([np.arange(40), [99]]).astype(np.int32)
    starts, lengths = ints(0, 40, 41), ints(40, 100)
    return cost_caches.attention(
        *(zeros(41, 4, 16), kv, starts, lengths, zeros(2, 4), positions, 1.0, window), **switches
    )


def test_attention_reads_a_key_once_and_multiplies_it_for_each_query() -> None:
    found = attention_cost(None)
    assert found.streamed == (40 + 100) * 2 * (16 + 16) * 2
    assert found.ops == (40 * 41 // 2 + 100) * 4 * (4 * 16)
    assert attention_cost(None, "int8").streamed == (40 + 100) * 2 * 2 * (16 + 4)
    windowed = attention_cost(10)
    assert windowed.streamed == (40 + 10) * 2 * (16 + 16) * 2
    assert windowed.ops == (sum(min(i, 10) for i in range(1, 41)) + 10) * 4 * (4 * 16)
    chunked = attention_cost(None, chunk=16, softcap=30.0)
    assert chunked.streamed == (40 + 4) * 2 * (16 + 16) * 2
    assert chunked.ops == (sum(i % 16 + 1 for i in range(40)) + 4) * 4 * (4 * 16)
    assert (windowed.label, chunked.label) == ("f16 window 10", "f16 chunk 16 softcap 30.0")


def test_rope_and_sample_costs() -> None:
    [kv] = new_kv_layers(KVSpec("full", (0,), 2, 16, "bf16"), 8)
    arguments = zeros(3, 8 * 16), ints(0, 1, 2), zeros(4, 16), kv, ints(0, 1, 2), 4
    plain = cost_caches.rope_write(*arguments, None, None, 0.0)
    assert plain.streamed == 3 * 2 * 2 * 16 * 2
    assert cost_caches.rope_write(*arguments, zeros(16), zeros(16), 0.0).ops > plain.ops
    part = cost_caches.rope_write(*arguments[:2], zeros(4, 8), *arguments[3:], None, None, 0.0)
    assert part.ops == plain.ops // 2 and part.moved == plain.moved - 3 * 8 * 4
    args = SampleArgs(*(ints(0) for _ in range(6)), num_logprobs=0)  # type: ignore[misc]
    assert cost.sample(zeros(2, 100), args).moved == 800


def test_a_latent_is_read_once_and_a_head_multiplies_its_own_rows() -> None:
    [kv] = new_kv_layers(KVSpec("full", (0,), 1, 48, "f16", latent_dim=32), 8)
    positions, table = ints(0, 1, 2), zeros(8, 16)
    found = cost_caches.attention(
        zeros(3, 4, 48), kv, ints(0, 3), ints(3), zeros(1, 4), positions, 1.0, None
    )
    assert found.streamed == 3 * 48 * 2
    assert found.ops == 6 * 2 * 4 * (48 + 32)
    written = cost_caches.latent_write(
        zeros(3, 48), positions, table, kv, positions, zeros(32), 1e-6
    )
    assert written.streamed == found.streamed
    w = random_weight(RNG, "f32", 4 * 32, 64)
    alone = cost.head_linear(zeros(3, 4 * 64), w, 4)
    assert alone.ops == 2 * 3 * 4 * 32 * 64 and alone.streamed == w.nbytes
    query = cost.latent_query(zeros(3, 4 * 80), w, positions, table, 4)
    assert query.ops > alone.ops and query.streamed == w.nbytes


@pytest.mark.parametrize("name", ["cpu", "ref"])
def test_answers_are_the_same_and_every_call_is_timed(name: str) -> None:
    params = [SamplingParams(max_tokens=6, seed=i, logprobs=1, ignore_eos=True) for i in range(3)]
    prompts = [[i + 1] * (5 + i) for i in range(3)]
    plain = answers(tiny_engine(ops=load_provider(name, 1)), prompts, params)
    ops = ProfiledOps(load_provider(name, 1))
    engine = tiny_engine(ops=ops, speculation="off")  # type: ignore[arg-type]
    assert answers(engine, prompts, params) == plain
    began = perf_counter_ns()
    with ops.recording() as recording:
        assert answers(engine, prompts, params) == plain
    ended = perf_counter_ns()
    counts = {op: sum(call.op == op for call in recording.calls) for op in COSTS}
    # One step of prompts and five of decode, two layers.
    assert counts["sample"] == counts["embed"] == 6
    assert counts["attention"] == counts["gated_linear"] == 12
    assert counts["linear"] == 6 * (2 * 3 + 1)
    times = [t for call in recording.calls for t in (call.start, call.end)]
    assert sorted(times) == times and began <= times[0] and times[-1] <= ended
    assert 0 < recording.overhead < ended - began


def test_a_replay_knows_the_positions_of_its_step() -> None:
    ops = ProfiledOps(load_provider("cpu", 1))
    engine = tiny_engine(ops=ops, speculation="off")  # type: ignore[arg-type]
    engine.add([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
    engine.step()
    keys = []
    while engine.has_work:
        with ops.recording() as recording:
            engine.step()
        keys += [c.cost.streamed for c in recording.calls if c.op == "attention"][:1]
    one = 2 * 2 * 16 * 2
    assert keys == [4 * one, 5 * one, 6 * one]


def test_nothing_stands_between_when_off() -> None:
    inner = provider()
    ops = ProfiledOps(inner)
    assert ops.linear == inner.linear and ops.simd == inner.simd  # type: ignore[attr-defined]
    with ops.recording():
        assert ops.linear != inner.linear  # type: ignore[attr-defined]
    assert ops.linear == inner.linear  # type: ignore[attr-defined]
