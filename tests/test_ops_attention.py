"""Attention, and the op that writes its cache, swept as sweeps.py says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sweeps import BASE, CPUS, REF, close, normal, same, spec


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "int8"])
@pytest.mark.parametrize("dim", [8, 64, 80])
@pytest.mark.parametrize("gains", ["none", "heads", "whole"])
def test_rope_write(dtype: str, dim: int, gains: str) -> None:
    rng = np.random.default_rng(dim)
    rows, heads, s = 57, 6, spec(dim, dtype)
    qkv = normal(rng, rows, (heads + 4) * dim)
    qkv[0, -3] = 1e9  # f16 saturates
    positions = rng.permutation(64)[:rows].astype(np.int32)
    slots = np.arange(7, 103, dtype=np.int32) % 96  # a prompt's, then rows of others
    slots[40:] = rng.permutation(slots[40:])
    slots = slots[:rows]
    angles = np.arange(64)[:, None] * np.geomspace(1, 0.01, dim // 2)
    table = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    sizes = {"none": None, "heads": (dim, dim), "whole": (heads * dim, 2 * dim)}[gains]
    q_gain, k_gain = [normal(rng, size) for size in sizes] if sizes else (None, None)

    def run(ops: object) -> list[np.ndarray]:
        [kv] = ops.kv_layers(s, 3)  # type: ignore[attr-defined]
        q = ops.rope_write(qkv, positions, table, kv, slots, heads, q_gain, k_gain, 1e-6)  # type: ignore[attr-defined]
        return [q, kv.k, kv.v, *(x for x in (kv.k_scales, kv.v_scales) if x is not None)]

    expected, results = run(REF), [run(ops) for ops in CPUS.values()]
    close(results[0][0], expected[0])
    for outputs in zip(*results, strict=True):
        same(list(outputs))
    for got, want in zip(results[0][1:], expected[1:], strict=True):
        if dtype == "bf16":
            got, want = ((a.astype(np.uint32) << 16).view(np.float32) for a in (got, want))
        assert np.isfinite(got).all()
        close(got.astype(np.float32), want.astype(np.float32), 8e-3 if dtype == "bf16" else 1e-3)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "int8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "length"),
    [
        (9, 3, 64, None, 100),
        (4, 1, 256, 40, 100),
        (2, 2, 8, None, 33),
        (4, 2, 24, 7, 65),
        (3, 1, 16, None, 2100),
        (2, 1, 16, 1000, 2100),
        (2, 1, 16, 100, 1060),
    ],
)
def test_attention(
    dtype: str, heads: int, kv_heads: int, dim: int, window: int | None, length: int
) -> None:
    sweep_attention(dtype, heads, kv_heads, dim, window, length)


# Chunks whose borders lie inside blocks and on them, within one split and across several.
SWITCHES: dict[str, dict[str, float]] = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": 1},
    "chunk": {"chunk": 40},
    "chunk of blocks": {"chunk": 1024},
    "all": {"softcap": 3.0, "sinks": 1, "chunk": 1050},
}


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "int8"])
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "length"),
    [(4, 2, 24, 7, 65), (9, 3, 64, None, 100), (3, 1, 16, None, 2100), (2, 1, 16, 1000, 2100)],
)
def test_attention_switches(
    dtype: str,
    switches: dict[str, Any],
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    length: int,
) -> None:
    named = {name: x for name, x in switches.items() if name != "sinks"}
    if "sinks" in switches:  # far below the scores, among them, far above
        named["sinks_H"] = np.linspace(-40, 40, heads).astype(np.float32)
    sweep_attention(dtype, heads, kv_heads, dim, window, length, **named)


WILD = {"f16": 0x7BFF, "bf16": 0x7BFF, "f32": 1e30, "int8": -127}


def sweep_attention(
    dtype: str,
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    length: int,
    **switches: Any,
) -> None:
    """Close to `ref`; the same bits from all, and of each row alone, as in decode."""
    rng = np.random.default_rng(length + dim)
    lengths = [length, 1, 37]
    counts = [min(97, length), 1, 17]
    s = spec(dim, dtype, kv_heads, window)
    blocks = [-(-n // 32) for n in lengths]
    [kv] = BASE.kv_layers(s, sum(blocks) + 1)
    table = np.full((3, max(blocks)), -1, np.int32)
    ids = rng.permutation(sum(blocks) + 1)
    for r, count in enumerate(blocks):
        table[r, :count] = ids[sum(blocks[:r]) : sum(blocks[:r]) + count]
    qkv = normal(rng, 96, (heads + 2 * kv_heads) * dim)
    flat = np.ones((length + 1, dim), np.float32) * np.float32(0.7)
    for block in ids:
        slots = np.arange(block * 32, block * 32 + 32, dtype=np.int32)
        part = qkv[rng.integers(0, 96, 32)]
        BASE.rope_write(part, np.zeros(32, np.int32), flat, kv, slots, heads, None, None, 1e-6)
    starts = np.cumsum([0, *counts]).astype(np.int32)
    positions = np.concatenate(
        [np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)]
    ).astype(np.int32)
    seq_lens = np.array(lengths, np.int32)
    q = normal(rng, int(starts[-1]), heads, dim)
    args = (kv, starts, seq_lens, table, positions, dim**-0.5, window)
    outputs = [ops.attention(q, *args, **switches) for ops in CPUS.values()]
    close(outputs[0], REF.attention(q, *args, **switches), 3e-6)
    same(outputs)
    for row in (0, counts[0] - 1, counts[0], len(q) - 1):
        r = int(np.searchsorted(starts, row, side="right")) - 1
        p = positions[row : row + 1]
        alone = BASE.attention(
            q[row : row + 1], kv, np.array([0, 1], np.int32), p + 1, table[r : r + 1], p,
            dim**-0.5, window, **switches,
        )  # fmt: skip
        same([outputs[0][row : row + 1], alone])
    # Keys that a row must not see may hold anything.
    if window is None:
        kv.v[table[0, -1], :, (length - 1) % 32 + 1 :] = WILD[dtype]
        if kv.v_scales is not None:
            kv.v_scales[table[0, -1], :, (length - 1) % 32 + 1 :] = 2.0**121
        same([outputs[0], BASE.attention(q, *args, **switches)])


def attend(
    ops: object, kv: object, q: np.ndarray, first: int, length: int, **switches: Any
) -> np.ndarray:
    """Queries first .. length - 1 of one sequence in blocks 1 and 0."""
    positions = np.arange(first, length, dtype=np.int32)
    starts, table = np.array([0, length - first], np.int32), np.array([[1, 0]], np.int32)
    seq_lens = np.array([length], np.int32)
    return ops.attention(  # type: ignore[attr-defined]
        q[first:length], kv, starts, seq_lens, table, positions, 0.25, None, **switches
    )


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "int8"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3.4e38])
def test_attention_sees_nothing_of_a_later_token_that_is_not_finite(
    dtype: str, value: float
) -> None:
    qkv = normal(np.random.default_rng(6), 40, 4 * 16)
    qkv[20, -20:-3] = value
    flat, slots = np.ones((40, 16), np.float32), np.arange(40, dtype=np.int32)
    slots = np.where(slots < 32, slots + 32, slots - 32).astype(np.int32)
    kvs = [ops.kv_layers(spec(16, dtype, 1), 2)[0] for ops in CPUS.values()]
    qs = [
        ops.rope_write(qkv, np.arange(40, dtype=np.int32), flat, kv, slots, 2, None, None, 1e-6)
        for ops, kv in zip(CPUS.values(), kvs, strict=True)
    ]
    same([kv.v for kv in kvs])
    same([kv.k for kv in kvs])
    whole = [attend(o, kv, q, 0, 40) for o, kv, q in zip(CPUS.values(), kvs, qs, strict=True)]
    same([part[:20] for part in whole])
    for i in (*range(20), 39):
        alone = attend(BASE, kvs[0], qs[0], i, i + 1)[0]
        assert np.array_equal(whole[0][i], alone, equal_nan=True)
    assert np.isfinite(whole[0][:20]).all()


@pytest.mark.parametrize(
    ("value", "switches"),
    [
        *((np.nan, {}), (-3e38, {}), (np.nan, {"softcap": 2.0})),
        *((value, {"sinks_H": np.zeros(2, np.float32)}) for value in (np.nan, -3e38)),
    ],
)
def test_attention_without_a_score_shows_nothing_of_earlier_work(
    value: float, switches: dict[str, Any]
) -> None:
    rng = np.random.default_rng(8)
    [kv] = BASE.kv_layers(spec(16, "f32", 1), 2)
    kv.k[...] = 9
    q = normal(rng, 1, 2, 16)
    lost = np.full((1, 2, 16), value, np.float32)
    for fill in (1, -5):
        kv.v[...] = fill
        attend(BASE, kv, q, 0, 1)  # leaves its traces in the scratch memory
        assert np.isnan(attend(BASE, kv, lost, 0, 1, **switches)).all()


def test_a_sink_of_minus_infinity_is_none_and_a_large_one_takes_all() -> None:
    rng = np.random.default_rng(9)
    [kv] = BASE.kv_layers(spec(16, "f32", 1), 2)
    kv.k[...], kv.v[...] = normal(rng, *kv.k.shape), normal(rng, *kv.v.shape)
    q = normal(rng, 40, 2, 16)
    sinks = np.float32([-np.inf, 3e38])
    plain = attend(BASE, kv, q, 0, 40).reshape(40, 2, 16)
    for ops in CPUS.values():
        out = attend(ops, kv, q, 0, 40, sinks_H=sinks).reshape(40, 2, 16)
        assert np.array_equal(out[:, 0], plain[:, 0]) and not out[:, 1].any()


def test_soft_capped_scores_at_the_ends_of_the_range() -> None:
    """Two keys, one against a query of every size: its weight is a logistic of the capped score."""
    [kv] = BASE.kv_layers(spec(16, "f32", 1), 2)
    kv.k[1, 0, 0, 1] = 4  # a score of 4 * 0.25 = 1 a unit of the query
    kv.v[1, 0, 1, :] = 1
    sizes = np.float32([0, 1e-30, 1e-3, 0.3, 1, 5, 19.9, 20.1, 1e4, 3e38])
    sizes = np.concatenate([sizes, -sizes])
    capped = 2 * np.tanh(sizes.astype(np.float64) / 2)
    expected = 1 / (1 + np.exp(-capped))
    for ops in CPUS.values():
        for size, want in zip(sizes, expected, strict=True):
            q = np.zeros((2, 1, 16), np.float32)
            q[1, 0, 0] = size
            found = attend(ops, kv, q, 1, 2, softcap=2.0)
            assert abs(found - want).max() < 2e-7


def test_a_recording_keeps_the_switches_of_attention() -> None:
    rng = np.random.default_rng(10)
    [kv] = BASE.kv_layers(spec(16, "f32", 1), 2)
    kv.k[...], kv.v[...] = normal(rng, *kv.k.shape), normal(rng, *kv.v.shape)
    q, starts = normal(rng, 1, 2, 16), np.array([0, 1], np.int32)
    table, positions = np.array([[1, 0]], np.int32), np.array([45], np.int32)
    seq_lens = positions + 1
    switches = {"softcap": 2.0, "sinks_H": normal(rng, 2), "chunk": 20, "first": 42}

    def run() -> np.ndarray:
        return BASE.attention(q, kv, starts, seq_lens, table, positions, 0.25, None, **switches)

    same([run(), BASE.record(run)()])
