"""Row ops for GPUs under Triton's interpreter: close to `ref`, and a row alone has the bits that it has
in a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from elinvar.base.config import Activation, KVDtype, KVSpec  # noqa: E402
from elinvar.ops.arguments import Lora, LoraPair  # noqa: E402
from elinvar.ops.layout import (  # noqa: E402
    QUANTISED,
    WeightKind,
    pack_float,
    unpack,
    unpack_codes,
)
from elinvar.ops.ref import RefOps  # noqa: E402
from elinvar.ops.triton import caches, gather, norms, panels  # noqa: E402
from elinvar.ops.triton.provider import TritonOps  # noqa: E402
from sweeps import KINDS, weight  # noqa: E402

REF, OPS = RefOps(), TritonOps(torch.float32)
HALF = TritonOps(torch.bfloat16)
ROWS = 5
DIMS = [1, 33, 200]

Call = Callable[..., Any]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def on_device(value: Any) -> Any:
    """Arrays become tensors; what else there is stays."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return [on_device(v) for v in value] if isinstance(value, list) else value


def check(op: str, rows: list[Any], *others: Any, tolerance: float = 2e-6) -> None:
    """Close to ref, and each row's bits are its own. rows: arguments with a row a token."""
    expected = getattr(REF, op)(*rows, *others)
    for ops, within in ((OPS, tolerance), (HALF, 1.6e-2)):
        call = getattr(ops, op)
        found = call(*map(on_device, rows), *map(on_device, others))
        for a, b in zip(*map(_parts, (found, expected)), strict=True):
            np.testing.assert_allclose(a.float().numpy(), b, rtol=within, atol=within)
        alone = call(*(on_device(_cut(r, 3)) for r in rows), *map(on_device, others))
        for a, b in zip(*map(_parts, (alone, found)), strict=True):
            assert torch.equal(a, b.narrow(1 if op == "mix" else 0, 3, 1))


def _parts(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


def _cut(rows: Any, at: int) -> Any:
    return [_cut(r, at) for r in rows] if isinstance(rows, list) else rows[at : at + 1].copy()


@pytest.mark.parametrize("dim", DIMS)
def test_norms(dim: int) -> None:
    x, y, gain, bias = normal(ROWS, dim) + 1, normal(ROWS, dim, seed=1), normal(dim), normal(dim)
    check("rms_norm", [x], gain, 1e-5)
    check("add_rms_norm", [x, y], gain, 1e-5)
    check("match_rms", [x, y])
    if dim > 1:  # of one element nothing is left but rounding
        check("layer_norm", [x], gain, None, 1e-5)
        check("add_layer_norm", [x, y], gain, bias, 1e-5, tolerance=5e-6)
        check("sparsify", [x], 0.7)


@pytest.mark.parametrize("dim", DIMS)
def test_elements(dim: int) -> None:
    x, y = normal(ROWS, dim) * 3, normal(ROWS, 2 * dim, seed=1)
    check("add", [x, y[:, :dim].copy()])
    check("scale", [x], 0.3)
    check("softcap", [x], 2.0)
    check("mul", [x, y], dim)
    check("mul", [x], y[:1], 1)
    check("sigmoid_gate", [x, y[:, dim:].copy()])
    check("concat", [x, y])
    check("mix", [[x, y[:, :dim].copy()], normal(ROWS, 6)])
    check("gated_rms_norm", [np.tile(x, 2), np.tile(y, 2)], dim, normal(dim), 1e-5)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations(activation: Activation) -> None:
    x = normal(ROWS, 70) * 4
    check("activate", [x], activation)
    check("gated", [x], activation, tolerance=1e-5)


def test_a_text_is_pooled_row_by_row() -> None:
    x, weights, starts = normal(7, 40), normal(7), np.array([0, 2, 2, 7], np.int32)
    found = OPS.pool(*map(on_device, (x, starts, weights)))
    np.testing.assert_allclose(found.numpy(), REF.pool(x, starts, weights), atol=2e-6)
    starts = np.array([0, 2, 7], np.int32)
    largest = OPS.pool(on_device(x), on_device(starts), None)
    assert np.array_equal(largest.numpy(), REF.pool(x, starts, None))


def test_logits_over_another_vocabulary() -> None:
    columns = np.random.default_rng(1).integers(-1, 40, 70).astype(np.int32)
    check("spread", [normal(ROWS, 40)], columns, tolerance=0)
    expected = np.where(columns < 0, -np.inf, normal(ROWS, 40)[:, columns])
    assert np.array_equal(REF.spread(normal(ROWS, 40), columns), expected)


def test_arrays_are_moved() -> None:
    x = OPS.place(normal(3, 40))
    x[[2, 0]] = HALF.stack([x[:1], x[1:2].bfloat16()])
    assert torch.equal(x[2], OPS.place(normal(3, 40))[0])
    assert np.array_equal(OPS.fetch(OPS.columns(x, 8, 20)), x.numpy()[:, 8:20])


def test_adapters_change_their_rows_alone() -> None:
    """Ranks and matrices differ; one adapter has nothing for the second matrix."""
    x, y, rows = normal(ROWS, 40), normal(ROWS, 90), np.array([1, -1, 0, 1, 0], np.int32)

    def pair(rank: int, outputs: int) -> LoraPair:
        a, b = normal(rank, 40, seed=rank), normal(outputs, rank, seed=rank)
        return LoraPair(pack_float("f32", a), pack_float("f32", b), 0.5)

    pairs = [[pair(3, 50), pair(8, 50)], [None, pair(2, 40)]]
    expected, found = y.copy(), torch.from_numpy(y.copy())
    REF.lora(expected, x, rows, Lora([0, 50], pairs))
    OPS.lora(found, *map(on_device, (x, rows)), Lora([0, 50], pairs))
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    assert torch.equal(found[1], torch.from_numpy(y)[1])
    alone = torch.from_numpy(y[3:4].copy())
    OPS.lora(alone, *map(on_device, (x[3:4], rows[3:4])), Lora([0, 50], pairs))
    assert torch.equal(alone, found[3:4])


# Head dim, rotary dims, heads, KV heads, and whether gains are of heads, of all heads, or not there.
ROPES = [(32, 32, 4, 2, ""), (96, 16, 3, 1, "heads"), (32, 0, 3, 3, "all"), (20, 20, 1, 1, "")]


@pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
@pytest.mark.parametrize(("dim", "rotary", "heads", "kv_heads", "gains"), ROPES)
def test_rope_and_what_it_writes(
    dtype: KVDtype, dim: int, rotary: int, heads: int, kv_heads: int, gains: str
) -> None:
    rng = np.random.default_rng(dim)
    spec = KVSpec("full", (0, 1), kv_heads, dim, dtype)
    positions = rng.integers(0, 40, ROWS).astype(np.int32)
    slots = rng.permutation(90)[:ROWS].astype(np.int32)
    qkv, table = normal(ROWS, (heads + 2 * kv_heads) * dim), normal(40, rotary)
    counts = {"heads": (1, 1), "all": (heads, kv_heads)}.get(gains)
    q_gain, k_gain = (normal(n * dim) for n in counts) if counts else (None, None)
    v_gain = normal(dim, seed=1) if gains == "heads" else None
    arguments = heads, q_gain, k_gain, 1e-5, v_gain
    kept = REF.kv_layers(spec, 3)[1]
    expected = REF.rope_write(qkv, positions, table, kept, slots, *arguments)

    def write(rows: slice) -> tuple[Any, caches.KVLayer]:
        kv = OPS.kv_layers(spec, 3)[1]
        x, at, to = map(on_device, (qkv[rows], positions[rows], slots[rows]))
        gain = [on_device(a) for a in arguments]
        return OPS.rope_write(x, at, on_device(table), kv, to, *gain), kv

    q, kv = write(slice(None))
    np.testing.assert_allclose(q.numpy(), expected, atol=3e-6)
    blocks, places = slots // 32, slots % 32
    for name in ("k", "v"):
        own = getattr(kv, name)[blocks, :, places, :dim].float()
        other = getattr(kept, name)
        other = (other.swapaxes(2, 3) if name == "k" else other)[blocks, :, places, :dim]
        within = 1 if dtype == "int8" else 2e-3  # where rounding falls to the other side
        np.testing.assert_allclose(own.numpy(), other, atol=within if dtype != "f32" else 3e-6)
        if dtype == "int8":
            scales = [getattr(c, f"{name}_scales")[blocks, :, places] for c in (kv, kept)]
            np.testing.assert_allclose(scales[0].numpy(), scales[1], rtol=1e-5)
    q_alone, kv_alone = write(slice(2, 3))
    assert torch.equal(q_alone, q[2:3])
    for name in ("k", "v"):
        both = [getattr(c, name)[blocks[2], :, places[2]] for c in (kv, kv_alone)]
        assert torch.equal(*both)


def test_queries_alone_are_rotated_as_with_keys() -> None:
    q, table, gain = normal(ROWS, 3 * 24), normal(9, 16), normal(24)
    positions = np.array([4, 0, 8, 1, 1], np.int32)
    check("rope_queries", [q, positions], table, 3, gain, 1e-5)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("added", [True, False])
def test_a_norm_in_codes_is_the_norm_and_then_its_codes(dim: int, added: bool) -> None:
    x, y = torch.from_numpy(normal(ROWS, dim)), torch.from_numpy(normal(ROWS, dim, seed=1))
    gain = torch.from_numpy(normal(dim))
    x[2] = 0
    other = y if added else None
    total, codes, scales = norms.add_rms_norm_codes(x, other, gain, 1e-5)
    plain = norms.add_rms_norm(x, y, gain, 1e-5, torch.bfloat16) if added else (x, None)
    normed = plain[1] if added else norms.rms_norm(x, gain, 1e-5, torch.bfloat16)
    expected_codes, expected_scales = gather.quantise_rows(normed)
    assert torch.equal(total, plain[0])
    assert torch.equal(codes, expected_codes) and torch.equal(scales, expected_scales)
    alone = norms.add_rms_norm_codes(x[3:4], y[3:4] if added else None, gain, 1e-5)
    assert torch.equal(alone[1], codes[3:4]) and torch.equal(alone[2], scales[3:4])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (33, 96)])
def test_panels_are_taken_apart_as_on_the_host(kind: WeightKind, n: int, k: int) -> None:
    w = weight(np.random.default_rng(n), kind, n, k)
    if kind not in QUANTISED:
        np.testing.assert_array_equal(panels.floats(w, "cpu").float().numpy(), unpack(w))
        return
    for found, expected in zip(panels.codes(w, "cpu"), unpack_codes(w), strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            np.testing.assert_array_equal(found.float().numpy(), expected.astype(np.float32))
