"""Ops on several streams, and what else Gemma 3n adds. As in sweeps.py: close to `ref`, and equal to
the bit across instruction sets, threads and rows."""

from __future__ import annotations

import numpy as np
import pytest

from elinvar.ops import KVLayer, Ops
from sweeps import BASE, CPUS, KINDS, REF, close, normal, same, spec, weight

SHAPES = [(1, 1), (3, 17), (97, 576)]


@pytest.mark.parametrize("shape", SHAPES)
def test_mul(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    x, wide = normal(rng, *shape), normal(rng, shape[0], shape[1] + 9)
    same([x * wide[:, 5 : 5 + shape[1]], *(ops.mul(x, wide, 5) for ops in CPUS.values())])
    same([x * wide[:1, : shape[1]], *(ops.mul(x, wide[:1], 0) for ops in CPUS.values())])


@pytest.mark.parametrize(("streams", "outputs"), [(1, 1), (4, 4), (5, 4), (16, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_mix(shape: tuple[int, int], streams: int, outputs: int) -> None:
    rng = np.random.default_rng(2)
    xs = [normal(rng, *shape) for _ in range(streams)]
    coefs = normal(rng, shape[0], streams * outputs)
    mixed = [ops.mix(xs, coefs) for ops in CPUS.values()]
    same(mixed)
    assert mixed[0].shape == (outputs, *shape)
    close(mixed[0], REF.mix(xs, coefs))
    row = slice(shape[0] // 2, shape[0] // 2 + 1)
    alone = BASE.mix([x[row] for x in xs], coefs[row])
    same([np.ascontiguousarray(mixed[0][:, row]), alone])


@pytest.mark.parametrize("shape", SHAPES)
def test_sparsify(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    x = normal(rng, *shape) * 3 + 1
    outputs = [ops.sparsify(x, 1.6448536) for ops in CPUS.values()]
    same(outputs)
    close(outputs[0], REF.sparsify(x, 1.6448536))
    assert (outputs[0] >= 0).all()
    if shape[1] > 100:
        assert 0.02 < (outputs[0] > 0).mean() < 0.08
    same([outputs[0][-1:].copy(), BASE.sparsify(x[-1:], 1.6448536)])


@pytest.mark.parametrize("shape", SHAPES)
def test_match_rms(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    x, y = normal(rng, *shape), normal(rng, *shape) * 7
    x[0] *= 1e-4  # below what is divided by
    outputs = [ops.match_rms(x, y) for ops in CPUS.values()]
    same(outputs)
    close(outputs[0], REF.match_rms(x, y))
    same([outputs[0][-1:].copy(), BASE.match_rms(x[-1:], y[-1:])])


def test_queries_alone_and_normed_values() -> None:
    """Queries are those of rope_write to the bit; values in the cache have a norm of their own."""
    rng = np.random.default_rng(5)
    rows, heads, kv_heads, dim = 40, 6, 2, 40
    qkv, table = normal(rng, rows, (heads + 2 * kv_heads) * dim), normal(rng, 64, 24)
    positions = rng.permutation(64)[:rows].astype(np.int32)
    slots = np.arange(7, 7 + rows, dtype=np.int32)
    gain = normal(rng, dim)

    def run(ops: Ops) -> tuple[np.ndarray, KVLayer]:
        [kv] = ops.kv_layers(spec(dim, "f32"), 2)
        args = qkv, positions, table, kv, slots, heads, gain, gain, 1e-6
        return ops.rope_write(*args, v_gain_D=gain), kv

    expected, results = run(REF), [run(ops) for ops in CPUS.values()]
    close(results[0][1].v, expected[1].v)
    close(results[0][1].k, expected[1].k)
    same([kv.v for _, kv in results])
    q = np.ascontiguousarray(qkv[:, : heads * dim])
    alone = [ops.rope_queries(q, positions, table, heads, gain, 1e-6) for ops in CPUS.values()]
    same([results[0][0], *alone])
    close(alone[0], REF.rope_queries(q, positions, table, heads, gain, 1e-6))


@pytest.mark.parametrize("kind", KINDS)
def test_embed_of_an_id_without_a_row(kind: str) -> None:
    rng = np.random.default_rng(6)
    w = weight(rng, kind, 21, 64)  # type: ignore[arg-type]
    ids = np.array([3, 21, 20, 1000], np.int32)
    expected = REF.embed(np.array([3, 0, 20, 0], np.int32), w, 2.0)
    for ops in (REF, *CPUS.values()):
        close(ops.embed(ids, w, 2.0), expected)
