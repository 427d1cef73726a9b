"""Sparse attention's ops: which keys are chosen, and attention to them. As in sweeps.py: close to
`ref`, and equal to the bit across instruction sets, threads, neighbours and pieces."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from elinvar.base.config import KVSpec
from elinvar.base.errors import ModelError
from elinvar.models import deepseek, deepseek_v32
from elinvar.ops import KVLayer
from elinvar.ops.ref_attention import write_keys
from engines import tiny_model, tiny_weights
from families import CASES, ENGINES
from families.base import SIZES
from helpers import run_tokens
from sweeps import BASE, CPUS, REF, close, normal, same

F32 = np.ndarray


def cache(rng: np.random.Generator, dtype: Any, dim: int, values: int, blocks: int) -> KVLayer:
    """Filled with random keys; layer 1 of 2, so that blocks do not follow one another."""
    spec = KVSpec("full", (0, 1), 1, dim, dtype, latent_dim=values)
    kv = BASE.kv_layers(spec, blocks)[1]
    write_keys(kv, np.arange(32 * blocks, dtype=np.int32), normal(rng, 32 * blocks, 1, dim))
    return kv


def spans(rng: np.random.Generator, *pieces: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Sequences of `length`, of which the last `count` tokens are queries."""
    need = [-(-length // 32) for length, _ in pieces]
    ids = rng.permutation(sum(need)).tolist()
    table = np.full((len(pieces), max(need)), -1, np.int32)
    for row, n in zip(table, need, strict=True):
        row[:n] = [ids.pop() for _ in range(n)]
    starts = np.cumsum([0, *(count for _, count in pieces)]).astype(np.int32)
    positions = np.concatenate([np.arange(n - c, n) for n, c in pieces]).astype(np.int32)
    return starts, table, positions


def one_token(where: tuple[np.ndarray, ...], t: int) -> tuple[np.ndarray, ...]:
    starts, table, positions = where
    r = int(np.searchsorted(starts, t, side="right")) - 1
    return np.array([0, 1], np.int32), table[r : r + 1], positions[t : t + 1]


PIECES = ((300, 40), (7, 7), (2100, 3), (33, 1))


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "int8"])
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (3, 24), (8, 64), (13, 40), (64, 128)])
@pytest.mark.parametrize("k", [1, 31, 256])
def test_choice(dtype: str, heads: int, dim: int, k: int) -> None:
    rng = np.random.default_rng(heads * k)
    where = spans(rng, *PIECES)
    kv = cache(rng, dtype, dim, dim, 200)
    q, weights = normal(rng, len(where[2]), heads, dim), normal(rng, len(where[2]), heads)
    outputs = [ops.index_select(q, weights, kv, *where, k) for ops in CPUS.values()]
    same(outputs)
    # With one head and a weight below 0 all but the worst are equal: float64 rounds elsewhere.
    expected = REF.index_select(q, weights, kv, *where, k)
    assert (outputs[0] == expected).mean() > 0.99
    for t, chosen in enumerate(outputs[0]):
        count = min(k, int(where[2][t]) + 1)
        assert (np.diff(chosen[:count]) > 0).all()
        assert (chosen[count:] == -1).all()
        assert 0 <= chosen[0] <= chosen[count - 1] <= where[2][t]
    for t in (0, 39, 40, len(q) - 1):
        alone = BASE.index_select(q[t : t + 1], weights[t : t + 1], kv, *one_token(where, t), k)
        same([outputs[0][t : t + 1], alone])


@pytest.mark.parametrize("first", [1, 40])
def test_keys_before_the_first_are_never_chosen(first: int) -> None:
    rng = np.random.default_rng(first)
    where = spans(rng, (300, 40), (45, 5), (2100, 3))
    kv = cache(rng, "f32", 24, 24, 100)
    q, weights = normal(rng, len(where[2]), 9, 24), normal(rng, len(where[2]), 9)
    for p in range(first):
        for table in where[1]:
            kv.k[table[p // 32], 0, :, p % 32] = np.nan
    outputs = [ops.index_select(q, weights, kv, *where, 20, first) for ops in CPUS.values()]
    same([REF.index_select(q, weights, kv, *where, 20, first), *outputs])
    assert outputs[0][outputs[0] >= 0].min() >= first
    counts = np.minimum(where[2] + 1 - first, 20)
    assert ((outputs[0] >= 0).sum(-1) == counts).all()


def test_equal_keys_are_chosen_from_the_first_on() -> None:
    rng = np.random.default_rng(1)
    where = spans(rng, (100, 1))
    kv = cache(rng, "f32", 16, 16, 4)
    q, weights = np.abs(normal(rng, 1, 2, 16)), np.ones((1, 2), np.float32)
    table = where[1][0]
    kv.k[...] = -1.0  # worth 0
    for position, value in ((70, 2.0), (5, 1.0), (90, 1.0), (64, np.nan)):
        kv.k[table[position // 32], 0, :, position % 32] = value
    for k, expected in ((1, [70]), (2, [5, 70]), (3, [5, 70, 90]), (5, [0, 1, 5, 70, 90])):
        for ops in CPUS.values():
            assert ops.index_select(q, weights, kv, *where, k).tolist() == [expected]


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "int8"])
@pytest.mark.parametrize(
    ("heads", "rank", "rope", "k"), [(4, 16, 8, 7), (18, 48, 16, 64), (3, 32, 16, 1100)]
)
def test_attention_to_chosen_keys(dtype: str, heads: int, rank: int, rope: int, k: int) -> None:
    rng = np.random.default_rng(k)
    where = spans(rng, *PIECES)
    kv = cache(rng, dtype, rank + rope, rank, 200)
    q = normal(rng, len(where[2]), heads, rank + rope)
    chosen = np.full((len(q), k), -1, np.int32)
    for row, p in zip(chosen, where[2], strict=True):
        count = min(k, p + 1)
        row[:count] = np.sort(rng.choice(p + 1, count, replace=False))
    outputs = [ops.sparse_attention(q, kv, *where, chosen, 0.2) for ops in CPUS.values()]
    same(outputs)
    close(outputs[0], REF.sparse_attention(q, kv, *where, chosen, 0.2), 3e-6)
    for t in (0, 39, 40, 47, len(q) - 1):
        own = (q[t : t + 1], kv, *one_token(where, t), chosen[t : t + 1], 0.2)
        same([outputs[0][t : t + 1], BASE.sparse_attention(*own)])
    # Nothing of the others is seen.
    hidden = np.ones(200 * 32, bool)
    for t in range(len(q)):
        _, table, _ = one_token(where, t)
        seen = chosen[t][chosen[t] >= 0]
        hidden[table[0, seen // 32] * 32 + seen % 32] = False
    block, offset = hidden.reshape(200, 32).nonzero()
    kv.k[block, 0, :, offset] = {"f32": np.nan, "int8": 1}.get(dtype, 0x7C00)
    if kv.k_scales is not None:
        kv.k_scales[block, 0, offset] = np.nan
    same([outputs[0], BASE.sparse_attention(q, kv, *where, chosen, 0.2)])


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_with_all_keys_it_is_attention(dtype: str) -> None:
    """To the bit, also beside tokens for which keys were chosen."""
    rng = np.random.default_rng(5)
    where = spans(rng, (1500, 20), (40, 40), (1700, 2))
    starts, table, positions = where
    kv = cache(rng, dtype, 48, 32, 120)
    q = normal(rng, len(positions), 5, 48)
    lengths = np.array([1500, 40, 1700], np.int32)
    dense = BASE.attention(q, kv, starts, lengths, table, positions, 0.2, None)
    index, weights = normal(rng, len(q), 2, 48), normal(rng, len(q), 2)
    for k, few in ((1800, 0), (1600, 2)):
        chosen = BASE.index_select(index, weights, kv, *where, k)
        found = BASE.sparse_attention(q, kv, *where, chosen, 0.2)
        same([dense[: len(q) - few], found[: len(q) - few]])
        assert not few or not np.array_equal(dense[-few:], found[-few:])


def test_recorded() -> None:
    rng = np.random.default_rng(6)
    where = spans(rng, (100, 1), (50, 1))
    kv = cache(rng, "f16", 48, 32, 8)
    q, index, weights = normal(rng, 2, 3, 48), normal(rng, 2, 4, 48), normal(rng, 2, 4)

    def run() -> F32:
        chosen = BASE.index_select(index, weights, kv, *where, 20)
        return BASE.sparse_attention(q, kv, *where, chosen, 0.3)

    same([run(), BASE.record(run)()])


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "int8"])
def test_a_cache_of_keys_alone(dtype: str) -> None:
    """rope_write writes to it what it writes to one with values."""
    rng = np.random.default_rng(7)
    heads, dim, tokens = 3, 24, 45
    qkv = normal(rng, tokens, (heads + 2) * dim)
    rope = normal(rng, tokens, 8)
    positions = np.arange(tokens, dtype=np.int32)
    [both] = BASE.kv_layers(KVSpec("full", (0,), 1, dim, dtype), 2)
    expected = BASE.rope_write(
        qkv, positions, rope, both, positions[::-1].copy(), heads, None, None, 1e-6
    )
    for ops in (REF, *CPUS.values()):
        [kv] = ops.kv_layers(KVSpec("full", (0,), 1, dim, dtype, latent_dim=dim), 2)
        qk = np.ascontiguousarray(qkv[:, : (heads + 1) * dim])
        q = ops.rope_write(qk, positions, rope, kv, positions[::-1].copy(), heads, None, None, 1e-6)
        if ops is REF:
            close(q, expected)
        else:
            same([q, expected])
            same([kv.k, both.k])
            if kv.k_scales is not None:
                same([kv.k_scales, both.k_scales])


def test_with_few_keys_it_is_the_dense_model() -> None:
    """To the bit, until more keys are seen than may be chosen."""
    sparse = ENGINES["deepseek_v32"]
    assert sparse.index is not None
    for top_k in (40, 75):
        config = replace(sparse, index=replace(sparse.index, top_k=top_k))
        weights = tiny_weights("deepseek_v32", "q4")
        model = deepseek_v32.build(config, weights, BASE)
        plain = deepseek.build(replace(config, family="deepseek", index=None), weights, BASE)
        ids = np.random.default_rng(1).integers(0, 256, 75).tolist()
        found, dense = (run_tokens(m, BASE, ids, 33) for m in (model, plain))
        assert np.array_equal(found[:top_k], dense[:top_k])
        assert top_k == 75 or np.abs(found[top_k:] - dense[top_k:]).max() > 1e-3


def test_the_index_has_a_group_of_its_own() -> None:
    model = tiny_model(BASE, "glm_moe_dsa")
    latents, keys = model.kv_specs("f16")
    assert (latents.layers, keys.layers) == ((0, 1, 2), (3, 4))  # the one between shares
    assert (keys.head_dim, keys.block_bytes) == (16, 2 * 16 * 32 * 2)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"index_head_dim": 4}, "index_head_dim = 4, which must be at least the 12 dims"),
        ({"index_topk": 0}, "index_topk = 0"),
        ({"q_lora_rank": None}, "lacks q_lora_rank"),
        ({"mlp_layer_types": ["dense"] * 3}, "mlp_layer_types"),
        ({"indexer_types": ["shared", "full", "full"]}, "indexer_types"),
        ({"indexer_rope_interleave": False}, "indexer_rope_interleave"),
    ],
)
def test_configurations_that_cannot_be(change: dict[str, Any], problem: str) -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.GlmMoeDsaConfig(**deepcopy(SIZES | CASES["glm-dsa"].settings))
    with pytest.raises(ModelError, match=problem):
        deepseek_v32.glm_from_hf(settings.to_dict() | change)


def test_which_layers_have_an_index() -> None:
    """As transformers reads the same keys."""
    transformers = pytest.importorskip("transformers")
    plain = SIZES | CASES["glm-dsa"].settings | {"num_hidden_layers": 7}
    for keys in (
        {},
        {"index_topk_freq": 3},
        {"index_topk_freq": 2, "index_skip_topk_offset": 4},
        {"index_topk_pattern": "FSSFSFS"},
    ):
        theirs = transformers.GlmMoeDsaConfig(**deepcopy(plain | keys)).indexer_types
        config = deepseek_v32.glm_from_hf(plain | keys | {"rms_norm_eps": 1e-5})
        assert config.index is not None
        assert config.index.layers == tuple(i for i, t in enumerate(theirs) if t == "full")
