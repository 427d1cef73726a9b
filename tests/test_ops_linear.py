"""Ops that multiply by matrices, swept as sweeps.py says."""

from __future__ import annotations

import numpy as np
import pytest

from elinvar.ops import load_provider
from elinvar.ops.layout import (
    QUANTISED,
    WeightKind,
    pack_float,
    pack_q4,
    pack_q5,
    pack_q8,
    packed_bytes,
    unpack,
)
from sweeps import BASE, CPUS, KINDS, LEVELS, REF, ROWS, close, normal, same, weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "k"), [(16, 32), (1, 32), (40, 96), (131, 576), (257, 160), (20, 1088)]
)
def test_linear(kind: WeightKind, n: int, k: int) -> None:
    rng = np.random.default_rng(n * k)
    ws = [weight(rng, kind, n, k), weight(rng, kind, 24, k)]
    x = normal(rng, max(ROWS), k)
    x[3, :32] = 0
    whole = BASE.linear(x, ws)
    close(whole, REF.linear(x, ws), 3e-6)
    for rows in ROWS:
        outputs = [ops.linear(x[:rows].copy(), ws) for ops in CPUS.values()]
        same([np.ascontiguousarray(whole[:rows]), *outputs])
    alone = np.concatenate([BASE.linear(x[i : i + 1], ws) for i in range(len(x))])
    same([whole, alone])


@pytest.mark.parametrize("k", [1, 7, 33, 100])
def test_linear_float_takes_any_k(k: int) -> None:
    rng = np.random.default_rng(k)
    w, x = weight(rng, "f32", 35, k), normal(rng, 5, k)
    outputs = [ops.linear(x, [w]) for ops in CPUS.values()]
    close(outputs[0], REF.linear(x, [w]))
    same(outputs)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_linear_float_over_blocks_of_k_and_tiles_of_rows(kind: WeightKind) -> None:
    """More k than one block of panels takes, so that chains rest in `out` between blocks; an odd
    panel and a cut one at the end; every height of tile."""
    rng = np.random.default_rng(11)
    w, x = weight(rng, kind, 41, 4200), normal(rng, 19, 4200)
    whole = BASE.linear(x, [w])
    close(whole, REF.linear(x, [w]), 5e-6)
    for rows in range(1, 20):
        outputs = [ops.linear(x[:rows].copy(), [w]) for ops in CPUS.values()]
        same([np.ascontiguousarray(whole[:rows]), *outputs])


@pytest.mark.parametrize("kind", QUANTISED)
def test_integer_sums_hold_the_largest_codes(kind: WeightKind) -> None:
    """All codes and all activations at the end of their range: no sum of a kernel may saturate."""
    scales = np.full((17, 3), 2.0**-6, np.float16)
    codes = np.full((17, 96), {"q4": 15, "q5": 31, "q8": 127}[kind], np.uint8)
    w = (
        pack_q8(codes.view(np.int8), scales)
        if kind == "q8"
        else {"q4": pack_q4, "q5": pack_q5}[kind](codes, scales, scales)
    )
    x = np.repeat(np.float32([[127], [-127]]), 96, axis=1)  # what it is rounded to, too
    outputs = [ops.linear(x, [w]) for ops in CPUS.values()]
    same([REF.linear(x, [w]), *outputs])


def test_linear_mixes_kinds() -> None:
    rng = np.random.default_rng(5)
    ws = [weight(rng, kind, 33, 64) for kind in KINDS]
    x = normal(rng, 9, 64)
    outputs = [ops.linear(x, ws) for ops in CPUS.values()]
    close(outputs[0], REF.linear(x, ws), 3e-6)
    same(outputs)


def test_no_op_leans_on_the_thread_s_float_mode() -> None:
    """A library built with -ffast-math leaves its thread flushing denormals to zero."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    w = pack_float("f32", normal(rng, 200, 64) * np.float32(1e-20))
    x = normal(rng, 3, 64) * np.float32(1e-19)
    ids = np.arange(9, dtype=np.int32)
    two = CPUS[LEVELS[0], 2]
    expected = BASE.linear(x, [w]), BASE.embed(ids, w, 1e-20)
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush denormals on this machine")
    try:
        born_here = load_provider("cpu", 2)
        for ops in (BASE, two, born_here):
            same([expected[0], ops.linear(x, [w])])
            same([expected[1], ops.embed(ids, w, 1e-20)])
        assert np.float32(1e-38) * np.float32(1e-3) == 0, "the caller's mode is restored"
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("kind", QUANTISED)
def test_linear_of_what_is_not_finite(kind: WeightKind) -> None:
    """Rounded to int8, infinities and NaN saturate: the same on every instruction set."""
    rng = np.random.default_rng(4)
    w, x = weight(rng, kind, 40, 96), normal(rng, 40, 96)
    for value in (np.nan, np.inf, -np.inf, 3e38):
        x[rng.integers(0, 40, 20), rng.integers(0, 96, 20)] = value
    with np.errstate(all="ignore"):
        expected = REF.linear(x, [w])
    outputs = [ops.linear(x, [w]) for ops in CPUS.values()]
    same(outputs)
    fits = np.isfinite(outputs[0])
    assert fits.any(axis=0).all()
    assert np.allclose(outputs[0][fits], expected[fits], rtol=1e-3)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("kind", [*QUANTISED, "f32"])
def test_gated_linear(kind: WeightKind, activation: str) -> None:
    rng = np.random.default_rng(7)
    gate, up = weight(rng, kind, 83, 96), weight(rng, kind, 83, 96)
    x = normal(rng, 97, 96) * 4
    whole = BASE.gated_linear(x, gate, up, activation)
    close(whole, REF.gated_linear(x, gate, up, activation), 5e-6)
    for rows in ROWS:
        outputs = [ops.gated_linear(x[:rows].copy(), gate, up, activation) for ops in CPUS.values()]
        same([np.ascontiguousarray(whole[:rows]), *outputs])


def test_activations_at_the_ends_of_the_range() -> None:
    eye = pack_float("f32", np.ones((1, 1), np.float32))
    x = np.array([[-1e30], [-200], [-20], [-0.0], [1e-30], [20], [1e4]], np.float32)
    for activation in ("silu", "gelu_tanh"):
        outputs = [ops.gated_linear(x, eye, eye, activation) for ops in CPUS.values()]
        same(outputs)
        assert np.isfinite(outputs[0][1:]).all()
        close(outputs[0][1:], REF.gated_linear(x, eye, eye, activation)[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_embed(kind: WeightKind) -> None:
    rng = np.random.default_rng(3)
    w = weight(rng, kind, 75, 96)
    ids = rng.integers(0, 75, 97).astype(np.int32)
    expected = unpack(w)[ids] * np.float32(1.5)
    same([expected, *(ops.embed(ids, w, 1.5) for ops in CPUS.values())])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_size(kind: WeightKind) -> None:
    w = weight(np.random.default_rng(0), kind, 21, 96)
    assert w.nbytes == packed_bytes(kind, (21, 96))
    assert w.data.ctypes.data % 64 == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("heads", "n", "k"), [(1, 16, 32), (3, 48, 64), (16, 32, 128), (5, 160, 32)]
)
def test_head_linear(kind: WeightKind, heads: int, n: int, k: int) -> None:
    rng = np.random.default_rng(n * heads)
    w, x = weight(rng, kind, heads * n, k), normal(rng, 97, heads * k)
    whole = BASE.head_linear(x, w, heads)
    close(whole, REF.head_linear(x, w, heads), 3e-6)
    for rows in ROWS:
        outputs = [ops.head_linear(x[:rows].copy(), w, heads) for ops in CPUS.values()]
        same([np.ascontiguousarray(whole[:rows]), *outputs])
    # The arithmetic is that of linear.
    first = BASE.linear(np.ascontiguousarray(x[:, :k]), [w])[:, :n]
    same([np.ascontiguousarray(first), np.ascontiguousarray(whole[:, :n])])
