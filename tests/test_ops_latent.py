"""Ops of latent attention, swept as sweeps.py says."""

from __future__ import annotations

import numpy as np
import pytest

from elinvar.base.config import KVSpec
from elinvar.ops.layout import WeightKind
from sweeps import BASE, CPUS, KINDS, REF, close, normal, same, spec, weight


def angles(num_positions: int, dim: int) -> np.ndarray:
    turns = np.arange(num_positions)[:, None] * np.geomspace(1, 0.01, dim // 2)
    return np.concatenate([np.cos(turns), np.sin(turns)], 1).astype(np.float32)


def latent_spec(dtype: str, rank: int, rope: int) -> KVSpec:
    return KVSpec("full", (0, 1), 1, rank + rope, dtype, latent_dim=rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("nope", "rope", "rank"), [(32, 8, 16), (128, 64, 512), (64, 20, 48)])
def test_latent_query(kind: WeightKind, nope: int, rope: int, rank: int) -> None:
    rng = np.random.default_rng(rank)
    heads, table = 3, angles(64, rope)
    w, q = weight(rng, kind, heads * rank, nope), normal(rng, 41, heads * (nope + rope))
    positions = rng.integers(0, 64, 41).astype(np.int32)
    whole = BASE.latent_query(q, w, positions, table, heads)
    close(whole, REF.latent_query(q, w, positions, table, heads), 3e-6)
    for rows in (1, 2, 8, 41):
        args = w, positions[:rows].copy(), table, heads
        outputs = [ops.latent_query(q[:rows].copy(), *args) for ops in CPUS.values()]
        same([np.ascontiguousarray(whole[:rows]), *outputs])


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "int8"])
@pytest.mark.parametrize(("rank", "rope"), [(16, 8), (512, 64), (48, 20)])
def test_latent_write(dtype: str, rank: int, rope: int) -> None:
    rng = np.random.default_rng(rank)
    x, gain, table = normal(rng, 57, rank + rope), normal(rng, rank), angles(64, rope)
    x[0, -3] = 1e9  # f16 saturates
    positions = rng.permutation(64)[:57].astype(np.int32)
    slots = np.arange(7, 103, dtype=np.int32) % 96  # a prompt's, then rows of others
    slots[40:] = rng.permutation(slots[40:])

    def run(ops: object) -> list[np.ndarray]:
        first, kv = ops.kv_layers(latent_spec(dtype, rank, rope), 3)  # type: ignore[attr-defined]
        ops.latent_write(x, positions, table, kv, slots[:57], gain, 1e-6)  # type: ignore[attr-defined]
        assert not first.k.any(), "layers share no memory"
        assert kv.v.shape == (3, 1, 32, rank) and np.shares_memory(kv.k, kv.v)
        return [kv.k] if kv.k_scales is None else [kv.k, kv.k_scales]

    expected, results = run(REF), [run(ops) for ops in CPUS.values()]
    for outputs in zip(*results, strict=True):
        same(list(outputs))
    for got, want in zip(results[0], expected, strict=True):
        if dtype == "bf16":
            got, want = ((a.astype(np.uint32) << 16).view(np.float32) for a in (got, want))
        assert np.isfinite(got).all()
        close(got.astype(np.float32), want.astype(np.float32), 8e-3 if dtype == "bf16" else 1e-3)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "int8"])
@pytest.mark.parametrize(
    ("heads", "rank", "rope", "length"),
    [(4, 16, 8, 100), (16, 512, 64, 70), (37, 48, 20, 100), (3, 32, 16, 2100)],
)
def test_attention_over_latents(dtype: str, heads: int, rank: int, rope: int, length: int) -> None:
    """As with the same latents stored as keys and, once more, as values."""
    rng = np.random.default_rng(length + rank)
    blocks, dim = -(-length // 32), rank + rope
    kv = BASE.kv_layers(latent_spec(dtype, rank, rope), blocks)[1]
    slots = np.arange(32 * blocks, dtype=np.int32)
    x, gain = normal(rng, 32 * blocks, dim), normal(rng, rank)
    zeros = np.zeros(32 * blocks, np.int32)
    BASE.latent_write(x, zeros, angles(1, rope), kv, slots, gain, 1e-6)
    table = rng.permutation(blocks).astype(np.int32)[None]
    count = min(length, 50)
    q, positions = normal(rng, count, heads, dim), np.arange(length - count, length, dtype=np.int32)
    starts, seq_lens = np.array([0, count], np.int32), np.array([length], np.int32)
    args = starts, seq_lens, table, positions, dim**-0.5, None
    outputs = [ops.attention(q, kv, *args) for ops in CPUS.values()]
    assert outputs[0].shape == (count, heads * rank)
    close(outputs[0], REF.attention(q, kv, *args), 3e-6)
    same(outputs)
    if dtype != "int8":  # whose keys are turned where they are not values
        [twice] = BASE.kv_layers(spec(dim, dtype, 1), blocks)
        twice.k[...] = kv.k
        twice.v[..., :dim] = kv.k.swapaxes(-1, -2)
        stored = BASE.attention(q, twice, *args).reshape(count, heads, dim)[..., :rank]
        same([outputs[0], np.ascontiguousarray(stored)])
    for row in (0, count - 1):  # alone, as in decode
        p = positions[row : row + 1]
        one = np.array([0, 1], np.int32), p + 1, table, p, dim**-0.5, None
        same(
            [
                outputs[0][row : row + 1],
                *(o.attention(q[row : row + 1], kv, *one) for o in CPUS.values()),
            ]
        )
