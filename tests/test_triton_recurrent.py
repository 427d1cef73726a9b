"""Ops of recurrent layers for GPUs, under Triton's interpreter: close to `ref`, and to the bit the same
in chunks and at once, decoded and prompted, alone and in a batch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from elinvar.base.config import DeltaConfig, KVSpec  # noqa: E402
from elinvar.ops.triton import recurrent  # noqa: E402
from elinvar.ops.triton.provider import TritonOps  # noqa: E402
from gpu_caches import torched  # noqa: E402
from helpers import Span, make_batch  # noqa: E402
from sweeps import REF, close, normal, same  # noqa: E402
from test_ops_recurrent import CONFIGS, run, steps  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:overflow")  # of e^x: sigmoids are 0 there
OPS = TritonOps(torch.float32)
LENGTHS = [1, 2, 3, 34]


class OnArrays:
    """The provider's ops of states, of arrays."""

    kv_layers = staticmethod(OPS.kv_layers)

    def causal_conv(self, x: np.ndarray, w: np.ndarray, state: Any, *where: np.ndarray) -> Any:
        return OPS.causal_conv(*torched(x), w, state, *torched(*where)).numpy()

    def delta_rule(self, qkv: np.ndarray, x: np.ndarray, a_log: Any, shift: Any, state: Any,
                   *where: np.ndarray) -> Any:  # fmt: skip
        return OPS.delta_rule(*torched(qkv, x), a_log, shift, state, *torched(*where)).numpy()


ARRAYS: Any = OnArrays()
MORE = [
    DeltaConfig(key_heads=1, heads=2, key_dim=5, value_dim=3, taps=3),
    DeltaConfig(key_heads=1, heads=1, key_dim=5, value_dim=3, taps=1),
    DeltaConfig(key_heads=1, heads=1, key_dim=3, value_dim=17, taps=12),
]


@pytest.mark.parametrize("which", [0, 1], ids=["causal_conv", "delta_rule"])
@pytest.mark.parametrize("c", [*CONFIGS, *MORE], ids=str)
def test_states(c: DeltaConfig, which: int) -> None:
    """As test_ops_recurrent: blocks that held others' states, chunks that end anywhere."""
    step = steps(c)[which]
    whole = run(ARRAYS, c, step, 40, LENGTHS)
    for ours, theirs in zip(whole, run(REF, c, step, 40, LENGTHS), strict=True):
        close(ours, theirs, 5e-6)
    for chunk in (1, 7):
        for ours, other in zip(whole, run(ARRAYS, c, step, chunk, LENGTHS), strict=True):
            same([ours, other])
    for count in (1, 3):
        for ours, other in zip(whole, run(ARRAYS, c, step, 2, LENGTHS[:count]), strict=False):
            same([ours, other])


def test_programs_share_value_dims_and_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    c = CONFIGS[1]
    cuts = [[run(ARRAYS, c, step, 20, [9, 2]) for step in steps(c)]]
    monkeypatch.setattr(recurrent, "_COLUMNS", 8)
    monkeypatch.setattr(recurrent, "_CHANNELS", 64)
    cuts.append([run(ARRAYS, c, step, 20, [9, 2]) for step in steps(c)])
    for ours, theirs in zip(*([a for op in cut for a in op] for cut in cuts), strict=True):
        close(ours, theirs)


def some_state(c: DeltaConfig, num_blocks: int) -> Any:
    [state] = OPS.kv_layers(KVSpec("linear", (0,), 1, 8, state=c), num_blocks)
    for part, seed in ((state.tails, 0), (state.states, 1)):
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(seed)))
    return state


def both(c: DeltaConfig, state: Any, x: np.ndarray, *where: np.ndarray) -> list[np.ndarray]:
    """Of each op, with numbers that are the same for all calls."""
    rng = np.random.default_rng(4)
    w, gates = normal(rng, c.taps, c.channels), normal(rng, c.heads)
    qkv = np.ascontiguousarray(x[:, : c.channels])
    return [
        ARRAYS.causal_conv(x, w, state, *where),
        ARRAYS.delta_rule(qkv, x, gates, gates, state, *where),
    ]


@settings(max_examples=10)
@given(st.sets(st.integers(1, 35), max_size=4), st.integers(1, 3), st.sampled_from([2, 4]))
def test_any_chunks(cuts: set[int], other: int, block: int) -> None:
    """Of 36 tokens, beside a sequence that begins; the state moves to another block at 32, or stays."""
    c, x = MORE[0], normal(np.random.default_rng(5), 36, 50)
    whole, state = some_state(c, 5), some_state(c, 5)
    batch = make_batch([Span([0] * 36, 0, 36, [2, 3])], 1)
    where = batch.query_start_loc, batch.seq_lens, batch.block_tables[0]
    expected, found = both(c, whole, x, *where), []
    for start, stop in pairwise([0, *sorted(cuts), 36]):
        near = Span([0] * other, 0, other, [1, 0])
        batch = make_batch([near, Span([0] * 36, start, stop, [2, block])], 1)
        where = batch.query_start_loc, batch.seq_lens, batch.block_tables[0]
        rows = np.concatenate([np.resize(x, (other, 50)), x[start:stop]])
        found.append([out[other:] for out in both(c, state, rows, *where)])
    for ours, parts in zip(expected, zip(*found, strict=True), strict=True):
        same([ours, np.concatenate(parts)])
    values = slice(c.value_dim)  # what pads them may differ
    assert torch.equal(state.states[block, ..., values], whole.states[3, ..., values])
    assert torch.equal(state.tails[block], whole.tails[3])


def test_a_state_left_behind_stays_as_it_was() -> None:
    """Two sequences go on from one block, of which neither writes to it; a third stays in place."""
    c, x = CONFIGS[1], normal(np.random.default_rng(2), 3, 400)
    state, ids = some_state(c, 6), [0] * 34
    kept = state.tails[3].clone(), state.states[3].clone()
    spans = [Span(ids, 32, 33, [3, 5]), Span(ids, 32, 33, [3, 0]), Span(ids, 33, 34, [2, 1])]
    batch = make_batch(spans, 1)
    where = batch.query_start_loc, batch.seq_lens, batch.block_tables[0]
    both(c, state, np.concatenate([x[:1], x[:1], x[2:]]), *where)
    assert torch.equal(state.tails[3], kept[0]) and torch.equal(state.states[3], kept[1])
    assert torch.equal(state.states[5], state.states[0])
    assert torch.equal(state.tails[5, -1], torch.from_numpy(x[0, : c.channels]))
    fresh = some_state(c, 6)
    assert torch.equal(state.states[2], fresh.states[2])
    assert torch.equal(state.tails[1, :-1], fresh.tails[1, 1:])


def test_states_move_as_the_bytes_that_they_are_on_a_cpu() -> None:
    spec = KVSpec("linear", (0, 2), 1, 8, state=CONFIGS[1])
    host, device = REF.kv_layers(spec, 2), OPS.kv_layers(spec, 3)
    for seed, layer in enumerate(host):
        rng = np.random.default_rng(seed)
        layer.tails[1] = normal(rng, *layer.tails[1].shape)
        layer.states[1] = normal(rng, *layer.states[1].shape)
    kept = bytes(host[0].blocks.read(1))

    def fill(to: memoryview) -> bool:
        to[:] = kept
        return True

    assert device[0].blocks.write(2, fill)
    device[0].blocks.copy(2, 0)
    assert bytes(device[1].blocks.read(0)) == kept
    for ours, theirs in zip(device, host, strict=True):
        np.testing.assert_array_equal(ours.tails[0].numpy(), theirs.tails[1])
        np.testing.assert_array_equal(ours.states[0].numpy(), theirs.states[1])


def test_what_fills_a_batch_up_touches_no_state() -> None:
    """Sequences without tokens, and tokens of no sequence (run/padding.py)."""
    c, x = CONFIGS[1], normal(np.random.default_rng(3), 9, 400)
    states = [some_state(c, 4) for _ in range(2)]
    alone = np.array([0, 5], np.int32), np.array([5], np.int32), np.array([[2]], np.int32)
    starts, lens = np.array([0, 5, 5, 5], np.int32), np.array([5, 0, 0], np.int32)
    filled = starts, lens, np.array([[2], [3], [3]], np.int32)
    outputs = [both(c, states[0], x[:5], *alone), both(c, states[1], x, *filled)]
    for one, other in zip(*outputs, strict=True):
        same([one, other[:5]])
    assert torch.equal(states[0].states, states[1].states)
    assert torch.equal(states[0].tails, states[1].tails)


def test_decays_and_betas_are_precise() -> None:
    """A long memory: a decay of 1 - e^-12 a token, over which errors add up."""
    c = DeltaConfig(key_heads=1, heads=4, key_dim=1, value_dim=1, taps=2)
    n = 90
    x = np.zeros((n, c.channels + 3 * c.heads), np.float32)
    x[:, -4:] = -14, -12, -9, -6
    qkv = np.ones((n, c.channels), np.float32)
    qkv[1:, 2:] = 0  # a value at first, none thereafter
    x[1:, -8:-4] = -80  # and nothing is corrected
    zero = np.zeros(4, np.float32)
    batch = make_batch([Span([0] * n, 0, n, range(4))], 1)
    where = batch.query_start_loc, batch.seq_lens, batch.block_tables[0]
    ours = ARRAYS.delta_rule(qkv, x, zero, zero, some_state(c, 4), *where)
    [state] = REF.kv_layers(KVSpec("linear", (0,), 1, 8, state=c), 4)
    theirs = REF.delta_rule(qkv, x, zero, zero, state, *where)
    np.testing.assert_allclose(ours, theirs, rtol=5e-5)
