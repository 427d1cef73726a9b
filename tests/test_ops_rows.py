"""Row-wise ops of the cpu provider: norms, biases, activations, caps, partial rotation. As in
sweeps.py: close to `ref`, and equal to the bit across instruction sets, threads and rows."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest

from elinvar.base.config import Activation
from elinvar.ops import KVLayer, Ops
from elinvar.ops.layout import WeightKind, pack_float
from sweeps import BASE, CPUS, KINDS, REF, ROWS, close, normal, same, spec, weight

ACTIVATIONS = get_args(Activation)
DIMS = [1, 16, 17, 64, 100, 576]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(16, 32), (1, 32), (131, 576)])
def test_linear_with_a_bias(kind: WeightKind, n: int, k: int) -> None:
    """The bias is added once, after the chains."""
    rng = np.random.default_rng(n * k)
    ws = [weight(rng, kind, m, k) for m in (n, 40, 24)]
    x, bias = normal(rng, max(ROWS), k), normal(rng, n + 64) * 3
    whole = BASE.linear(x, ws) + bias
    close(whole, REF.linear(x, ws, bias), 3e-6)
    for rows in ROWS:
        outputs = [ops.linear(x[:rows].copy(), ws, bias) for ops in CPUS.values()]
        same([np.ascontiguousarray(whole[:rows]), *outputs])


@pytest.mark.parametrize("dim", DIMS)
def test_norms(dim: int) -> None:
    rng = np.random.default_rng(dim)
    x, y, gain = normal(rng, 97, dim), normal(rng, 97, dim), normal(rng, dim)
    close(BASE.rms_norm(x, gain, 1e-5), REF.rms_norm(x, gain, 1e-5))
    close(BASE.add_rms_norm(x, y, gain, 1e-5)[1], REF.add_rms_norm(x, y, gain, 1e-5)[1])
    same([ops.rms_norm(x, gain, 1e-5) for ops in CPUS.values()])
    same([ops.add_rms_norm(x, y, gain, 1e-5)[1] for ops in CPUS.values()])
    same([x + y, *(ops.add_rms_norm(x, y, gain, 1e-5)[0] for ops in CPUS.values())])
    same([x + y, *(ops.add(x, y) for ops in CPUS.values())])
    same([BASE.rms_norm(x, gain, 1e-5)[5:6], BASE.rms_norm(x[5:6], gain, 1e-5)])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_layer_norms(dim: int, bias: bool) -> None:
    rng = np.random.default_rng(dim)
    x, y, gain = normal(rng, 97, dim) + 3, normal(rng, 97, dim), normal(rng, dim)
    b = normal(rng, dim) if bias else None
    x[4] = 7  # without variance
    outputs = [ops.layer_norm(x, gain, b, 1e-5) for ops in CPUS.values()]
    same(outputs)
    close(outputs[0], REF.layer_norm(x, gain, b, 1e-5))
    sums, norms = zip(
        *(ops.add_layer_norm(x, y, gain, b, 1e-5) for ops in CPUS.values()), strict=True
    )
    same([x + y, *sums])
    same([BASE.layer_norm(x + y, gain, b, 1e-5), *norms])
    same([outputs[0][5:6], BASE.layer_norm(x[5:6], gain, b, 1e-5)])


def test_layer_norm_of_rows_far_from_zero() -> None:
    """The variance is that of the centred values: it survives a mean a thousand times as large."""
    rng = np.random.default_rng(8)
    x, ones = normal(rng, 3, 100) + 1000, np.ones(100, np.float32)
    close(BASE.layer_norm(x, ones, None, 1e-5), REF.layer_norm(x, ones, None, 1e-5), 5e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (97, 400)])
def test_activate(activation: Activation, shape: tuple[int, int]) -> None:
    """The last shape is of several pieces, the last one cut."""
    rng = np.random.default_rng(9)
    x = normal(rng, *shape) * 4
    outputs = [ops.activate(x, activation) for ops in CPUS.values()]
    same(outputs)
    close(outputs[0], REF.activate(x, activation), 1e-6)
    rows = [BASE.activate(x[i : i + 1], activation) for i in range(len(x))]
    same([outputs[0], np.concatenate(rows)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_linear_activates_likewise(activation: Activation) -> None:
    rng = np.random.default_rng(10)
    x, gate, up = normal(rng, 5, 40) * 3, weight(rng, "f32", 83, 40), weight(rng, "f32", 83, 40)
    ups = BASE.linear(x, [up])
    if activation == "swiglu_oai":
        ups = np.clip(ups, -7, 7) + np.float32(1)
    expected = BASE.activate(BASE.linear(x, [gate]), activation) * ups
    same([expected, *(ops.gated_linear(x, gate, up, activation) for ops in CPUS.values())])


def test_gelu_is_exact_along_its_range() -> None:
    """Its factor (1 + erf) / 2 within 1.5e-7 everywhere; what is far below zero comes to nothing."""
    x = np.concatenate([np.linspace(-14, 14, 40_001), [-1e-30, 0, 1e-30]]).astype(np.float32)
    y = BASE.activate(x[None], "gelu")[0].astype(np.float64)
    true = np.array([v / 2 * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64)])
    assert (np.abs(y - true) <= 1.5e-7 * np.abs(x)).all()
    far = np.array([[-1e30, -1e4, -50, 50, 1e4, 1e30]], np.float32)
    outputs = [ops.activate(far, "gelu") for ops in CPUS.values()]
    same(outputs)
    assert outputs[0].tolist() == [[0, 0, 0, *far[0, 3:].tolist()]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (97, 400)])
def test_scale_and_softcap(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(11)
    x = normal(rng, *shape) * 40
    same([x * np.float32(0.3), *(ops.scale(x, 0.3) for ops in CPUS.values())])
    outputs = [ops.softcap(x, 30.0) for ops in CPUS.values()]
    same(outputs)
    expected = REF.softcap(x, 30.0)
    assert (np.abs(outputs[0] - expected) <= 5e-7 * np.abs(expected)).all()


@pytest.mark.parametrize("shape", [(1, 1, 17), (40, 6, 24)])
def test_scale_heads(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(13)
    q, factors = normal(rng, *shape), normal(rng, 64)
    positions = rng.permutation(64)[: len(q)].astype(np.int32)
    expected = q * factors[positions][:, None, None]
    same([expected, *(ops.scale_heads(q, positions, factors) for ops in CPUS.values())])


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), [(8, 0), (8, 4), (80, 32), (64, 34), (24, 22)])
def test_rope_write_of_a_part_of_each_head(dim: int, rotary: int, gains: bool) -> None:
    """The rotated part is as a smaller head's would be, the rest is only normalised."""
    rng = np.random.default_rng(dim)
    rows, heads = 40, 6
    qkv, table = normal(rng, rows, (heads + 4) * dim), normal(rng, 64, rotary)
    positions = rng.permutation(64)[:rows].astype(np.int32)
    slots = np.arange(7, 7 + rows, dtype=np.int32)
    q_gain, k_gain = (normal(rng, dim), normal(rng, dim)) if gains else (None, None)

    def run(ops: Ops) -> tuple[np.ndarray, KVLayer]:
        [kv] = ops.kv_layers(spec(dim, "f32"), 2)
        return ops.rope_write(qkv, positions, table, kv, slots, heads, q_gain, k_gain, 1e-6), kv

    expected, results = run(REF), [run(ops) for ops in CPUS.values()]
    close(results[0][0], expected[0])
    close(results[0][1].k, expected[1].k)
    same([q for q, _ in results])
    same([kv.k for _, kv in results])
    same([kv.v for _, kv in results])
    if not gains:
        rest = qkv.reshape(rows, heads + 4, dim)[:, :heads, rotary:]
        same([np.ascontiguousarray(rest), np.ascontiguousarray(results[0][0][..., rotary:])])


def test_the_bias_of_one_matrix_may_not_reach_another() -> None:
    """Matrices of a column or two, so that panels of many lie in one chunk of work."""
    rng = np.random.default_rng(12)
    ws = [pack_float("f32", normal(rng, n, 32)) for n in (1, 2, 17, 1, 33)]
    x, bias = normal(rng, 3, 32), np.arange(54, dtype=np.float32)
    for ops in CPUS.values():
        same([ops.linear(x, ws) + bias, ops.linear(x, ws, bias)])


def test_rows_side_by_side() -> None:
    rng = np.random.default_rng(4)
    for rows in ROWS:
        x, y = normal(rng, rows, 17), normal(rng, rows, 5)
        same([REF.concat(x, y), *(ops.concat(x, y) for ops in CPUS.values())])
    same([REF.concat(x, y), BASE.record(lambda: BASE.concat(x, y))()])


@pytest.mark.parametrize("dim", DIMS)
def test_pool(dim: int) -> None:
    """Sums of spans, one of which is empty, and of each span alone."""
    rng = np.random.default_rng(dim)
    x, weights = normal(rng, 200, dim), normal(rng, 200)
    starts = np.array([0, 1, 1, 130, 200], np.int32)
    outputs = [ops.pool(x, starts, weights) for ops in CPUS.values()]
    same(outputs)
    close(outputs[0], REF.pool(x, starts, weights))
    alone = BASE.pool(x[1:130].copy(), np.array([0, 129], np.int32), weights[1:130].copy())
    same([outputs[0][2:3], alone])
