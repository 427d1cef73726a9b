"""What the formats of the KV cache keep of keys and values, how a block lies in memory, and how near
log-probs stay to those of an exact cache."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elinvar.base.config import KVDtype, KVSpec
from elinvar.models.registry import FAMILIES
from elinvar.ops import KVLayer
from elinvar.ops.ref_attention import read_keys, read_values, to_int8
from engines import tiny_model
from families import ENGINES
from helpers import run_tokens
from sweeps import BASE, CPUS, REF, normal, same, spec

F32 = np.ndarray
DTYPES = tuple(dtype for dtype in get_args(KVDtype) if dtype != "fp8")  # which is for GPUs alone


def write(ops: Any, kv: KVLayer, heads_THD: F32) -> None:
    """Keys as they are, unrotated, and values twice as large, to slots 0, 1, 2, ..."""
    tokens, _, dim = heads_THD.shape
    query = np.zeros((tokens, dim), np.float32)
    flat = heads_THD.reshape(tokens, -1)
    with np.errstate(over="ignore"):
        qkv = np.concatenate([query, flat, 2 * flat], 1)
    slots = np.arange(tokens, dtype=np.int32)
    nothing = np.zeros((1, 0), np.float32)
    ops.rope_write(qkv, np.zeros(tokens, np.int32), nothing, kv, slots, 1, None, None, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kv_heads", "latent_dim"), [(1, None), (3, None), (1, 24)])
def test_a_block_of_all_layers_is_one_piece(
    dtype: KVDtype, num_kv_heads: int, latent_dim: int | None
) -> None:
    """Its bytes, put in the place of another block, are that block."""
    s = KVSpec("full", (2, 5, 7), num_kv_heads, 40, dtype, latent_dim=latent_dim)
    layers = BASE.kv_layers(s, 4)
    parts = [x for kv in layers for x in (kv.k, kv.v, kv.k_scales, kv.v_scales) if x is not None]
    rng = np.random.default_rng(0)
    for part in parts:
        part[...] = rng.integers(0, 100, part.shape)
    before = [part.copy() for part in parts]
    cache = layers[0].blocks.array
    assert cache.shape == (4, s.block_bytes)
    cache[3] = cache[1]
    for part, old in zip(parts, before, strict=True):
        same([part, old[[0, 1, 2, 1]]])


VALUES = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 1e-38, 1e-30, 1.0, 127.0, 3.4e38, -3.4e38]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(VALUES, min_size=20, max_size=20), min_size=1, max_size=40))
def test_int8_keeps_each_vector_to_half_a_step(vectors: list[list[float]]) -> None:
    x = np.array(vectors, np.float32)[:, None]
    with np.errstate(all="ignore"):
        bounded = np.where(np.isnan(x), np.inf, x).clip(-(127 * 2.0**121), 127 * 2.0**121)
    bounded = bounded.astype(np.float32)
    caches = []
    for ops in (REF, *CPUS.values()):
        [kv] = ops.kv_layers(spec(20, "int8", 1), 2)
        write(ops, kv, x)
        caches.append(kv)
    for part in ("k", "v", "k_scales", "v_scales"):
        same([getattr(kv, part).copy() for kv in caches])
    kept = read_keys(caches[0]).transpose(0, 3, 1, 2).reshape(-1, 1, 20)[: len(x)]
    scales = caches[0].k_scales.reshape(-1)[: len(x), None, None]
    assert np.isfinite(kept).all()
    wide = bounded.astype(np.float64)
    assert (np.abs(kept - wide) <= np.maximum(scales * 0.50001, 1e-30)).all()
    live = np.abs(wide).max(-1) >= 1e-30
    expected = np.abs(bounded).max(-1) / np.float32(127)
    assert np.array_equal(scales[..., 0][live], expected[live])
    # The whole is what each token leaves alone.
    for t in {0, len(x) // 2, len(x) - 1}:
        codes, scale = to_int8(bounded[t])
        assert np.array_equal(caches[0].k[t // 32, :, :20, t % 32], codes)
        assert np.array_equal(caches[0].k_scales[t // 32, :, t % 32], scale)


def test_values_have_scales_of_their_own() -> None:
    x = normal(np.random.default_rng(1), 50, 3, 24)
    for ops in (REF, *CPUS.values()):
        [kv] = ops.kv_layers(spec(24, "int8", 3), 2)
        write(ops, kv, x)
        keys = read_keys(kv).transpose(0, 3, 1, 2).reshape(64, 3, 24)
        values = read_values(kv)[..., :24].transpose(0, 2, 1, 3).reshape(64, 3, 24)
        assert np.array_equal(values, 2 * keys)
        assert np.abs(keys[:50] - x).max() <= 0.5001 * np.abs(x).max() / 127


@pytest.mark.parametrize(("dim", "shared"), [(24, 1), (96, 2), (64, 4), (256, 16), (80, 1)])
def test_a_large_dim_of_a_key_costs_the_others_little(dim: int, shared: int) -> None:
    x = normal(np.random.default_rng(dim), 64, 2, dim)
    x[..., 5] = 100
    x[7] = 3.4e38
    exact = x.clip(None, 127 * 2.0**121 / shared).astype(np.float64)
    kept = []
    for ops in (REF, *CPUS.values()):
        [kv] = ops.kv_layers(spec(dim, "int8", 2), 2)
        write(ops, kv, x)
        kept.append(read_keys(kv).transpose(0, 3, 1, 2).reshape(64, 2, dim))
    same(kept)
    error = np.abs(kept[0] - exact)
    assert error[7].max() <= exact[7].max() / 100
    error = np.delete(error, 7, 0)
    # Half a step of 100 / 127 by itself; shared by n, n steps of an n-th, of which half cancel.
    assert error.max() <= 0.5001 * (100 + 5 * shared) / 127
    assert error.mean() <= 0.3 * (100 + 5 * shared) / 127 / shared**0.5


BOUNDS = {"f32": 0.0, "f16": 1e-3, "bf16": 5e-3, "int8": 2.5e-2}
"""Of the median difference: a token that meets another expert has other log-probs."""


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_log_probs_are_near_those_of_an_exact_cache(family: str) -> None:
    index = ENGINES[family].index
    length = 180 if index is None else index.top_k  # beyond that other keys may be chosen
    ids = np.random.default_rng(3).integers(0, 256, length).tolist()
    model = tiny_model(BASE, family, "f32")

    def log_probs(dtype: KVDtype) -> F32:
        logits = run_tokens(model, BASE, ids, 50, dtype).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    exact = log_probs("f32")
    for dtype, bound in BOUNDS.items():
        found = log_probs(dtype)  # type: ignore[arg-type]
        assert np.median(np.abs(found - exact)) <= bound, dtype
