"""The op that says what part of attention each block of keys gets, swept as sweeps.py says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elinvar.base.config import BLOCK_SIZE, KVSpec
from elinvar.ops import KVLayer
from elinvar.ops.ref_attention import write_keys
from sweeps import BASE, CPUS, REF, close, normal, same
from test_sparse import one_token, spans

PIECES = ((300, 40), (7, 7), (2100, 3), (33, 1), (64, 32))


LEAST = np.float32(1e-3)


def cache(rng: np.random.Generator, dtype: Any, kv_heads: int, dim: int, latent: bool) -> KVLayer:
    """Filled with random keys; layer 1 of 2, so that blocks do not follow one another."""
    spec = KVSpec("full", (0, 1), kv_heads, dim, dtype, latent_dim=dim - 8 if latent else None)
    kv = BASE.kv_layers(spec, 100)[1]
    slots = np.arange(BLOCK_SIZE * 100, dtype=np.int32)
    write_keys(kv, slots, normal(rng, len(slots), kv_heads, dim))
    return kv


def shares(ops: Any, q: np.ndarray, kv: KVLayer, where: tuple[Any, ...], **switches: Any) -> Any:
    """Where there was less before."""
    found = np.full((len(q), where[1].shape[1]), LEAST, np.float32)
    ops.block_shares(q, kv, *where, 0.3, found, **switches)
    return found


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32", "int8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(1, 1, 16), (6, 2, 40), (9, 3, 64), (28, 4, 32), (18, 1, 24)]
)
@pytest.mark.parametrize("switched", [False, True])
def test_shares(dtype: str, heads: int, kv_heads: int, dim: int, switched: bool) -> None:
    rng = np.random.default_rng(heads)
    where = spans(rng, *PIECES)
    kv = cache(rng, dtype, kv_heads, dim, latent=kv_heads == 1)
    q = normal(rng, len(where[2]), heads, dim)
    switches: dict[str, Any] = {}
    if switched:
        switches = {"softcap": 2.0, "sinks_H": normal(rng, heads)}
    outputs = [shares(ops, q, kv, where, **switches) for ops in CPUS.values()]
    same(outputs)
    close(outputs[0], shares(REF, q, kv, where, **switches), 3e-6)
    assert outputs[0].max() <= 1 and (outputs[0] > LEAST).any(-1).all()
    if heads == 1 and not switched:
        seen = where[2][:, None] // BLOCK_SIZE >= np.arange(where[1].shape[1])
        least = np.where(seen, outputs[0], 0).sum(-1)
        assert (np.abs(least - 1) <= LEAST * seen.sum(-1) + 1e-5).all()
    for t in (0, 39, 40, 47, 50, len(q) - 1):
        alone = shares(BASE, q[t : t + 1], kv, one_token(where, t), **switches)
        same([outputs[0][t : t + 1], alone])
        assert (outputs[0][t, where[2][t] // BLOCK_SIZE + 1 :] == LEAST).all()


def test_what_a_token_does_not_see_leaves_no_trace() -> None:
    rng = np.random.default_rng(1)
    where = spans(rng, (100, 40))
    _, table, positions = where
    kv = cache(rng, "f32", 1, 16, latent=False)
    q = normal(rng, 40, 2, 16)
    before = shares(BASE, q[:20], kv, (np.array([0, 20], np.int32), table, positions[:20]))
    for p in range(80, 128):
        kv.k[table[0, p // 32], 0, :, p % 32] = np.nan
    same([before, shares(BASE, q, kv, where)[:20]])
