"""Chosen keys of the provider `triton` under Triton's interpreter: what the oracle chooses, attention to
it close to the oracle's, and a row's bits are its own."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are made, at their import

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from elinvar.base.config import KVSpec  # noqa: E402
from elinvar.ops.triton import attention, index, latent, sparse  # noqa: E402
from elinvar.ops.triton.caches import kv_layers  # noqa: E402
from gpu_caches import random_caches, random_tables, torched  # noqa: E402
from sweeps import REF, normal  # noqa: E402


def spans(
    rng: np.random.Generator, pieces: list[tuple[int, int]]
) -> tuple[tuple[np.ndarray, ...], int]:
    """Sequences of `length`, of which the last `count` tokens are queries: starts, tables, positions; and
    how many blocks there are."""
    tables, num_blocks = random_tables(rng, [length for length, _ in pieces])
    starts = np.cumsum([0, *(count for _, count in pieces)]).astype(np.int32)
    positions = np.concatenate([np.arange(n - c, n) for n, c in pieces]).astype(np.int32)
    return (starts, tables, positions), num_blocks


def one_token(where: tuple[np.ndarray, ...], t: int) -> tuple[np.ndarray, ...]:
    starts, tables, positions = where
    r = int(np.searchsorted(starts, t, side="right")) - 1
    return np.array([0, 1], np.int32), tables[r : r + 1], positions[t : t + 1]


PIECES = [(150, 5), (7, 7), (70, 1), (33, 2)]

# ---- the choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "heads", "dim", "k", "first"),
    [
        ("f32", 1, 16, 1, 0),
        ("f16", 3, 24, 31, 5),
        ("int8", 8, 64, 64, 0),
        ("bf16", 13, 40, 20, 40),
        ("f16", 64, 128, 32, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choice(kind: str, heads: int, dim: int, k: int, first: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(heads)
    where, num_blocks = spans(rng, PIECES if first < 7 else [(150, 5), (70, 1), (43, 2)])
    host, kv = random_caches(rng, KVSpec("full", (0,), 1, dim, kind, latent_dim=dim), num_blocks)
    q = torched(normal(rng, len(where[2]), heads, dim))[0].to(dtype)
    weights = normal(rng, len(q), heads)
    found = index.index_select(q, *torched(weights), kv, *torched(*where), k, first).numpy()
    expected = REF.index_select(q.float().numpy(), weights, host, *where, k, first)
    if heads > 1 and dtype == torch.float32:  # else many scores are equal, and round otherwise
        assert (found == expected).all()
    for chosen, position in zip(found, where[2], strict=True):
        count = max(0, min(k, int(position) + 1 - first))
        own = chosen[:count]
        assert (np.diff(own) > 0).all() and (chosen[count:] == -1).all()
        assert count == 0 or first <= own[0] <= own[-1] <= position
    common = np.mean([len({*a} & {*b}) / len({*b}) for a, b in zip(found, expected, strict=True)])
    assert common > 0.9 or heads == 1


def test_a_choice_is_a_token_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, alone, with others, its keys scored by one program or by many, in little memory."""
    rng = np.random.default_rng(3)
    where, num_blocks = spans(rng, PIECES)
    _, kv = random_caches(rng, KVSpec("full", (0,), 1, 32, "bf16", latent_dim=32), num_blocks)
    q = torched(normal(rng, 15, 6, 32))[0].to(torch.bfloat16)
    [weights] = torched(normal(rng, 15, 6))
    scores: list[torch.Tensor] = []
    score = index._score

    def spy(*args: object) -> torch.Tensor:
        scores.append(score(*args))  # type: ignore[arg-type]
        return scores[-1]

    monkeypatch.setattr(index, "_score", spy)
    whole = index.index_select(q, weights, kv, *torched(*where), 24)
    [together] = scores
    for t in (0, 4, 12, 14):
        own = slice(t, t + 1)
        alone = index.index_select(q[own], weights[own], kv, *torched(*one_token(where, t)), 24)
        count = where[2][t] + 1
        assert torch.equal(alone[0], whole[t])
        assert torch.equal(scores[-1][0, :count], together[t, :count])
    monkeypatch.setattr(index, "_PROGRAMS", 1)
    assert torch.equal(index.index_select(q, weights, kv, *torched(*where), 24), whole)
    monkeypatch.setattr(index, "_WORKSPACE", 4 * 4 * 32 * where[1].shape[1])
    assert torch.equal(index.index_select(q, weights, kv, *torched(*where), 24), whole)
    assert [len(part) for part in scores[-4:]] == [4, 4, 4, 3]


@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 3e38, 1e-40, np.inf, -np.inf, np.nan])
        | st.floats(width=32),
        min_size=1,
        max_size=90,
    ),
    st.integers(1, 90),
    st.integers(0, 20),
)
@settings(max_examples=40, deadline=None)
def test_of_equal_scores_the_first_are_chosen(scores: list[float], k: int, first: int) -> None:
    """As a stable sort does it, NaN as the lowest, over several blocks of scores."""
    n = len(scores)
    worth = np.float32(scores)
    worth = np.where(np.isnan(worth), np.float32(-np.inf), worth + np.float32(0))
    bits = worth.view(np.int32)
    row = np.full(-(-(n + first) // 32) * 32, -(2**31), np.int32)  # what is not seen
    row[first : first + n] = bits ^ (bits >> 31 & 0x7FFFFFFF)
    chosen = torch.zeros(1, k, dtype=torch.int32)
    where = torched(np.int32([0, 1]), np.int32([n + first - 1]))
    index.choose_kernel[1,](torched(row[None])[0], chosen, *where, 1, len(row), k, first, SCORES=32)
    expected = np.sort(np.argsort(-worth, kind="stable")[:k]) + first
    assert chosen[0, : len(expected)].tolist() == expected.tolist()
    assert (chosen[0, len(expected) :] == -1).all()


def test_who_sees_few_keys_is_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    where, num_blocks = spans(rng, PIECES)
    [kv] = kv_layers(KVSpec("full", (0,), 1, 16, "f32", latent_dim=16), num_blocks, "cpu")
    q, weights = torched(normal(rng, 15, 2, 16), normal(rng, 15, 2))
    monkeypatch.setattr(index, "_score", None)
    found = index.index_select(q, weights, kv, *torched(*where), 160)
    for chosen, position in zip(found, where[2], strict=True):
        count = int(position) + 1
        assert torch.equal(chosen[:count], torch.arange(count, dtype=torch.int32))
        assert (chosen[count:] == -1).all()


# ---- attention to what was chosen ---------------------------------------------------------------


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 64 keys, so that few keys have many."""
    for module in (attention, latent):
        monkeypatch.setattr(module, "ATTENTION_SPLIT", 64)
        monkeypatch.setattr(module, "_SPLIT", tl.constexpr(64))


@pytest.mark.parametrize("kind", ["f16", "int8"])
@pytest.mark.parametrize(("heads", "k"), [(4, 7), (18, 80), (3, 33)])
@pytest.mark.usefixtures("short_splits")
def test_attention_to_chosen_keys(
    kind: str, heads: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some were chosen late, as by a layer whose first keys nobody sees."""
    rng = np.random.default_rng(k)
    where, num_blocks = spans(rng, PIECES)
    spec = KVSpec("full", (0,), 1, 52, kind, latent_dim=40)  # type: ignore[arg-type]
    host, kv = random_caches(rng, spec, num_blocks)
    q = normal(rng, len(where[2]), heads, 52)
    chosen = np.full((len(q), k), -1, np.int32)
    for row, p in zip(chosen, where[2], strict=True):
        count = min(k, int(p))
        row[:count] = 1 + np.sort(rng.choice(p, count, replace=False))
    chosen[:, 0] = np.maximum(chosen[:, 0], 0)

    def found(own: slice, *where: np.ndarray) -> torch.Tensor:
        q_T, starts, tables, chosen_T = torched(q[own], *where[:2], chosen[own])
        return sparse.sparse_attention(q_T, kv, starts, tables, chosen_T, 0.2)

    whole = found(slice(None), *where)
    expected = REF.sparse_attention(q, host, *where, chosen, 0.2)
    assert np.abs(whole.flatten(1).numpy() - expected).max() < 3e-6
    for t in (0, 4, 12, 14):
        assert torch.equal(found(slice(t, t + 1), *one_token(where, t))[0], whole[t])
    monkeypatch.setattr(attention, "_PROGRAMS", 1)
    assert torch.equal(found(slice(None), *where), whole)
    monkeypatch.setattr(attention, "_WORKSPACE", 0)
    assert torch.equal(found(slice(None), *where), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("short_splits")
def test_with_all_keys_it_is_attention(dtype: torch.dtype) -> None:
    """To the bit, also beside tokens for which keys were chosen."""
    rng = np.random.default_rng(5)
    where, num_blocks = spans(rng, [(140, 4), (40, 40), (170, 2)])
    _, kv = random_caches(rng, KVSpec("full", (0,), 1, 48, "f16", latent_dim=32), num_blocks)
    _, keys = random_caches(rng, KVSpec("full", (0,), 1, 16, "f16", latent_dim=16), num_blocks)
    q, few = torched(normal(rng, 46, 5, 48))[0].to(dtype), 2
    q_index, weights = torched(normal(rng, 46, 2, 16), normal(rng, 46, 2))
    starts, tables, positions = torched(*where)
    dense = latent.latent_attention(q, kv, starts, tables, positions, 0.2)
    choose = q_index.to(dtype), weights, keys, starts, tables, positions
    chosen = index.index_select(*choose, 150)
    found = sparse.sparse_attention(q, kv, starts, tables, chosen, 0.2)
    assert torch.equal(found[:-few], dense[:-few])
    assert not torch.equal(found[-few:], dense[-few:])


def test_rows_that_fill_a_batch_up_change_nothing() -> None:
    rng = np.random.default_rng(6)
    (starts, tables, positions), num_blocks = spans(rng, [(75, 2), (40, 1)])
    _, kv = random_caches(rng, KVSpec("full", (0,), 1, 32, "f16", latent_dim=32), num_blocks)
    q, weights = torched(normal(rng, 3, 4, 32), normal(rng, 3, 4))

    def run(q: torch.Tensor, weights: torch.Tensor, *where: np.ndarray) -> list[torch.Tensor]:
        starts, tables, positions = torched(*where)
        chosen = index.index_select(q, weights, kv, starts, tables, positions, 20)
        return [chosen, sparse.sparse_attention(q, kv, starts, tables, chosen, 0.2)]

    before = run(q, weights, starts, tables, positions)
    more = np.append(starts, np.int32([3, 3]))
    after = run(
        torch.cat([q, torch.full_like(q, torch.nan)]),
        torch.cat([weights, weights]),
        more,
        np.concatenate([tables, tables]),
        np.concatenate([positions, positions]),
    )
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b[:3])
