"""Ops of layers with a recurrent state. As in sweeps.py: close to `ref`, and equal to the bit across
instruction sets, threads, batches and chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from elinvar.base.config import DeltaConfig, KVSpec
from elinvar.ops import Ops
from elinvar.ops.api import F32
from elinvar.ops.caches import StateLayer
from helpers import Span, make_batch
from sweeps import BASE, CPUS, REF, close, normal, same

LENGTHS = [1, 2, 3, 17, 97]
CONFIGS = [
    DeltaConfig(key_heads=1, heads=1, key_dim=1, value_dim=1, taps=2),
    DeltaConfig(key_heads=2, heads=6, key_dim=24, value_dim=20, taps=4),
    DeltaConfig(key_heads=1, heads=2, key_dim=128, value_dim=136, taps=3),
]
NUM_BLOCKS = 20
Step = Callable[[Ops, StateLayer, slice, tuple[np.ndarray, ...]], F32]


def state_of(ops: Ops, c: DeltaConfig) -> StateLayer:
    """Blocks full of what former sequences left."""
    [layer] = ops.kv_layers(KVSpec("linear", (0,), 1, 8, state=c), NUM_BLOCKS)
    layer.tails[...] = layer.states[...] = np.nan
    return layer


def run(ops: Ops, c: DeltaConfig, step: Step, chunk: int, lengths: Sequence[int]) -> list[F32]:
    """Sequences of these lengths in one batch, each `chunk` tokens a step; the inputs of one lie
    behind those of another."""
    state, order = state_of(ops, c), np.random.default_rng(1).permutation(NUM_BLOCKS).tolist()
    starts = np.cumsum([0, *lengths])
    blocks = [[order.pop() for _ in range(-(-n // 32))] for n in lengths]
    outputs: list[list[F32]] = [[] for _ in lengths]
    for at in range(0, max(lengths), chunk):
        live = [i for i, n in enumerate(lengths) if at < n]
        spans = [Span([0] * lengths[i], at, min(at + chunk, lengths[i]), blocks[i]) for i in live]
        batch = make_batch(spans, 1)
        rows = [slice(starts[i] + s.start, starts[i] + s.stop) for i, s in zip(live, spans)]  # noqa: B905
        where = batch.query_start_loc, batch.seq_lens, batch.block_tables[0]
        got = step(ops, state, np.r_[tuple(rows)], where)
        for i, part in zip(live, np.split(got, batch.query_start_loc[1:-1]), strict=True):
            outputs[i].append(part)
    return [np.concatenate(parts) for parts in outputs]


def steps(c: DeltaConfig) -> list[Step]:
    rng = np.random.default_rng(c.channels)
    tokens, width = sum(LENGTHS), c.channels + c.heads * (c.value_dim + 2)
    x, qkv, w = (
        normal(rng, tokens, width),
        normal(rng, tokens, c.channels),
        normal(rng, c.taps, c.channels),
    )
    a_log, shift = normal(rng, c.heads) - 2, normal(rng, c.heads)
    x[5] *= 40  # gates open and shut
    qkv[7] = 0

    def conv(ops: Ops, state: StateLayer, rows: slice, where: tuple[np.ndarray, ...]) -> F32:
        return ops.causal_conv(x[rows], w, state, *where)

    def rule(ops: Ops, state: StateLayer, rows: slice, where: tuple[np.ndarray, ...]) -> F32:
        return ops.delta_rule(qkv[rows], x[rows], a_log, shift, state, *where)

    return [conv, rule]


@pytest.mark.parametrize("which", [0, 1], ids=["causal_conv", "delta_rule"])
@pytest.mark.parametrize("c", CONFIGS, ids=str)
def test_states(c: DeltaConfig, which: int) -> None:
    """States of blocks that held others' before, in chunks that end inside of blocks, on borders
    and beyond; together and one at a time."""
    step = steps(c)[which]
    whole = run(BASE, c, step, 97, LENGTHS)
    for ours, theirs in zip(whole, run(REF, c, step, 97, LENGTHS), strict=True):
        close(ours, theirs)
    for ops in CPUS.values():
        for chunk in (1, 7, 32, 97):
            for ours, other in zip(whole, run(ops, c, step, chunk, LENGTHS), strict=True):
                same([ours, other])
    [alone] = run(BASE, c, step, 40, LENGTHS[:1])
    same([whole[0], alone])


def test_a_state_left_behind_stays_as_it_was() -> None:
    """Two sequences go on from one block, which neither writes to."""
    c = CONFIGS[1]
    rng = np.random.default_rng(2)
    x, qkv, w = normal(rng, 34, 400), normal(rng, 34, c.channels), normal(rng, c.taps, c.channels)
    gates = normal(rng, c.heads)
    for ops in (REF, *CPUS.values()):
        state = state_of(ops, c)
        first = make_batch([Span([0] * 32, 0, 32, [3])], 1)
        both = make_batch([Span([0] * 33, 32, 33, [3, 5]), Span([0] * 33, 32, 33, [3, 0])], 1)
        outputs = []
        for rows, batch in ((slice(32), first), (slice(32, 34), both), (slice(32, 34), both)):
            where = batch.query_start_loc, batch.seq_lens, batch.block_tables[0]
            outputs.append(
                (
                    ops.causal_conv(x[rows], w, state, *where),
                    ops.delta_rule(qkv[rows], x[rows], gates, gates, state, *where),
                )
            )
        for once, again in zip(*outputs[1:], strict=True):
            np.testing.assert_array_equal(once, again)
        np.testing.assert_array_equal(state.tails[3], x[29:32, : c.channels])


@pytest.mark.parametrize(("heads", "dim"), [(1, 1), (3, 20), (4, 128)])
def test_gates(heads: int, dim: int) -> None:
    rng = np.random.default_rng(dim)
    x, z, gain = normal(rng, 97, heads * dim), normal(rng, 97, heads * dim + 9), normal(rng, dim)
    z[3] *= 90
    outputs = [ops.gated_rms_norm(x, z, 5, gain, 1e-6) for ops in CPUS.values()]
    same(outputs)
    close(outputs[0], REF.gated_rms_norm(x, z, 5, gain, 1e-6))
    same([outputs[0][4:5], BASE.gated_rms_norm(x[4:5], z[4:5], 5, gain, 1e-6)])
    gate = np.ascontiguousarray(z[:, 9:])
    outputs = [ops.sigmoid_gate(x, gate) for ops in CPUS.values()]
    same(outputs)
    close(outputs[0], REF.sigmoid_gate(x, gate))
    same([outputs[0][4:5], BASE.sigmoid_gate(x[4:5], gate[4:5])])


def test_decays_and_betas_are_precise() -> None:
    """A long memory: a decay of 1 - e^-12 a token, over which errors add up."""
    c = DeltaConfig(key_heads=1, heads=16, key_dim=1, value_dim=1, taps=2)
    n = 500
    x = np.zeros((n, c.channels + 3 * c.heads), np.float32)
    x[:, -16:] = np.linspace(-14, 3, 16)
    qkv = np.ones((n, c.channels), np.float32)
    qkv[1:, 2:] = 0  # a value at first, none thereafter
    x[1:, -32:-16] = -80  # and nothing is corrected
    zero = np.zeros(16, np.float32)
    batch = make_batch([Span([0] * n, 0, n, range(16))], 1)
    where = batch.query_start_loc, batch.seq_lens, batch.block_tables[0]
    ours, theirs = (
        ops.delta_rule(qkv, x, zero, zero, state_of(ops, c), *where) for ops in (BASE, REF)
    )
    np.testing.assert_allclose(ours[:, :10], theirs[:, :10], rtol=1e-4)
