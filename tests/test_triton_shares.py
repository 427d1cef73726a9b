"""Shares of attention on the provider `triton` under Triton's interpreter: close to the oracle's, a row's
bits are its own, and an engine keeps the blocks that it would keep on a CPU."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are made, at their import

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from elinvar.base.config import BLOCK_SIZE, KVSpec  # noqa: E402
from elinvar.ops.triton import shares as kernels  # noqa: E402
from elinvar.ops.triton.caches import KVLayer  # noqa: E402
from gpu_caches import random_caches, torched  # noqa: E402
from sweeps import REF, normal  # noqa: E402
from test_triton_sparse import one_token, spans  # noqa: E402

PIECES = [(150, 3), (7, 2), (64, 2), (33, 1)]
LEAST = np.float32(1e-3)


def shares(q: torch.Tensor, kv: KVLayer, where: tuple[np.ndarray, ...], **switches: Any) -> Any:
    """Where there was less before."""
    found = torch.full((len(q), where[1].shape[1]), float(LEAST))
    kernels.block_shares(q, kv, *torched(*where), 0.3, found, **switches)  # type: ignore[misc]
    return found


@pytest.mark.parametrize(
    ("kind", "heads", "kv_heads", "dim", "dtype"),
    [
        ("f32", 1, 1, 16, torch.float32),
        ("f16", 6, 2, 40, torch.float32),
        ("int8", 9, 3, 64, torch.float32),
        ("bf16", 4, 2, 192, torch.bfloat16),
        ("int8", 20, 1, 24, torch.float32),
        ("f16", 40, 1, 24, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("switched", [False, True])
def test_shares(
    kind: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, switched: bool
) -> None:
    rng = np.random.default_rng(heads)
    where, num_blocks = spans(rng, PIECES)
    latent = dim - 8 if kv_heads == 1 else None
    spec = KVSpec("full", (0,), kv_heads, dim, kind, latent_dim=latent)  # type: ignore[arg-type]
    host, kv = random_caches(rng, spec, num_blocks)
    q = torched(normal(rng, len(where[2]), heads, dim))[0].to(dtype)
    switches: dict[str, Any] = {}
    if switched:
        switches = {"softcap": 2.0, "sinks_H": normal(rng, heads)}
    expected = np.full((len(q), where[1].shape[1]), LEAST)
    REF.block_shares(q.float().numpy(), host, *where, 0.3, expected, **switches)
    on_device = switches | ({"sinks_H": torched(switches["sinks_H"])[0]} if switched else {})
    found = shares(q, kv, where, **on_device)
    within = 3e-6 if dtype == torch.float32 else 2e-3
    np.testing.assert_allclose(found.numpy(), expected, atol=within)
    for t in (0, 2, 5, 7):
        alone = shares(q[t : t + 1], kv, one_token(where, t), **on_device)
        width = where[2][t] // BLOCK_SIZE + 1
        assert torch.equal(alone[0, :width], found[t, :width])
        assert (found[t, width:] == LEAST).all()


def test_programs_may_divide_the_blocks_in_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    where, num_blocks = spans(rng, [(310, 6), (40, 2)])
    _, kv = random_caches(rng, KVSpec("full", (0,), 2, 16, "f16"), num_blocks)
    q = torched(normal(rng, 8, 4, 16))[0].to(torch.bfloat16)
    before = shares(q, kv, where)
    monkeypatch.setattr(kernels, "_PROGRAMS", 1)
    assert torch.equal(shares(q, kv, where), before)
    wide = where[0], np.pad(where[1], ((0, 0), (0, 9)), constant_values=-1), where[2]
    assert torch.equal(shares(q, kv, wide)[:, : before.shape[1]], before)


def test_the_sum_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are summed at once."""
    rng = np.random.default_rng(2)
    where, num_blocks = spans(rng, [(700, 2)])
    host, kv = random_caches(rng, KVSpec("full", (0,), 1, 16, "f32"), num_blocks)
    q = normal(rng, 2, 1, 16)
    monkeypatch.setattr(kernels, "_BLOCKS", 8)
    found = np.full((2, 22), LEAST)
    REF.block_shares(q, host, *where, 0.3, found)
    np.testing.assert_allclose(shares(torched(q)[0], kv, where).numpy(), found, atol=3e-6)


def test_what_a_token_does_not_see_leaves_no_trace() -> None:
    rng = np.random.default_rng(3)
    where, num_blocks = spans(rng, [(100, 40)])
    _, table, positions = where
    _, kv = random_caches(rng, KVSpec("full", (0,), 1, 16, "f32"), num_blocks)
    q = torched(normal(rng, 40, 2, 16))[0]
    before = shares(q[:20], kv, (np.array([0, 20], np.int32), table, positions[:20]))
    for p in range(80, 128):
        kv.k[table[0, p // 32], 0, p % 32] = torch.nan
    assert torch.equal(before, shares(q, kv, where)[:20])
