"""Every op of the cpu provider, on every instruction set of this machine: close to `ref`, and
equal to the bit across instruction sets, threads, and the rows that share a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from elinvar import _cpu
from elinvar.base.config import KVSpec
from elinvar.ops import Ops, SampleArgs, load_provider
from elinvar.ops.api import Experts
from elinvar.ops.layout import (
    QUANTISED,
    Weight,
    WeightKind,
    pack_float,
    pack_q4,
    pack_q5,
    pack_q8,
    packed_bytes,
    unpack,
)

LEVELS = _cpu.available()
REF = load_provider("ref")
CPUS = {
    (level, n): load_provider("cpu", n, level)
    for level, n in [(level, 1) for level in LEVELS] + [(LEVELS[0], 2), (LEVELS[0], 4)]
}
BASE = CPUS[LEVELS[0], 1]
ROWS = [*range(1, 9), 12, 17, 97]  # every height of a tile, alone and after full ones
KINDS: list[WeightKind] = ["q4", "q5", "q8", "f16", "bf16", "f32"]


def weight(rng: np.random.Generator, kind: WeightKind, n: int, k: int) -> Weight:
    if kind in QUANTISED:
        scales = rng.uniform(0.001, 0.02, (n, k // 32)).astype(np.float16)
        if kind == "q8":
            return pack_q8(rng.integers(-127, 128, (n, k)).astype(np.int8), scales)
        mins = rng.normal(0, 0.05, (n, k // 32)).astype(np.float16)
        pack, codes = (pack_q4, 16) if kind == "q4" else (pack_q5, 32)
        return pack(rng.integers(0, codes, (n, k)).astype(np.uint8), scales, mins)
    w = rng.normal(0, 0.05, (n, k)).astype(np.float32)
    if kind == "bf16":
        return pack_float(kind, (w.view(np.uint32) >> 16).astype(np.uint16))
    return pack_float(kind, w.astype(np.float16) if kind == "f16" else w)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(0, 1, shape).astype(np.float32)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 2e-6) -> None:
    scale = np.abs(b).max() + 1e-6
    assert np.abs(a - b).max() <= tolerance * scale


def same(outputs: list[np.ndarray]) -> None:
    for other in outputs[1:]:
        assert outputs[0].tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(16, 32), (1, 32), (40, 96), (131, 576), (257, 160)])
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


@pytest.mark.parametrize("dim", [1, 16, 17, 64, 100, 576])
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


@pytest.mark.parametrize("kind", KINDS)
def test_embed(kind: WeightKind) -> None:
    rng = np.random.default_rng(3)
    w = weight(rng, kind, 75, 96)
    ids = rng.integers(0, 75, 97).astype(np.int32)
    expected = unpack(w)[ids] * np.float32(1.5)
    same([expected, *(ops.embed(ids, w, 1.5) for ops in CPUS.values())])


def spec(dim: int, dtype: str, kv_heads: int = 2, window: int | None = None) -> KVSpec:
    return KVSpec("full", (0,), kv_heads, dim, dtype, window)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
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

    def run(ops: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        [kv] = ops.kv_layers(s, 3)  # type: ignore[attr-defined]
        q = ops.rope_write(qkv, positions, table, kv, slots, heads, q_gain, k_gain, 1e-6)  # type: ignore[attr-defined]
        return q, kv.k, kv.v

    expected, results = run(REF), [run(ops) for ops in CPUS.values()]
    close(results[0][0], expected[0])
    for i in range(3):
        same([r[i] for r in results])
    for got, want in zip(results[0][1:], expected[1:], strict=True):
        if dtype == "bf16":
            got, want = ((a.astype(np.uint32) << 16).view(np.float32) for a in (got, want))
        assert np.isfinite(got).all()
        close(got.astype(np.float32), want.astype(np.float32), 8e-3 if dtype == "bf16" else 1e-3)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
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


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
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
    wild = kv.v.copy()
    if window is None:
        kv.v[table[0, -1], :, (length - 1) % 32 + 1 :] = 0x7BFF if dtype != "f32" else 1e30
        same([outputs[0], BASE.attention(q, *args, **switches)])
        kv.v[...] = wild


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


def angles(num_positions: int, dim: int) -> np.ndarray:
    turns = np.arange(num_positions)[:, None] * np.geomspace(1, 0.01, dim // 2)
    return np.concatenate([np.cos(turns), np.sin(turns)], 1).astype(np.float32)


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


def latent_spec(dtype: str, rank: int, rope: int) -> KVSpec:
    return KVSpec("full", (0, 1), 1, rank + rope, dtype, latent_dim=rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize(("rank", "rope"), [(16, 8), (512, 64), (48, 20)])
def test_latent_write(dtype: str, rank: int, rope: int) -> None:
    rng = np.random.default_rng(rank)
    x, gain, table = normal(rng, 57, rank + rope), normal(rng, rank), angles(64, rope)
    x[0, -3] = 1e9  # f16 saturates
    positions = rng.permutation(64)[:57].astype(np.int32)
    slots = np.arange(7, 103, dtype=np.int32) % 96  # a prompt's, then rows of others
    slots[40:] = rng.permutation(slots[40:])

    def run(ops: object) -> np.ndarray:
        first, kv = ops.kv_layers(latent_spec(dtype, rank, rope), 3)  # type: ignore[attr-defined]
        ops.latent_write(x, positions, table, kv, slots[:57], gain, 1e-6)  # type: ignore[attr-defined]
        assert not first.k.any(), "layers share no memory"
        assert kv.v.shape == (3, 1, 32, rank) and np.shares_memory(kv.k, kv.v)
        return kv.k

    expected, results = run(REF), [run(ops) for ops in CPUS.values()]
    same(results)
    got, want = results[0], expected
    if dtype == "bf16":
        got, want = ((a.astype(np.uint32) << 16).view(np.float32) for a in (got, want))
    assert np.isfinite(got).all()
    close(got.astype(np.float32), want.astype(np.float32), 8e-3 if dtype == "bf16" else 1e-3)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
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


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
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


def sample_args(rows: int, **over: object) -> SampleArgs:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | over
    return SampleArgs(
        seeds=np.arange(rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15),
        positions=np.arange(5, rows + 5, dtype=np.int32),
        temperature=np.full(rows, values["temperature"], np.float32),
        top_k=np.full(rows, values["top_k"], np.int32),
        top_p=np.full(rows, values["top_p"], np.float32),
        min_p=np.full(rows, values["min_p"], np.float32),
        num_logprobs=5,
    )


@pytest.mark.parametrize("vocab", [17, 1000, 49152])
@pytest.mark.parametrize(
    "over",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 3.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 4},
        {"top_k": 40, "top_p": 0.5},
        {"min_p": 0.1},
        {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    ],
)
def test_sample(vocab: int, over: dict[str, float]) -> None:
    rows = 17 if vocab > 2000 else 97
    logits = normal(np.random.default_rng(vocab), rows, vocab) * 3
    args = sample_args(rows, **over)
    expected, results = REF.sample(logits, args), [o.sample(logits, args) for o in CPUS.values()]
    for field in ("ids", "logprobs", "top_ids", "top_logprobs"):
        same([getattr(r, field) for r in results])
    assert (results[0].ids == expected.ids).all()
    assert (results[0].top_ids == expected.top_ids).all()
    assert np.abs(results[0].logprobs - expected.logprobs).max() < 2e-5
    assert np.abs(results[0].top_logprobs - expected.top_logprobs).max() < 2e-5


def test_sample_ties_go_to_the_lower_id() -> None:
    logits = np.zeros((2, 100), np.float32)
    logits[1, [40, 7]] = 5
    args = sample_args(2, temperature=0.0)
    for ops in (REF, *CPUS.values()):
        result = ops.sample(logits, args)
        assert result.ids.tolist() == [0, 7]
        assert result.top_ids.tolist() == [[0, 1, 2, 3, 4], [7, 40, 0, 1, 2]]


@pytest.mark.parametrize("vocab", [1, 17, 300, 5000])
@pytest.mark.parametrize("fill", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("every", [1, 3])
def test_sample_of_what_is_not_finite(vocab: int, fill: float, every: int) -> None:
    """Some token comes out, the same everywhere, and a number goes before what is none."""
    logits = normal(np.random.default_rng(vocab), 6, vocab) * 5
    logits[:, ::every] = fill
    for over in (
        *({"temperature": t, "top_p": p} for t in (0.0, 1e-40, 1e-6, 1.0, 100.0) for p in (0.9, 1)),
        {"top_p": 1e-9},
        {"top_p": 0.9999999},
        {"top_k": 299, "temperature": 100.0, "min_p": 1e-40},
        {"top_k": 2**31 - 1, "top_p": 0.5},
        {"min_p": 1.0},
    ):
        args = replace(sample_args(6, **over), num_logprobs=20)
        results = [ops.sample(logits, args) for ops in CPUS.values()]
        ids = results[0].ids
        same([r.ids for r in results])
        same([r.top_ids for r in results])
        assert results[0].top_ids.shape == (6, min(20, vocab))
        assert (ids >= 0).all() and (ids < vocab).all()
        if vocab > 1 and every == 3 and not fill > 0:
            assert (ids % 3 != 0).all()


def test_sampling_follows_the_distribution() -> None:
    """20,000 draws of one distribution: counts within five standard deviations."""
    p = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    n = 20_000
    logits = np.tile(np.log(p).astype(np.float32), (n, 1))
    args = sample_args(n)
    counts = np.bincount(BASE.sample(logits, args).ids, minlength=5)
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_size(kind: WeightKind) -> None:
    w = weight(np.random.default_rng(0), kind, 21, 96)
    assert w.nbytes == packed_bytes(kind, (21, 96))
    assert w.data.ctypes.data % 64 == 0


def distinct(rng: np.random.Generator, rows: int, experts: int, k: int) -> np.ndarray:
    ids = [np.sort(rng.permutation(experts)[:k]) for _ in range(rows)]
    return np.array(ids, np.int32)


def mixture(rng: np.random.Generator, kinds: list[WeightKind], f: int, d: int) -> Experts:
    """As many experts as kinds; the downs have the kinds in the other order."""
    gates, ups = ([weight(rng, kind, f, d) for kind in kinds] for _ in range(2))
    return Experts(gates, ups, [weight(rng, kind, d, f) for kind in reversed(kinds)])


ROUTES = [
    ("softmax", False, False, 1, 1),
    ("softmax", True, False, 1, 1),
    ("softmax", True, True, 1, 1),
    ("softmax", False, False, 4, 2),
    ("sigmoid", False, False, 1, 1),
    ("sigmoid", True, True, 1, 1),
    ("sigmoid", True, True, 4, 2),
    ("sigmoid", True, False, 4, 3),
]


@pytest.mark.parametrize(
    ("experts", "scoring", "renormalise", "bias", "groups", "top_groups"),
    [(n, *route) for n in (1, 7, 24, 128) for route in ROUTES if n % route[3] == 0],
)
def test_route(
    experts: int, scoring: str, renormalise: bool, bias: bool, groups: int, top_groups: int
) -> None:
    rng = np.random.default_rng(experts)
    logits, k = normal(rng, 97, experts) * 4, min(6, experts)
    bias_E = normal(rng, experts) if bias else None
    args = (k, scoring, renormalise, 2.5, bias_E, groups, top_groups)
    ids, weights = BASE.route(logits, *args)
    expected = REF.route(logits, *args)
    same([expected[0], ids])
    close(weights, expected[1])
    size = experts // groups
    assert max(len(set(row // size)) for row in ids) <= top_groups
    for rows in (1, 3, 17, 97):
        outputs = [ops.route(logits[:rows].copy(), *args) for ops in CPUS.values()]
        same([ids[:rows].copy(), *(o[0] for o in outputs)])
        same([weights[:rows].copy(), *(o[1] for o in outputs)])


def test_route_of_ties_and_of_what_is_not_finite() -> None:
    logits = np.zeros((5, 40), np.float32)
    logits[1, [30, 20, 10]] = 1
    logits[2, 3:] = -np.inf
    logits[3, ::2] = np.nan
    logits[4] = np.nan
    high = np.full((1, 40), 30, np.float32)
    high[0, [5, 9]] = 50, 40  # sigmoids of one value
    assert BASE.route(high, 2, "sigmoid", False, 1.0)[0].tolist() == [[5, 9]]
    for scoring in ("softmax", "sigmoid"):
        results = [ops.route(logits, 4, scoring, True, 1.0) for ops in CPUS.values()]
        ids = results[0][0]
        same([r[0] for r in results])
        assert ids[:3].tolist() == [[0, 1, 2, 3], [0, 10, 20, 30], [0, 1, 2, 3]]
        assert (ids[3] % 2 == 1).all()
        assert (np.diff(ids) > 0).all() and (ids >= 0).all() and (ids < 40).all()
        same([r[1][:3].copy() for r in results])
        assert np.isfinite(results[0][1][:3]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("f", "d", "k"), [(32, 32, 1), (96, 160, 3), (352, 64, 5)])
def test_moe(kind: WeightKind, f: int, d: int, k: int) -> None:
    rng = np.random.default_rng(f)
    experts = mixture(rng, [kind] * 9, f, d)
    x, ids, weights = normal(rng, 97, d), distinct(rng, 97, 9, k), normal(rng, 97, k)
    whole = BASE.moe(x, ids, weights, experts, "silu")
    close(whole, REF.moe(x, ids, weights, experts, "silu"), 1e-5)
    for rows in ROWS:
        part = [a[:rows].copy() for a in (x, ids, weights)]
        outputs = [ops.moe(*part, experts, "silu") for ops in CPUS.values()]
        same([whole[:rows].copy(), *outputs])
    for i in (0, 50, 96):
        one = slice(i, i + 1)
        same([whole[one], BASE.moe(x[one], ids[one], weights[one], experts, "silu")])


def test_moe_is_the_dense_layers_of_its_experts() -> None:
    """Matrices of all kinds side by side; one expert has no token and one has all of them."""
    rng = np.random.default_rng(3)
    experts = mixture(rng, KINDS, 64, 96)
    x, weights = normal(rng, 40, 96), normal(rng, 40, 2)
    ids = np.stack([rng.integers(0, 4, 40), np.full(40, 5)], 1).astype(np.int32)
    expected = np.zeros((40, 96), np.float32)
    for t, j in np.ndindex(ids.shape):
        e, row = ids[t, j], x[t : t + 1]
        h = BASE.gated_linear(row, experts.gates[e], experts.ups[e], "gelu_tanh")
        y = BASE.linear(h, [experts.downs[e]])[0].astype(np.float64)
        # In float64 the product is exact, and the sum is rounded twice only by rare misfortune.
        expected[t] = y * np.float64(weights[t, j]) + expected[t]
    outputs = [ops.moe(x, ids, weights, experts, "gelu_tanh") for ops in CPUS.values()]
    same([expected, *outputs])


@pytest.mark.parametrize("kind", ["q8", "f16"])
def test_moe_with_biases(kind: WeightKind) -> None:
    """As gpt-oss has them; gates and ups go beyond what they are clamped to."""
    rng = np.random.default_rng(4)
    experts = mixture(rng, [kind] * 5, 96, 64)
    experts.gate_bias, experts.up_bias = normal(rng, 5, 96) * 8, normal(rng, 5, 96) * 8
    experts.down_bias = normal(rng, 5, 64)
    x, ids, weights = normal(rng, 33, 64), distinct(rng, 33, 5, 2), normal(rng, 33, 2)
    outputs = [ops.moe(x, ids, weights, experts, "swiglu_oai") for ops in CPUS.values()]
    close(outputs[0], REF.moe(x, ids, weights, experts, "swiglu_oai"), 1e-5)
    same(outputs)
    same([outputs[0][7:8], BASE.moe(x[7:8], ids[7:8], weights[7:8], experts, "swiglu_oai")])


@pytest.mark.parametrize("kind", KINDS)
def test_moe_that_scales_inputs(kind: WeightKind) -> None:
    """Of two experts a token, with biases: these are not scaled."""
    rng = np.random.default_rng(5)
    experts = mixture(rng, [kind] * 5, 96, 64)
    experts.gate_bias, experts.up_bias = normal(rng, 5, 96), normal(rng, 5, 96)
    x, ids, weights = normal(rng, 33, 64), distinct(rng, 33, 5, 2), normal(rng, 33, 2)
    outputs = [ops.moe(x, ids, weights, experts, "silu", True) for ops in CPUS.values()]
    # What is rounded to int8 between the matrices may fall to either side of a half.
    tolerance = 2e-4 if kind in QUANTISED else 1e-5
    close(outputs[0], REF.moe(x, ids, weights, experts, "silu", True), tolerance)
    same(outputs)
    same([outputs[0][7:8], BASE.moe(x[7:8], ids[7:8], weights[7:8], experts, "silu", True)])
    if kind == "f32":  # what it means, by other ops
        one = np.ascontiguousarray(ids[:, :1])
        scaled = BASE.moe(x * weights[:, :1], one, np.ones((33, 1), np.float32), experts, "silu")
        close(BASE.moe(x, one, weights[:, :1].copy(), experts, "silu", True), scaled, 1e-5)


def test_a_recorded_mixture_routes_anew() -> None:
    """Which experts a token goes to is read when the recording runs, not when it was made."""
    rng = np.random.default_rng(9)
    experts, router = mixture(rng, ["q4"] * 12, 64, 96), weight(rng, "f32", 12, 96)
    for ops in CPUS.values():
        x = normal(rng, 5, 96)

        def step(ops: Ops = ops, x: np.ndarray = x) -> np.ndarray:
            ids, weights = ops.route(ops.linear(x, [router]), 3, "softmax", True, 1.0)
            return ops.moe(x, ids, weights, experts, "silu")

        replay = ops.record(step)
        for _ in range(3):
            x[:] = normal(rng, 5, 96)
            same([step(), replay().copy()])
